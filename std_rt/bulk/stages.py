"""The three stages of a job on files, each a function from one block of items to the next (Arrow tables).

    ReadBlock     file -> frame at its working size
    PaintBlock    frame -> styled frame (an actor with an engine); clips from file to file
    WriteBlock    styled frame -> file

Whatever goes wrong with an item becomes its ``reason`` and travels on; no stage raises for one. One block
of items becomes one block of results, in the same order, so a stage that runs again gives the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from std_rt.bulk import places, segments
from std_rt.bulk.engine import BulkEngine
from std_rt.bulk.options import BulkOptions
from std_rt.bulk.plan import ITEM, is_clip_name
from std_rt.core.arrays import Frame, Size
from std_rt.core.errors import StdRtError
from std_rt.core.files import disk_is_full, reason
from std_rt.core.machine import peak_memory_mb
from std_rt.media import chroma, fit
from std_rt.media.image import Picture, read_picture, write_picture
from std_rt.media.sources import media_kind
from std_rt.media.video.transcode import transcode_stream
from std_rt.streaming.frame_stream import GROUPED, FrameStream
from std_rt.streaming.temporal import TemporalFilter

__all__ = ["RESULT", "Fitter", "PaintBlock", "ReadBlock", "WriteBlock"]

_PIXELS = pa.large_binary()
_STATE = [
    *(("stage", pa.string()), ("reason", pa.string()), ("disk_full", pa.bool_())),
    *(("width", pa.int32()), ("height", pa.int32()), ("bytes", pa.int64()), ("frames", pa.int64())),
    *(
        ("read_s", pa.float64()),
        ("engine_s", pa.float64()),
        ("write_s", pa.float64()),
        ("peak_mb", pa.float64()),
    ),
]
RESULT = pa.schema([*ITEM, *_STATE])
"""An item's result. ``reason``: why it failed in ``stage``, or empty; ``bytes``: of the file."""
_LAYERS = [
    *(("is_clip", pa.bool_()), ("work_height", pa.int32()), ("work_width", pa.int32())),
    *(("frame", _PIXELS), ("photo", _PIXELS), ("alpha", _PIXELS), ("exif", pa.binary())),
]
_INSIDE = pa.schema([*RESULT, *_LAYERS])
"""Between stages: pixels as bytes. ``width`` and ``height``: of the result; ``frame``: at the working size,
then the result; ``photo``: the input at the result's size, if its colours are kept; ``alpha``: that size."""


@dataclass
class _Row:
    """An item on its way: its columns in `_INSIDE`."""

    values: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def array(self, name: str, *shape: int) -> NDArray[np.uint8]:
        """A column of pixels at its shape."""
        return np.frombuffer(self.values[name], np.uint8).reshape(shape)

    def run(self, stage: str, seconds: str, work: Callable[[], dict[str, Any]]) -> None:
        """Update the columns by ``work``; what it raises becomes the reason. Nothing if one is there."""
        if self.values["reason"]:
            return
        begun_s = time.perf_counter()
        try:
            self.values |= work()
        except Exception as error:  # noqa: BLE001 (decoders raise anything; one file must not end a job)
            self.fail(stage, error)
        self.values[seconds] = time.perf_counter() - begun_s

    def fail(self, stage: str, error: Exception) -> None:
        """Note why the item failed, and drop its pixels."""
        text = str(error) if isinstance(error, StdRtError) else f"{type(error).__name__}: {reason(error)}"
        empty = dict.fromkeys(("frame", "photo", "alpha", "exif"), b"")
        self.values |= {
            "stage": stage,
            "reason": " ".join(text.split()),
            "disk_full": any(
                isinstance(each, OSError) and disk_is_full(each) for each in (error, error.__cause__)
            ),
        }
        self.values |= empty


def _rows(block: pa.Table) -> list[_Row]:
    """The rows of a block of items, or of a stage's; pixels are not copied."""
    empty = {"stage": "", "reason": "", "disk_full": False, "is_clip": False}
    empty |= dict.fromkeys(("width", "height", "bytes", "frames", "work_height", "work_width"), 0)
    empty |= dict.fromkeys(("read_s", "engine_s", "write_s", "peak_mb"), 0.0)
    empty |= dict.fromkeys(("frame", "photo", "alpha", "exif"), b"")
    return [
        _Row(empty | {name: _cell(block[name][i]) for name in block.column_names})
        for i in range(block.num_rows)
    ]


def _cell(scalar: pa.Scalar) -> Any:
    return memoryview(scalar.as_buffer()) if scalar.type == _PIXELS else scalar.as_py()


def _table(rows: Sequence[_Row], schema: pa.Schema) -> pa.Table:
    columns = [pa.array([row[column.name] for row in rows], column.type) for column in schema]
    return pa.table(columns, schema)


@dataclass(frozen=True)
class Fitter:
    """The working size of a bundle, without opening it: what `Stylizer.quality` computes."""

    size: int | Size
    multiple: int
    low: int
    high: int

    def __call__(self, height: int, width: int) -> Size:
        """(H, W) px at which a picture is painted."""
        return fit.working_size(height, width, self.size, self.multiple, self.low, self.high)


@dataclass(frozen=True)
class ReadBlock:
    """Reads a block of items. An input in several styles, one after the other, is decoded once."""

    fitter: Fitter
    keep_colours: bool = False

    def run(self, block: pa.Table) -> pa.Table:
        """`ITEM` -> `_INSIDE`."""
        decode = lru_cache(maxsize=1)(_decode)
        rows = _rows(block)
        for row in rows:
            row.run("read", "read_s", lambda row=row: self._read(row, decode))  # type: ignore[misc]
        return _table(rows, _INSIDE)

    def _read(self, row: _Row, decode: Callable[[str], Picture | None]) -> dict[str, Any]:
        if segments.is_part(row["output"]):
            return {"is_clip": True}
        picture = decode(row["input"])
        if picture is None:
            output = row["output"] if is_clip_name(row["output"]) else f"{row['output']}.mp4"
            return {"is_clip": True, "output": output}
        frame, alpha = picture.frame, picture.alpha
        if alpha is not None:
            frame = fit.spread(frame, alpha)
        shape = frame.shape[0], frame.shape[1]
        working = self.fitter(*shape)
        result = fit.result_size(shape, working)
        return {
            **dict(zip(("height", "width"), result, strict=True)),
            **dict(zip(("work_height", "work_width"), working, strict=True)),
            "frame": fit.resize(frame, working).tobytes(),
            "photo": fit.resize(frame, result).tobytes() if self.keep_colours else b"",
            "alpha": b"" if alpha is None else np.ascontiguousarray(fit.resize(alpha, result)).tobytes(),
            "exif": picture.exif,
        }


def _decode(place: str) -> Picture | None:
    """The picture; None for a clip, which the engine's worker reads itself."""
    with places.fetched(place) as path:
        return None if media_kind(path) == "video" else read_picture(path)


class PaintBlock:
    """An actor's work: paints a block with the engine that it opened when it began."""

    def __init__(self, options: BulkOptions, out: str) -> None:
        self._engine, self._options, self._out = BulkEngine(options), options, out

    def __call__(self, block: pa.Table) -> pa.Table:
        """`_INSIDE` -> `_INSIDE`. Pictures of one style and size share calls of the engine."""
        rows = _rows(block)
        groups: dict[tuple[Any, ...], list[_Row]] = {}
        for row in rows:
            if not row["reason"]:
                size = ("clip", row["key"]) if row["is_clip"] else (row["work_height"], row["work_width"])
                groups.setdefault((row["style"], row["strength"], *size), []).append(row)
        for group in groups.values():
            self._paint(group)
        peak_mb = peak_memory_mb() or 0.0
        for row in rows:
            row.values["peak_mb"] = peak_mb
        return _table(rows, _INSIDE)

    def _paint(self, group: Sequence[_Row]) -> None:
        begun_s = time.perf_counter()
        first = group[0]
        try:
            self._engine.use_style(first["style"], first["strength"])
            if first["is_clip"]:
                first.values |= self._clip(first)
            else:
                shape = first["work_height"], first["work_width"], 3
                painted = self._engine.paint([row.array("frame", *shape) for row in group])
                for row, styled in zip(group, painted, strict=True):
                    row.values |= self._finished(row, styled)
        except Exception as error:  # noqa: BLE001 (as in _Row.run)
            for row in group:
                row.fail("engine", error)
        for row in group:
            row.values["engine_s"] = (time.perf_counter() - begun_s) / len(group)

    def _finished(self, row: _Row, styled: Frame) -> dict[str, Any]:
        size = row["height"], row["width"]
        result = fit.resize(styled, size)
        if self._options.keep_colours:
            result = chroma.keep_colours(row.array("photo", *size, 3), result)
        return {"frame": result.tobytes(), "photo": b""}

    def _clip(self, row: _Row) -> dict[str, Any]:
        """A clip from file to file, as `std-rt stylize` makes it, or a segment of one."""
        options = self._options
        stream = FrameStream(
            self._engine.stylizer,
            batching=GROUPED,
            temporal=TemporalFilter(options.temporal),
            seed=options.seed,
        )
        self._engine.stylizer.keep_colours = options.keep_colours
        frames = fit.upscaling(stream.frames) if options.upscale else stream.frames
        place = places.joined(self._out, row["output"])
        with places.fetched(row["input"]) as source, places.stored(place) as sink:
            if segments.is_part(row["output"]):
                segments.paint_segment(source, sink, segments.Segment.of(row["output"]), frames)
                return {}
            frames = segments.joined(self._out, row["key"], frames)
            report = transcode_stream(source, sink, frames, overwrite=True, sound=options.sound)
        return {"width": report.width, "height": report.height, "frames": report.frames}


@dataclass(frozen=True)
class WriteBlock:
    """Writes a block of results into the folder ``out``."""

    out: str
    upscale: bool = False

    def run(self, block: pa.Table) -> pa.Table:
        """`_INSIDE` -> `RESULT`."""
        rows = _rows(block)
        for row in rows:
            row.run("write", "write_s", lambda row=row: self._write(row))  # type: ignore[misc]
        return _table(rows, RESULT)

    def _write(self, row: _Row) -> dict[str, Any]:
        place = places.joined(self.out, row["output"])
        if row["is_clip"]:
            return {"bytes": places.stats([place])[0][0]}
        size = row["height"], row["width"]
        frame = row.array("frame", *size, 3)
        alpha = row.array("alpha", *size) if len(row["alpha"]) else None
        if self.upscale:
            frame, alpha = _upscaled(row["input"], frame, alpha)
        with places.stored(place) as path:
            write_picture(path, frame, alpha, exif=row["exif"])
            size_bytes = path.stat().st_size
        return {"bytes": size_bytes, "frames": 1, "height": frame.shape[0], "width": frame.shape[1]}


def _upscaled(
    place: str, styled: Frame, alpha: NDArray[np.uint8] | None
) -> tuple[Frame, NDArray[np.uint8] | None]:
    """A result at the size of its input, which is read again: queues hold small pictures only."""
    with places.fetched(place) as path:
        picture = read_picture(path)
    guide = picture.frame if picture.alpha is None else fit.spread(picture.frame, picture.alpha)
    styled = fit.upscale(styled, guide)
    if alpha is not None and picture.alpha is not None:
        alpha = np.ascontiguousarray(fit.resize(picture.alpha, (styled.shape[0], styled.shape[1])))
    return styled, alpha
