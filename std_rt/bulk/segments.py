"""Segments of long clips: several engines paint one clip at once, and its parts are joined in order.

    OUT/.parts/KEY/BEGIN_END.arrow    painted frames of a segment, until its clip is on record

A join makes the clip as ever, sound and times and all, but looks up each decoded frame in the parts, by its
digest, before it paints it. So no cut can be seen or lose anything: a frame that a segment lacks, holds as a
damaged picture, or has decoded in another way (a stream without clean key frames), is painted at the join.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pyarrow as pa

from std_rt.bulk import places
from std_rt.bulk.plan import ITEM, is_clip_name
from std_rt.core.arrays import Frame
from std_rt.core.errors import MediaError
from std_rt.core.files import writing
from std_rt.media.video.clip import ContainerClip, open_clip
from std_rt.media.video.transcode import Stream, stylized

__all__ = ["Segment", "discard", "is_part", "joined", "paint_segment", "rounds", "segments_of", "unpainted"]

FOLDER = ".parts"
_PART = pa.schema([("source", pa.binary()), ("png", pa.large_binary())])
_FASTEST = [cv2.IMWRITE_PNG_COMPRESSION, 1]
_AHEAD = 16  # parts' frames searched for the next one: more than decoders add or drop around a cut


@dataclass(frozen=True)
class Segment:
    """The frames of a clip with ``begin`` <= pts < ``end``, in its time base; None: from or to its end."""

    key: str
    begin: int | None
    end: int | None

    @property
    def output(self) -> str:
        """The part's path in the output folder."""
        begin, end = ("" if edge is None else edge for edge in (self.begin, self.end))
        return f"{FOLDER}/{self.key}/{begin}_{end}.arrow"

    @staticmethod
    def of(output: str) -> Segment:
        """The segment whose part is at ``output``."""
        path = PurePosixPath(output)
        begin, end = (int(edge) if edge else None for edge in path.stem.split("_"))
        return Segment(path.parent.name, begin, end)


def is_part(output: str) -> bool:
    """Whether a row of a plan with this output is a segment, not an item."""
    return output.startswith(f"{FOLDER}/")


def segments_of(plan: pa.Table, seconds: float) -> dict[str, list[Segment]]:
    """The segments, at least ``seconds`` long, of each clip that has several, by the item's key.

    Clips without an index of their key frames, or with transparency, stay whole.
    """
    edges = lru_cache(maxsize=None)(_edges)
    found = {}
    for key, place in zip(plan["key"].to_pylist(), plan["input"].to_pylist(), strict=True):
        if is_clip_name(place) and (inner := edges(place, seconds)):
            pairs = zip((None, *inner), (*inner, None), strict=True)
            found[key] = [Segment(key, begin, end) for begin, end in pairs]
    return found


def _edges(place: str, seconds: float) -> list[int]:
    """Times of the key frames at which a clip is cut; none if it cannot be read, which its turn will tell."""
    with suppress(MediaError), places.fetched(place) as path, open_clip(path) as clip:
        times = [] if clip.has_alpha else list(clip.key_times())
        edges = times[:1]
        for time in times:
            if (time - edges[-1]) * clip.time_base >= seconds:
                edges.append(time)
        return edges[1:]
    return []


def unpainted(out: str, segments: Mapping[str, list[Segment]]) -> list[Segment]:
    """The segments without a part. Parts of others, as an earlier command cut them, are removed."""
    there = {f"{FOLDER}/{name}" for name in places.listed(places.joined(out, FOLDER))}
    planned = {segment.output: segment for some in segments.values() for segment in some}
    for name in there - planned.keys():
        places.remove(places.joined(out, name))
    return [segment for output, segment in planned.items() if output not in there]


def rounds(plan: pa.Table, missing: Iterable[Segment], keys: Iterable[str], room: int) -> Iterator[pa.Table]:
    """The plan in turns, each with segments of some clips (``room`` at least) and the joins of those before.

    ``missing``: segments to paint; ``keys``: of the clips that are cut. Turns bound the room that parts take.
    """
    cut = set(keys)
    if not cut:
        yield plan
        return
    by_key: dict[str, list[Segment]] = {}
    for segment in missing:
        by_key.setdefault(segment.key, []).append(segment)
    rows = plan.to_pylist()
    due, joins, parts = [row for row in rows if row["key"] not in cut], [], []
    for row in (row for row in rows if row["key"] in cut):
        outputs = [segment.output for segment in by_key.get(row["key"], ())]
        parts += [row | {"key": output, "output": output} for output in outputs]
        joins.append(row)
        if len(parts) >= room:
            yield pa.Table.from_pylist(parts + due, ITEM)
            due, joins, parts = joins, [], []
    if parts or due:
        yield pa.Table.from_pylist(parts + due, ITEM)
    if joins:
        yield pa.Table.from_pylist(joins, ITEM)


def paint_segment(source: Path, sink: Path, segment: Segment, stream: Stream) -> None:
    """Paint a segment of the clip ``source`` into the part ``sink``. Raises MediaError."""
    with open_clip(source) as clip:
        if not isinstance(clip, ContainerClip):
            raise MediaError(f"{source} has changed since it was planned; run the command again")
        frames = clip.read_between(segment.begin, segment.end)
        with (
            writing(sink),
            pa.OSFile(str(sink), "wb") as file,
            pa.ipc.new_stream(file, _PART) as part,
            stylized(frames, stream) as pairs,
        ):
            for frame, styled in pairs:
                part.write_batch(pa.record_batch([[_digest(frame.rgb)], [_packed(styled)]], _PART))


def joined(out: str, key: str, paint: Stream) -> Stream:
    """``paint`` for the clip of an item, with what its parts hold taken from there."""
    folder = places.joined(places.joined(out, FOLDER), key)
    names = sorted(places.listed(folder), key=lambda name: _order(Segment.of(name)))
    if not names:
        return paint
    parts = _frames_of([places.joined(folder, name) for name in names])
    return lambda frames: _looked_up(frames, parts, paint)


def _order(segment: Segment) -> float:
    return -math.inf if segment.begin is None else segment.begin


def _looked_up(
    frames: Iterator[Frame], parts: Iterator[tuple[bytes, bytes]], paint: Stream
) -> Iterator[Frame]:
    for lacking, run in groupby(_paired(frames, parts), key=lambda pair: pair[1] is None):
        if lacking:  # as one stream, whose frames share calls of the engine
            yield from paint(frame for frame, _ in run)
        else:
            yield from (painted for _, painted in run if painted is not None)


def _paired(
    frames: Iterator[Frame], parts: Iterator[tuple[bytes, bytes]]
) -> Iterator[tuple[Frame, Frame | None]]:
    """Each frame with what a part holds for it; None if no part does."""
    ahead: deque[tuple[bytes, bytes]] = deque()
    for frame in frames:
        ahead.extend(islice(parts, _AHEAD - len(ahead)))
        wanted = _digest(frame)
        at = next((index for index, (source, _) in enumerate(ahead) if source == wanted), None)
        painted = None if at is None else _unpacked(ahead[at][1])
        for _ in range(0 if at is None else at + 1):
            ahead.popleft()
        yield frame, painted


def _frames_of(parts: Iterable[str]) -> Iterator[tuple[bytes, bytes]]:
    """(digest of the source frame, painted frame) of all parts, in order; one that is damaged ends early."""
    for place in parts:
        with (
            suppress(OSError, ValueError, MediaError),  # Arrow's are ValueErrors
            places.fetched(place) as path,
            pa.OSFile(str(path)) as file,
            pa.ipc.open_stream(file) as part,
        ):
            for batch in part:
                yield batch["source"][0].as_py(), batch["png"][0].as_py()


def _digest(frame: Frame) -> bytes:
    return hashlib.blake2b(frame.tobytes(), digest_size=16, salt=f"{frame.shape[1]}".encode()).digest()


def _packed(frame: Frame) -> bytes:
    """The frame as PNG with its red and blue exchanged, which `_unpacked` gives back as they were."""
    return cv2.imencode(".png", np.ascontiguousarray(frame), _FASTEST)[1].tobytes()


def _unpacked(png: bytes) -> Frame | None:
    """None if it is damaged."""
    found = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR) if png else None
    return None if found is None else np.asarray(found, np.uint8)


def discard(out: str, is_done: Callable[[str], bool]) -> None:
    """Remove the parts of clips that are done (by their items' keys), and with the last the folder."""
    folder = places.joined(out, FOLDER)
    keys = {name.partition("/")[0] for name in places.listed(folder)}
    done = {key for key in keys if is_done(key)}
    for key in done:
        places.remove(places.joined(folder, key))
    if keys and keys == done:
        places.remove(folder)
