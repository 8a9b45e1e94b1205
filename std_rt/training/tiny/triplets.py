"""Triplets (photo, style picture, stylized photo): a folder layout that users can bring.

    content/NAME.jpg    the photo
    style/NAME.jpg      the style picture, of any size
    stylized/NAME.png   the photo in that style, pixel for pixel over the photo
    metadata.csv        optional: name, teacher, style_distance, content_distance, photo, art

Files of one name (any suffix that pictures have) belong together. ``tools/make_triplets.py`` writes it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.training.data.picture_set import SUFFIXES, Frame, random_crop, read_picture
from std_rt.training.distil.bank import Shape
from std_rt.training.distil.base import Base, Fresh
from std_rt.training.run.recipe import StylistConfig, TripletsConfig
from std_rt.training.run.sheet import to_tensor
from std_rt.training.tiny.generated_styles import draw_style
from std_rt.training.tiny.tiny_pipeline import random_time_ids

FOLDERS = ("content", "style", "stylized")

_OWN_PALETTE = 0.3  # share of the generated styles that take an artwork's colours

Item = tuple[Frame, Frame, Frame]  # photo, style and stylized photo


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
    """All triplets of a folder in memory (uint8; 256 to 384 px: about 0.9 MB each), cropped at random.

    Equal style pictures are kept once. ``reverse``: the stylized picture stands for the photo, and the photo
    for its stylized form.
    """

    def __init__(self, folder: str | Path, min_px: int, reverse: bool = False) -> None:
        self.items: list[Item] = []
        styles: dict[bytes, Frame] = {}
        for found in track(find_triplets(folder), f"reading {folder}", transient=True):
            content, style, stylized = map(read_picture, (found.content, found.style, found.stylized))
            if content is None or style is None or stylized is None:
                continue
            if content.shape == stylized.shape and min(content.shape[:2]) >= min_px:
                style = styles.setdefault(sha256(style.tobytes()).digest(), style)
                self.items.append((stylized, style, content) if reverse else (content, style, stylized))
        if not self.items:
            raise RecipeError(
                f"no triplet in {folder} has a photo of {min_px} px or more and a stylized one of its size"
            )

    def by_style(self) -> list[list[Item]]:
        """The triplets of each style picture."""
        groups: dict[int, list[Item]] = {}
        for item in self.items:
            groups.setdefault(id(item[1]), []).append(item)
        return list(groups.values())

    def any(self, rng: np.random.Generator) -> Item:
        """One triplet, whole."""
        return self.items[int(rng.integers(len(self.items)))]


def crop_pair(item: Item, side_px: int, rng: np.random.Generator) -> tuple[Frame, Frame]:
    """A square of photo and stylized photo at the same place, mirrored half the time."""
    content, _, stylized = item
    y, x = (int(rng.integers(0, side - side_px + 1)) for side in content.shape[:2])
    window = slice(y, y + side_px), slice(x, x + side_px)
    turn = -1 if rng.random() < 0.5 else 1
    a, b = (np.ascontiguousarray(picture[window][:, ::turn]) for picture in (content, stylized))
    return a, b


def crop_style(style: Frame, side_px: int, rng: np.random.Generator) -> Frame:
    """A square of a style picture.

    Only small ones are resized, so that strokes keep their size relative to those of the stylized photo.
    """
    short = min(style.shape[:2])
    if short < side_px:
        scale = side_px / short
        style = cv2.resize(style, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    whole = style.shape[:2] == (side_px, side_px)
    return style if whole else random_crop(style, side_px, rng, min_scale=1.0)


@dataclass(frozen=True)
class Pictures:
    """One step's crops, uint8 ``[B, H, W, 3]``; of the photos each few in a row belong to one style."""

    style: Tensor
    content: Tensor
    target: Tensor


class StylistData:
    """Triplets, several of a style at a time; the last styles are generated, if any."""

    def __init__(self, config: StylistConfig) -> None:
        """Read everything into memory. Raises RecipeError."""
        self.config = config
        self.groups = TripletSet(config.triplets, config.crop_px, config.reverse).by_style()

    def draw(self, step: int) -> Pictures:
        """The crops of a step, from random numbers of its own: so steps can be drawn in any order."""
        config, rng = self.config, np.random.default_rng([self.config.seed, step])
        styles, pairs = [], []
        for i in range(config.styles):
            group = self.groups[int(rng.integers(len(self.groups)))]
            style = crop_style(group[0][1], config.style_px, rng)
            chosen = rng.choice(len(group), config.photos, replace=len(group) < config.photos)
            crops = [crop_pair(group[n], config.crop_px, rng) for n in chosen]
            if i >= config.styles - config.generated_styles:
                style, crops = self._generated(style, [content for content, _ in crops], rng)
            styles.append(style)
            pairs += crops
        return Pictures(_stacked(styles), *(_stacked(column) for column in zip(*pairs, strict=True)))

    def _generated(
        self, art: Frame, contents: Sequence[Frame], rng: np.random.Generator
    ) -> tuple[Frame, list[tuple[Frame, Frame]]]:
        """A random style on another photo, and on ``contents``; at times with the palette of ``art``."""
        _, draw = draw_style(rng, art if rng.random() < _OWN_PALETTE else None)
        group = self.groups[int(rng.integers(len(self.groups)))]
        other = crop_style(group[int(rng.integers(len(group)))][0], self.config.style_px, rng)
        return draw(other, rng), [(content, draw(content, rng)) for content in contents]

    def ahead(self, start: int) -> Iterator[Pictures]:
        """The crops of every step from ``start`` on, a few of them drawn ahead in threads."""
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        with ThreadPoolExecutor(workers, "std-rt-draw") as pool:
            waiting = deque(pool.submit(self.draw, start + i) for i in range(2 * workers))
            try:
                for step in count(start + len(waiting)):
                    yield waiting.popleft().result()
                    waiting.append(pool.submit(self.draw, step))
            finally:
                pool.shutdown(cancel_futures=True)


def _stacked(frames: Sequence[Frame]) -> Tensor:
    return torch.from_numpy(np.stack(frames))


class TripletSource:
    """The data of a distillation of std-tiny: crops of triplets, each process with its own share."""

    def __init__(self, config: TripletsConfig, base: Base, seed: int, rank: int = 0, world: int = 1) -> None:
        self.config, self.base = config, base
        self.triplets = TripletSet(config.folder, config.side * base.vae_scale)
        self.triplets.items = self.triplets.items[rank::world] or self.triplets.items
        self.rng = np.random.default_rng((seed, rank, 7))
        self.shapes: list[Shape] = [(config.side, config.side)]
        self.weights = np.ones(1)

    @torch.no_grad()
    def take(self, n: int, shape: Shape) -> Fresh:
        """``n`` new samples, encoded here, once per trajectory.

        The share ``paired`` ends in a known picture. The others are photos under unrelated styles, as in use:
        the photo stands for the target, and a crop of the style picture is the discriminator's real one.
        """
        side = shape[0] * self.base.vae_scale
        rows = [self._one(side) for _ in range(n)]
        device = next(self.base.vae.parameters()).device
        z, c, real, style = (to_tensor(list(column)).to(device) for column in zip(*rows, strict=True))
        z, c, real = (self.base.encode(x).cpu() for x in (z, c, real))
        ids = random_time_ids(n, self.rng)
        return Fresh(z, c, real, self.base.condition(None, self.base.look(style), ids, c).to("cpu"))

    def _one(self, side_px: int) -> tuple[Frame, Frame, Frame, Frame]:
        """Target, content, real and style pictures of one sample."""
        item = self.triplets.any(self.rng)
        photo, stylized = crop_pair(item, side_px, self.rng)
        paired = self.rng.random() < self.config.paired
        style = crop_style((item if paired else self.triplets.any(self.rng))[1], self.base.style_px, self.rng)
        if paired:
            return stylized, photo, stylized, style
        return photo, photo, random_crop(style, side_px, self.rng, min_scale=1.0), style

    def state(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state}

    def load_state(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]

    def close(self) -> None:
        """Nothing is open."""
