"""Pictures of a folder, read once into memory, drawn by weight and cropped at random.

OpenCV's stubs return an array of "integer or floating", which fits no precise type; so the array types here
say what is meant, not what is checked.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from std_rt.core.errors import RecipeError

Frame = NDArray[Any]  # uint8 [H, W, 3] RGB
Image = NDArray[Any]  # float32 in [0, 1]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one folder with their sampling weights (which sum to 1)."""

    names: list[str]
    frames: list[Frame]
    weights: NDArray[np.float64]

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.choice(len(self.frames), p=self.weights))


def picture_files(folder: Path) -> list[Path]:
    """Picture files of a folder, sorted; RecipeError if there is none."""
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise RecipeError(f"no pictures in {folder}; name a folder of pictures in the recipe")
    return files


def read_picture(path: Path) -> Frame | None:
    """Picture as uint8 ``[H, W, 3]`` RGB, or None if it is broken."""
    bgr = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    return None if bgr is None else cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _groups(sources: str) -> dict[str, str]:
    if not sources:
        return {}
    with Path(sources).open(encoding="utf-8", newline="") as f:
        return {Path(row["file"]).name: row["group"] for row in csv.DictReader(f)}


def load_pictures(folder: str, sources: str = "", min_px: int = 64) -> PictureSet:
    """Read a folder; broken or tiny pictures are left out and named.

    A picture weighs 1 / sqrt(size of its group), so that a large group of alike pictures (flowers,
    groceries) does not dominate and a small one is not repeated to death.
    """
    names, frames, broken = [], [], []
    for path in track(picture_files(Path(folder)), f"reading {folder}", transient=True):
        frame = read_picture(path)
        if frame is None or min(frame.shape[:2]) < min_px:
            broken.append(path.name)
            continue
        names.append(path.name)
        frames.append(frame)
    if broken:
        print(f"left out {len(broken)} broken or tiny pictures of {folder}: {', '.join(broken[:5])}")
    group = _groups(sources)
    count = Counter(group.get(n, "") for n in names)
    weights = np.array([count[group.get(n, "")] ** -0.5 for n in names])
    return PictureSet(names, frames, weights / weights.sum())


def random_crop(frame: Frame, size_px: int, rng: np.random.Generator, min_scale: float = 0.5) -> Frame:
    """Square crop of ``size_px`` at a random scale between ``min_scale`` and 1, mirrored half the time."""
    h, w = frame.shape[:2]
    scale = (
        rng.uniform(max(min_scale, size_px / min(h, w)), 1.0) if min(h, w) > size_px else size_px / min(h, w)
    )
    side = min(round(size_px / scale), h, w)
    y, x = int(rng.integers(0, h - side + 1)), int(rng.integers(0, w - side + 1))
    crop = frame[y : y + side, x : x + side]
    if side != size_px:
        crop = cv2.resize(crop, (size_px, size_px), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)
