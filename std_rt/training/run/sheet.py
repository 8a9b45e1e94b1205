"""Contact sheets, loss curves and histograms: pictures of how a run is doing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.training.data.picture_set import Frame, picture_files, read_picture

Pairs = list[tuple[Frame, Frame]]
Series = tuple[Sequence[float], Sequence[float]]  # x, y
Colour = tuple[int, int, int]  # BGR
FloatArray = npt.NDArray[np.float64]
BLACK: Colour = (0, 0, 0)
COLOURS: tuple[Colour, ...] = (
    (40, 90, 200), (180, 110, 20), (60, 150, 40), (150, 50, 150),
    (20, 150, 200), (120, 120, 120), (160, 160, 0), (110, 60, 230),
)  # fmt: skip
LEFT = 60  # px: where diagrams begin, right of the axis labels
LEGEND = 170  # px, right of diagrams with named curves


def to_tensor(frames: list[Frame]) -> Tensor:
    """Frames of one size -> images ``[B, 3, H, W]`` in [-1, 1]."""
    batch = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    return batch / 127.5 - 1


def to_frames(images: Tensor) -> list[Frame]:
    """Images ``[B, 3, H, W]`` in [-1, 1] -> frames."""
    scaled = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(scaled.permute(0, 2, 3, 1).cpu().numpy())


def centre_crop(frame: Frame, size_px: int) -> Frame:
    """Largest centred square, resized to ``size_px``."""
    h, w = frame.shape[:2]
    side = min(h, w)
    y, x = (h - side) // 2, (w - side) // 2
    return cv2.resize(frame[y : y + side, x : x + side], (size_px, size_px), interpolation=cv2.INTER_AREA)


def spread_pairs(contents: Path, styles: Path, count: int = 8, size_px: int = 256) -> Pairs:
    """(content, style) squares spread evenly over two folders; the same for the same folders."""
    content, style = picture_files(contents), picture_files(styles)
    pairs = []
    for i in range(count):
        a = read_picture(content[i * len(content) // count])
        b = read_picture(style[(i * len(style) // count + 1) % len(style)])
        if a is not None and b is not None:
            pairs.append((centre_crop(a, size_px), centre_crop(b, size_px)))
    return pairs


def save_sheet(path: Path, rows: list[list[Frame]], names: Sequence[str] = (), gap_px: int = 4) -> None:
    """Write rows of equally sized frames as one PNG, under the ``names`` of its columns.

    RecipeError if it cannot be written.
    """
    padded = [
        np.concatenate([np.pad(f, ((0, gap_px), (0, gap_px), (0, 0)), constant_values=255) for f in row], 1)
        for row in rows
    ]
    sheet = cv2.cvtColor(np.concatenate(padded, 0), cv2.COLOR_RGB2BGR)
    if names:
        head = np.full((20, sheet.shape[1], 3), 255, np.uint8)
        for i, name in enumerate(names):
            _write_text(head, name, (4 + i * (rows[0][0].shape[1] + gap_px), 14))
        sheet = np.concatenate([head, sheet], 0)
    _write_png(path, sheet)


def save_curve(
    path: Path,
    curves: Mapping[str, Series],
    title: str,
    size_px: tuple[int, int] = (640, 280),
) -> None:
    """Write loss curves (running means) as a PNG.

    ``curves``: (x, y) by name. Positive ones stand on a log scale; the others get a panel with a linear
    scale below. RecipeError if it cannot be written.
    """
    drawn = {name: xy for name, xy in curves.items() if len(xy[1]) >= 2}
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(drawn)}
    positive = {name: xy for name, xy in drawn.items() if min(xy[1]) > 0}
    others = {name: xy for name, xy in drawn.items() if name not in positive}
    panels = [_panel(positive, colours, size_px, log=True)] if positive or not others else []
    panels += [_panel(others, colours, size_px, log=False)] if others else []
    canvas = np.concatenate(panels, 0)
    _write_text(canvas, title, (LEFT, 16), size=0.45)
    _write_png(path, canvas)


def _panel(
    curves: Mapping[str, Series], colours: Mapping[str, Colour], size_px: tuple[int, int], *, log: bool
) -> Frame:
    """One diagram: curves, the ends of both axes, and a legend with each curve's last value."""
    w, h = size_px
    canvas = np.full((h, w, 3), 255, np.uint8)
    if not curves:
        return canvas
    smooth = {
        name: _smooth(np.asarray(x, float), np.asarray(y, float), log) for name, (x, y) in curves.items()
    }
    right = w - LEGEND
    start, end = _ends(np.concatenate([x for x, _ in smooth.values()]))
    low, high = _ends(np.concatenate([y for _, y in smooth.values()]))
    for i, (name, (x, y)) in enumerate(smooth.items()):
        xs = LEFT + (x - start) / (end - start) * (right - LEFT)
        ys = h - 30 - (y - low) / (high - low) * (h - 60)
        points = np.stack([xs, ys], -1).astype(np.int32)
        cv2.polylines(canvas, [points], False, colours[name], 2, cv2.LINE_AA)
        _write_text(canvas, f"{name} {curves[name][1][-1]:.4g}", (right + 8, 34 + 15 * i), colours[name])
    for value, row in ((high, 30), (low, h - 30)):
        _write_text(canvas, f"{np.exp(value) if log else value:.4g}", (4, row))
    _write_text(canvas, f"{start:.0f}", (LEFT, h - 10))
    _write_text(canvas, f"{end:.0f}", (right - 50, h - 10))
    return canvas


def _smooth(x: FloatArray, y: FloatArray, log: bool) -> tuple[FloatArray, FloatArray]:
    """Running mean over a hundredth of the curve, of the logarithm on a log scale."""
    width = max(1, len(y) // 100)
    kernel = np.ones(width) / width
    return np.convolve(x, kernel, "valid"), np.convolve(np.log(y) if log else y, kernel, "valid")


def _ends(values: FloatArray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return low, max(high, low + 1e-6)


def save_histogram(
    path: Path, counts: Sequence[float], title: str, size_px: tuple[int, int] = (640, 200)
) -> None:
    """Write bars, one per count; the line is the mean of those above 0. RecipeError as ``save_curve``."""
    w, h = size_px
    canvas = np.full((h, w, 3), 255, np.uint8)
    heights = np.asarray(counts, float)
    top = max(float(heights.max(initial=0)), 1e-9)
    edges = np.linspace(LEFT, w - 10, len(heights) + 1).round().astype(int)
    rows = (h - 20 - heights / top * (h - 50)).round().astype(int)
    for i in np.flatnonzero(heights):
        corners = (int(edges[i]), int(rows[i])), (int(edges[i + 1]) - 2, h - 20)
        cv2.rectangle(canvas, *corners, COLOURS[0], cv2.FILLED)
    if heights.any():
        mean = round(h - 20 - heights[heights > 0].mean() / top * (h - 50))
        cv2.line(canvas, (LEFT, mean), (w - 10, mean), BLACK, 1)
        _write_text(canvas, f"{top:.4g}", (4, 34))
        _write_text(canvas, f"{len(heights) - 1}", (w - 40, h - 6))
    _write_text(canvas, "0", (LEFT, h - 6))
    _write_text(canvas, title, (LEFT, 16), size=0.45)
    _write_png(path, canvas)


def _write_text(
    canvas: Frame, text: str, at: tuple[int, int], colour: Colour = BLACK, size: float = 0.4
) -> None:
    cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def _write_png(path: Path, canvas: Frame) -> None:
    """Through Python's own files: OpenCV fails silently, and on Windows only takes ASCII names."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", canvas)[1].tobytes())
    except OSError as error:
        raise RecipeError(
            f"picture {path} could not be written: {error}; free some room on the disk"
        ) from None
