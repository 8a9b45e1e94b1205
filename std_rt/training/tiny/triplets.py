"""Triplets (photo, style picture, stylized photo): a folder layout that users can bring.

    content/NAME.jpg    the photo
    style/NAME.jpg      the style picture, of any size
    stylized/NAME.png   the photo in that style, pixel for pixel over the photo
    metadata.csv        optional: name, teacher, style_distance, content_distance, photo, art

Files of one name (any suffix that pictures have) belong together. ``tools/make_triplets.py`` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from std_rt.core.errors import RecipeError
from std_rt.training.data.picture_set import SUFFIXES, Frame, random_crop, read_picture

FOLDERS = ("content", "style", "stylized")


@dataclass(frozen=True)
class Triplet:
    """The files of one triplet."""

    name: str
    content: Path
    style: Path
    stylized: Path


def _by_name(folder: Path) -> dict[str, Path]:
    # Hidden files are ones still being written.
    files = folder.glob("*") if folder.is_dir() else []
    return {p.stem: p for p in files if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")}


def find_triplets(folder: str | Path) -> list[Triplet]:
    """All complete triplets of a folder, sorted by name; RecipeError where there are none."""
    content, style, stylized = (_by_name(Path(folder) / name) for name in FOLDERS)
    names = sorted(content.keys() & style.keys() & stylized.keys())
    if not names:
        raise RecipeError(
            f"no triplets in {folder}: content/, style/ and stylized/ must hold pictures of equal names; "
            "tools/make_triplets.py makes some"
        )
    return [Triplet(n, content[n], style[n], stylized[n]) for n in names]


class TripletSet:
    """All triplets of a folder in memory (uint8; 256 to 384 px: about 0.9 MB each), cropped at random."""

    def __init__(self, folder: str | Path, min_px: int) -> None:
        self.items: list[tuple[Frame, Frame, Frame]] = []
        for found in track(find_triplets(folder), f"reading {folder}", transient=True):
            content, style, stylized = map(read_picture, (found.content, found.style, found.stylized))
            if content is None or style is None or stylized is None:
                continue
            if content.shape == stylized.shape and min(content.shape[:2]) >= min_px:
                self.items.append((content, style, stylized))
        if not self.items:
            raise RecipeError(
                f"no triplet in {folder} has a photo of {min_px} px or more and a stylized one of its size"
            )

    def draw(self, crop_px: int, style_px: int, rng: np.random.Generator) -> tuple[Frame, Frame, Frame]:
        """Photo, style, stylized photo: first and last cropped alike, sides ``crop_px`` and ``style_px``.

        Only small style pictures are resized, so that strokes keep their size relative to the style's.
        """
        content, style, stylized = self.items[int(rng.integers(len(self.items)))]
        y, x = (int(rng.integers(0, side - crop_px + 1)) for side in content.shape[:2])
        window = slice(y, y + crop_px), slice(x, x + crop_px)
        a, b = content[window], stylized[window]
        if rng.random() < 0.5:
            a, b = a[:, ::-1], b[:, ::-1]
        return np.ascontiguousarray(a), _style_crop(style, style_px, rng), np.ascontiguousarray(b)


def _style_crop(style: Frame, side_px: int, rng: np.random.Generator) -> Frame:
    short = min(style.shape[:2])
    if short < side_px:
        scale = side_px / short
        style = cv2.resize(style, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    return random_crop(style, side_px, rng, min_scale=1.0) if min(style.shape[:2]) > side_px else style
