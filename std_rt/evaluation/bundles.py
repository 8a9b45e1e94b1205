"""How good is the picture? Pairs to judge on, two baselines, and a sheet to look at.

For each (content, style) pair: the bundle's output beside Reinhard colour transfer and OpenCV's
``stylization`` filter, with the numbers of `evaluation.measures`. A clip among the contents takes part with
its first frame, and is run as a stream for its warping error.
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
from std_rt.evaluation.measures import Mask, WarpingError, reinhard, score
from std_rt.media.image import read_picture, write_picture
from std_rt.media.sources import expand_inputs, is_video
from std_rt.media.video.clip import open_clip
from std_rt.pipeline.conditioning import square
from std_rt.pipeline.stylizer import Stylizer

__all__ = [
    "Judge",
    "clip_frames",
    "clips_among",
    "draw_pairs",
    "evaluate",
    "measure_clip",
    "read_mask",
    "score",
    "weight_free",
    "write_sheet",
]

Frame = NDArray[np.uint8]
Pair = tuple[Frame, Frame]
# (output, content, style, mask or None) -> numbers by name
Judge = Callable[[Frame, Frame, Frame, Mask | None], dict[str, float]]

SMALLEST_PX = 32  # below it, 5x5 patches at a quarter of the size are next to none
_GAP_PX = 4


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
    # 7 is prime to most folder sizes, so that styles come round in another order than contents.
    chosen = [(a[i * len(a) // count], b[(7 * i + 1) % len(b)]) for i in range(count)]
    return [(square(_still(x), side_px), square(_still(y), side_px)) for x, y in chosen]


def _still(path: Path) -> Frame:
    return next(iter(clip_frames(path, 1))) if is_video(path) else read_picture(path).frame


def clips_among(contents: Path, videos: Iterable[Path] = ()) -> list[Path]:
    """Clips in CONTENTS, then those asked for by name; each once."""
    named = [path for path in expand_inputs([contents]) if is_video(path)]
    return list(dict.fromkeys([*named, *videos]))


def clip_frames(path: Path, count: int) -> list[Frame]:
    """The first ``count`` frames of a clip, upright. Raises MediaError where it is no clip."""
    with open_clip(path) as clip, closing(clip.read()) as items:
        frames = [item.rgb for item in islice(items, count)]
    if not frames:
        raise UsageError(f"{path} is damaged: not one frame of it could be decoded")
    return frames


def read_mask(path: Path, side_px: int) -> Mask:
    """A mask picture as a bool square; white = stylize. Raises UsageError where it is all black."""
    frame = square(read_picture(path).frame, side_px)
    mask = np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) > 127)
    if not mask.any():
        raise UsageError(f"--mask {path} is all black; paint white what is to be stylized")
    return mask


def _stylization(content: Frame) -> Frame:
    return np.asarray(cv2.stylization(content), np.uint8)


def _of_size(frame: Frame, like: Frame) -> Frame:
    """The working size is a multiple, and never larger than asked: back to the content's size."""
    if frame.shape == like.shape:
        return frame
    size = (like.shape[1], like.shape[0])
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC), np.uint8)


def evaluate(
    stylizer: Stylizer, pairs: list[Pair], sheet: Path, columns: int = 2, judge: Judge = weight_free
) -> dict[str, dict[str, float]]:
    """Run all pairs, write the sheet (content, style, ours, Reinhard, cv2), return mean scores by method."""
    scores: dict[str, list[dict[str, float]]] = {"std-rt": [], "reinhard": [], "cv2.stylization": []}
    rows = []
    for content, style in pairs:
        stylizer.set_style(style)
        ours = _of_size(stylizer.stylize(content), content)
        outputs = [ours, reinhard(content, style), _stylization(content)]
        for name, output in zip(scores, outputs, strict=True):
            scores[name].append(judge(output, content, style, None))
        rows.append([content, style, *outputs])
    write_sheet(sheet, rows, columns)
    return {name: means(each) for name, each in scores.items()}


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each number over rows of the same names."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def measure_clip(stylizer: Stylizer, frames: list[Frame], style: Frame) -> dict[str, float]:
    """Warping error of a clip run as a stream, by method, and of its ``source``; {} for nothing but cuts."""
    stylizer.set_style(style)
    ours, state = [], None
    for content in frames:
        styled, state = stylizer.step(content, state)
        ours.append(_of_size(styled, content))
    meter = WarpingError(frames)
    found = {
        "source": meter.floor,
        "std-rt": meter.of(ours),
        "reinhard": meter.of([reinhard(frame, style) for frame in frames]),
        "cv2.stylization": meter.of([_stylization(frame) for frame in frames]),
    }
    return {name: value for name, value in found.items() if value is not None}


def write_sheet(
    path: Path, rows: list[list[Frame]], columns: int = 1, names: Mapping[int, str] | None = None
) -> None:
    """Rows of frames of one size as a picture, ``columns`` rows side by side, ``names`` over the frames."""
    pictures = [_row(row) for row in rows]
    pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % columns)
    grid = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)]
    if names:
        side = rows[0][0].shape[1] + _GAP_PX
        grid.insert(0, _header(grid[0].shape[1], {i * side: name for i, name in names.items()}))
    write_picture(path, np.concatenate(grid, 0))


def _row(frames: list[Frame]) -> Frame:
    gap = ((0, _GAP_PX), (0, _GAP_PX), (0, 0))
    return np.concatenate([np.pad(frame, gap, constant_values=255) for frame in frames], 1)


def _header(width: int, texts: Mapping[int, str], height: int = 18) -> Frame:
    """A white strip with ``texts`` by their left edge in px."""
    strip = np.full((height, width, 3), 255, np.uint8)
    for x, text in texts.items():
        cv2.putText(strip, text, (x + 2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return strip
