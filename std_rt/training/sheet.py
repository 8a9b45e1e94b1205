"""Contact sheets and loss curves: what a person looks at instead of a log."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from std_rt.training.arrays import Frame


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


def save_sheet(path: Path, rows: list[list[Frame]], gap_px: int = 4) -> None:
    """Write rows of equally sized frames as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    padded = [
        np.concatenate([np.pad(f, ((0, gap_px), (0, gap_px), (0, 0)), constant_values=255) for f in row], 1)
        for row in rows
    ]
    cv2.imwrite(str(path), cv2.cvtColor(np.concatenate(padded, 0), cv2.COLOR_RGB2BGR))


def save_curve(path: Path, values: list[float], title: str, size_px: tuple[int, int] = (640, 280)) -> None:
    """Write a loss curve (log scale, running mean) as a PNG."""
    w, h = size_px
    canvas = np.full((h, w, 3), 255, np.uint8)
    if len(values) >= 2:
        width = max(1, len(values) // 100)
        smooth = np.convolve(np.log(np.maximum(values, 1e-9)), np.ones(width) / width, "valid")
        low, high = float(smooth.min()), float(max(smooth.max(), smooth.min() + 1e-6))
        xs = np.linspace(60, w - 10, len(smooth))
        ys = h - 30 - (smooth - low) / (high - low) * (h - 60)
        cv2.polylines(canvas, [np.stack([xs, ys], -1).astype(np.int32)], False, (40, 90, 200), 2, cv2.LINE_AA)
        for value, y in ((high, 30), (low, h - 30)):
            cv2.putText(canvas, f"{np.exp(value):.4g}", (4, y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1)
    cv2.putText(canvas, title, (60, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), canvas)
