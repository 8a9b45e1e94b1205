"""Pairs and clips to judge candidates on, their measures, and contact sheets.

A pair is (content, style); of a clip among the contents, the first frame is a content. The clip itself is
rendered exactly as `std-rt stylize` would, to measure flicker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count, islice
from math import gcd
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.core.arrays import Frame
from std_rt.core.errors import UsageError
from std_rt.evaluation.measures import Mask, WarpingError, means, score, sharpness
from std_rt.media.fit import resize
from std_rt.media.image import read_picture, write_picture
from std_rt.media.sources import expand_inputs, is_video
from std_rt.media.video.clip import open_clip
from std_rt.pipeline.conditioning import square
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.frame_stream import GROUPED, FrameStream
from std_rt.streaming.temporal import TemporalFilter

__all__ = [
    "Clip",
    "Describe",
    "Judge",
    "Pair",
    "check_side",
    "clip_frames",
    "clips_among",
    "draw_pair",
    "judge_clip",
    "paint_clip",
    "paint_picture",
    "pair_files",
    "pair_name",
    "pair_up",
    "read_clips",
    "read_mask",
    "time_slice",
    "weight_free",
    "write_sheet",
]

Pair = tuple[Frame, Frame]  # (content, style)
# (output, content, style, mask or None) -> numbers by name
Judge = Callable[[Frame, Frame, Frame, Mask | None], dict[str, float]]
Describe = Callable[[Frame], NDArray[np.float32]]  # a picture's features [D]

SMALLEST_PX = 32  # below it, a quarter of the size has hardly any 5x5 patches
MOST_JUDGED = 12  # frames of a clip that are judged as pictures: neighbours look alike
_GAP_PX, _HEADER_PX = 4, 18


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a clip as squares, with the style they are judged in; ``name`` as `pair_name`."""

    path: Path
    name: str
    frames: list[Frame]
    style: Frame
    meter: WarpingError


def weight_free(frame: Frame, content: Frame, style: Frame, mask: Mask | None = None) -> dict[str, float]:
    """The measures that need no weights, by name."""
    numbers = asdict(score(frame, content, style, mask))
    return numbers | {"sharpness": sharpness([frame], [content], mask)}


def pair_files(contents: Path, styles: Path, number: int) -> list[tuple[Path, Path]]:
    """``number`` pairs (content, style) of two folders, the same ones for the same files; see `pair_up`."""
    return pair_up(expand_inputs([contents]), expand_inputs([styles]), number)


def pair_up(a: Sequence[Path], b: Sequence[Path], number: int) -> list[tuple[Path, Path]]:
    """``number`` pairs of contents ``a`` and styles ``b``, both in order, or all if there are fewer.

    Of the C contents, pair i has the one at i C / number, rounded down, and of the S styles the one at
    (7 i + 1) modulo S (7, or the next number prime to S): no style comes twice before all came once, and in
    another order than the contents. C S pairs are all there are, each once.
    """
    if number < 1:
        raise UsageError(f"--pairs must be at least 1, got {number}")
    number = min(number, len(a) * len(b))
    stride = next(step for step in count(7) if gcd(step, len(b)) == 1)
    return [(a[i * len(a) // number], b[(stride * i + 1) % len(b)]) for i in range(number)]


def pair_name(content: Path, style: Path) -> str:
    """The name of a pair in folders of outputs: CONTENT--STYLE, both without suffix."""
    return f"{content.stem}--{style.stem}"


def draw_pair(content: Path, style: Path, side_px: int) -> Pair:
    """Both pictures of a pair as centred squares; a clip gives its first frame."""

    def still(path: Path) -> Frame:
        frame = clip_frames(path, 1)[0] if is_video(path) else read_picture(path).frame
        return square(frame, side_px)

    return still(content), still(style)


def check_side(side_px: int) -> None:
    """Raise UsageError for squares that the measures cannot judge."""
    if side_px < SMALLEST_PX:
        raise UsageError(f"--size {side_px} is too small to judge; use at least {SMALLEST_PX}")


def clips_among(contents: Sequence[Path], videos: Iterable[Path] = ()) -> list[Path]:
    """Clips among the contents (files, or folders of them), then those asked for by name; each once."""
    named = [path for path in expand_inputs([*contents]) if is_video(path)]
    return list(dict.fromkeys([*named, *videos]))


def clip_frames(path: Path, count: int) -> list[Frame]:
    """The first ``count`` frames of a clip, upright. Raises MediaError if it is not a clip."""
    with open_clip(path) as clip, closing(clip.read()) as items:
        frames = [item.rgb for item in islice(items, count)]
    if not frames:
        raise UsageError(f"{path} is damaged: no frame could be decoded")
    return frames


def read_clips(
    clips: Sequence[Path], files: Sequence[tuple[Path, Path]], pairs: Sequence[Pair], frames: int
) -> list[Clip]:
    """The first ``frames`` of each clip, at the size of the pairs; clip i has the style of pair i."""
    found = []
    for i, path in enumerate(clips):
        style_path, style = files[i % len(files)][1], pairs[i % len(pairs)][1]
        squares = [square(frame, len(style)) for frame in clip_frames(path, frames)]
        found.append(Clip(path, pair_name(path, style_path), squares, style, WarpingError(squares)))
    return found


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


def paint_picture(stylizer: Stylizer, content: Frame, style: Frame) -> Frame:
    """A pair stylized, at its content's size."""
    stylizer.set_style(style)
    return resize(stylizer.stylize(content), (content.shape[0], content.shape[1]))


def paint_clip(stylizer: Stylizer, frames: list[Frame], temporal: str) -> list[Frame]:
    """Frames stylized as by `std-rt stylize --temporal TEMPORAL`, each at its content's size."""
    stream = FrameStream(stylizer, batching=GROUPED, temporal=TemporalFilter(temporal))
    styled = zip(stream.frames(frames), frames, strict=True)
    return [resize(one, (frame.shape[0], frame.shape[1])) for one, frame in styled]


def judge_clip(clip: Clip, frames: Sequence[Frame], judge: Judge = weight_free) -> dict[str, float]:
    """A clip's numbers by name: ``warping`` and ``sharpness`` over all frames, as `WarpingError.judge`.

    With them the means of the other measures of ``judge`` over at most `MOST_JUDGED` frames, evenly spaced.
    {} if no pair of frames is followed.
    """
    moving, count = clip.meter.judge(frames), len(frames)
    if not moving:
        return {}
    chosen = [i * count // min(count, MOST_JUDGED) for i in range(min(count, MOST_JUDGED))]
    return means([judge(frames[i], clip.frames[i], clip.style, None) for i in chosen]) | moving


def time_slice(frames: Sequence[Frame]) -> Frame:
    """The middle row of every frame [H, W, 3], time downwards, each thick enough for about a square."""
    rows = np.stack([frame[len(frame) // 2] for frame in frames])
    return rows.repeat(max(1, len(frames[0]) // len(rows)), 0)


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
