"""Picture quality of a bundle: pairs to judge it on, two baselines, and a contact sheet.

For each (content, style) pair: the bundle's picture next to Reinhard colour transfer and OpenCV's
``stylization`` filter, with the numbers of `evaluation.measures`. Of a clip, the first frame is scored like a
picture; the clip itself is rendered exactly as `std-rt stylize` would, to measure flicker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import UsageError
from std_rt.evaluation.measures import Mask, WarpingError, means, reinhard, score
from std_rt.media.image import read_picture, write_picture
from std_rt.media.sources import expand_inputs, is_video
from std_rt.media.video.clip import open_clip
from std_rt.pipeline.conditioning import square
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.frame_stream import GROUPED, FrameStream
from std_rt.streaming.temporal import TemporalFilter

__all__ = [
    "Judge",
    "Pair",
    "clip_frames",
    "clips_among",
    "draw_pairs",
    "judge_clip",
    "judge_pictures",
    "paint_clip",
    "read_mask",
    "weight_free",
    "write_sheet",
]

Frame = NDArray[np.uint8]
Pair = tuple[Frame, Frame]  # (content, style)
# (output, content, style, mask or None) -> numbers by name
Judge = Callable[[Frame, Frame, Frame, Mask | None], dict[str, float]]

SMALLEST_PX = 32  # below it, a quarter of the size has hardly any 5x5 patches
_GAP_PX, _HEADER_PX = 4, 18


def weight_free(frame: Frame, content: Frame, style: Frame, mask: Mask | None = None) -> dict[str, float]:
    """The measures that need no weights, by name."""
    return asdict(score(frame, content, style, mask))


def draw_pairs(contents: Path, styles: Path, count: int, side_px: int) -> list[Pair]:
    """``count`` pairs spread evenly over two folders, as centred squares; clips give their first frame."""
    a, b = expand_inputs([contents]), expand_inputs([styles])
    if count < 1:
        raise UsageError(f"--pairs must be at least 1, got {count}")
    if side_px < SMALLEST_PX:
        raise UsageError(f"--size {side_px} is too small to judge; use at least {SMALLEST_PX}")

    def still(path: Path) -> Frame:
        frame = clip_frames(path, 1)[0] if is_video(path) else read_picture(path).frame
        return square(frame, side_px)

    # 7 is prime to most folder sizes, so that styles come round in another order than contents.
    return [(still(a[i * len(a) // count]), still(b[(7 * i + 1) % len(b)])) for i in range(count)]


def clips_among(contents: Path, videos: Iterable[Path] = ()) -> list[Path]:
    """Clips in CONTENTS, then those asked for by name; each once."""
    named = [path for path in expand_inputs([contents]) if is_video(path)]
    return list(dict.fromkeys([*named, *videos]))


def clip_frames(path: Path, count: int) -> list[Frame]:
    """The first ``count`` frames of a clip, upright. Raises MediaError if it is not a clip."""
    with open_clip(path) as clip, closing(clip.read()) as items:
        frames = [item.rgb for item in islice(items, count)]
    if not frames:
        raise UsageError(f"{path} is damaged: no frame could be decoded")
    return frames


def read_mask(path: Path, side_px: int) -> Mask:
    """A mask picture as a bool square; white = stylize, transparent = not. UsageError if it is all black."""
    picture = read_picture(path)
    frame = picture.frame
    if picture.alpha is not None:  # over black instead of white
        hidden = np.broadcast_to(255 - picture.alpha[:, :, None], frame.shape)
        frame = np.maximum(frame, hidden) - hidden
    frame = square(frame, side_px)
    mask = np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) > 127)
    if not mask.any():
        raise UsageError(f"--mask {path} is all black; paint white what is to be stylized")
    return mask


def judge_pictures(
    stylizer: Stylizer, pairs: list[Pair], sheet: Path, judge: Judge = weight_free
) -> dict[str, dict[str, float]]:
    """Stylize all pairs, write the sheet (content, style, ours, Reinhard, cv2); mean scores by method."""
    scores: dict[str, list[dict[str, float]]] = {"std-rt": [], "reinhard": [], "cv2.stylization": []}
    rows = []
    for content, style in pairs:
        stylizer.set_style(style)
        ours = _of_size(stylizer.stylize(content), content)
        outputs = [ours, reinhard(content, style), _stylization(content)]
        for name, output in zip(scores, outputs, strict=True):
            scores[name].append(judge(output, content, style, None))
        rows.append([content, style, *outputs])
    write_sheet(sheet, rows, columns=2)
    return {name: means(each) for name, each in scores.items()}


def judge_clip(stylizer: Stylizer, frames: list[Frame], style: Frame) -> dict[str, float]:
    """Warping error (0..1) of a clip by method, and of its ``source``; {} for nothing but cuts.

    ``std-rt`` is rendered with ``--temporal full``, the default of `std-rt stylize`.
    """
    stylizer.set_style(style)
    meter = WarpingError(frames)
    found = {
        "source": meter.floor,
        "std-rt": meter.of(paint_clip(stylizer, frames, "full")),
        "std-rt, temporal off": meter.of(paint_clip(stylizer, frames, "off")),
        "reinhard": meter.of([reinhard(frame, style) for frame in frames]),
        "cv2.stylization": meter.of([_stylization(frame) for frame in frames]),
    }
    return {name: value for name, value in found.items() if value is not None}


def paint_clip(stylizer: Stylizer, frames: list[Frame], temporal: str) -> list[Frame]:
    """Frames stylized as by `std-rt stylize --temporal TEMPORAL`, each at its content's size."""
    stream = FrameStream(stylizer, batching=GROUPED, temporal=TemporalFilter(temporal))
    return [_of_size(styled, frame) for styled, frame in zip(stream.frames(frames), frames, strict=True)]


def _stylization(content: Frame) -> Frame:
    return np.asarray(cv2.stylization(content), np.uint8)


def _of_size(frame: Frame, like: Frame) -> Frame:
    """Resize to the content's size (the working size is rounded and capped)."""
    if frame.shape == like.shape:
        return frame
    size = (like.shape[1], like.shape[0])
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC), np.uint8)


def write_sheet(
    path: Path, rows: list[list[Frame]], columns: int = 1, names: Mapping[int, str] | None = None
) -> None:
    """Rows of frames of one size as a picture, ``columns`` rows side by side, ``names`` over the frames."""
    gap = ((0, _GAP_PX), (0, _GAP_PX), (0, 0))
    padded = [np.concatenate([np.pad(f, gap, constant_values=255) for f in row], 1) for row in rows]
    padded += [np.full_like(padded[0], 255)] * (-len(padded) % columns)
    lines = [np.concatenate(padded[i : i + columns], 1) for i in range(0, len(padded), columns)]
    if names:
        header = np.full((_HEADER_PX, lines[0].shape[1], 3), 255, np.uint8)
        for i, name in names.items():
            at = (i * (rows[0][0].shape[1] + _GAP_PX) + 2, 13)
            cv2.putText(header, name, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        lines.insert(0, header)
    write_picture(path, np.concatenate(lines))
