"""Make training triplets (photo, style picture, stylized photo) from pretrained style transfer networks.

    python -m tools.make_triplets --photos PHOTOS --art ART --out TRIPLETS --count 2000 \
        [--photos-per-style 6] [--adain adain_vgg19.safetensors] [--microast FILE] \
        [--fixed FILE] [--cd-wct FILE] [--magenta FOLDER] [--destylizer PIPELINE]

The folder written is a triplet data set as training reads it, and users can bring their own in its layout:

    content/NAME.jpg    the photo
    style/NAME.jpg      the style picture (any size)
    stylized/NAME.png   the photo in that style, pixel for pixel over content/NAME.jpg
    metadata.csv        optional columns: name, teacher, style_distance, content_distance, photo, art

A file may be .jpg, .png or .webp; equal names (without the suffix) belong together.

For each triplet a photo is drawn, and for one or more in a row (--photos-per-style) a teacher by its share
and an artwork by weight. Several crops of the artwork at different scales are tried; the best by VGG style
plus content distance is kept, and none where even that one is poor. VGG weights come from the --adain file.
Without it one crop is tried and kept unjudged, which is far faster. Triplet i depends only on the options and
i, so a run that was stopped goes on where it was, and gives the same files.

A destylizer (training/std_tiny_destylizer.toml) makes triplets with real paint as their target: an artwork
without its style, another crop of the artwork, and the artwork itself.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from std_rt.models.perceptual import SqueezeNet, Vgg, content_distance, load_perceptual, style_distance
from std_rt.training.data.picture_set import Frame, load_pictures
from std_rt.training.run.sheet import to_frames, to_tensor
from std_rt.training.tiny.generated_styles import draw_style
from std_rt.training.tiny.tiny_pipeline import load_tiny
from std_rt.training.tiny.trajectories import sample
from tools.teachers import AdaIn, CdWct, Magenta, MicroAst, Teacher, load_fixed

SIDES_PX = (256, 288, 320, 352, 384)
JUDGE_PX = 192
COLUMNS = ("name", "teacher", "style_distance", "content_distance", "photo", "art")
SHARES = {
    "microast": 0.46, "adain": 0.11, "swap": 0.18, "magenta": 0.06, "fixed": 0.06, "cd_wct": 0.05,
    "generated": 0.08, "destylized": 0.3,
}  # fmt: skip
# Largest (style, content) distances kept. WCT breaks the drawing on a third of all pairs. A style picture of
# a fixed or generated style is another photo in it, so that both distances are larger there and say less.
LIMITS = {"cd_wct": (0.6, 0.95), "fixed": (0.6, 1.8), "generated": (0.7, 1.8)}
LIMIT = (0.55, 1.2)


@dataclass(frozen=True)
class Made:
    """One candidate; pictures ``[1, 3, H, W]`` RGB in [-1, 1]."""

    teacher: str
    photo: Tensor
    style: Tensor
    stylized: Tensor
    style_distance: float
    content_distance: float

    @property
    def score(self) -> float:
        return self.style_distance + 0.5 * self.content_distance

    @property
    def good(self) -> bool:
        kind = self.teacher.split(":")[0]
        most_style, most_content = LIMITS.get(kind, LIMIT)
        # Written so that what was not judged is good.
        return not (self.style_distance > most_style or self.content_distance > most_content)


def square(frame: Frame, side_px: int, scale: float, rng: np.random.Generator) -> Tensor:
    """Random square crop of ``scale`` times the short side, resized to ``side_px``, mirrored by chance."""
    h, w = frame.shape[:2]
    side = max(64, min(round(min(h, w) * scale), h, w))
    y, x = int(rng.integers(0, h - side + 1)), int(rng.integers(0, w - side + 1))
    shrinks = side >= side_px
    crop = cv2.resize(
        frame[y : y + side, x : x + side],
        (side_px, side_px),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC,
    )
    return to_tensor([np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)])


def _features(vgg: Vgg | SqueezeNet, picture: Tensor) -> list[Tensor]:
    """At one size for all, so that scores can be compared."""
    return vgg(F.interpolate(picture, (JUDGE_PX, JUDGE_PX), mode="area"))


class Maker:
    """Teachers, pictures and the judge."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.vgg = load_perceptual(args.adain) if args.adain else None
        makers: dict[str, tuple[str | None, Callable[[str], Teacher]]] = {
            "adain": (args.adain, AdaIn),
            "swap": (args.adain, lambda path: AdaIn(path, swap=0.7)),
            "microast": (args.microast, MicroAst),
            "cd_wct": (args.cd_wct, CdWct),
            "magenta": (args.magenta, Magenta),
        }
        self.teachers = {name: make(path) for name, (path, make) in makers.items() if path}
        self.fixed = load_fixed(args.fixed) if args.fixed else {}
        self.destylizer = load_tiny(args.destylizer) if args.destylizer else None
        known = {*self.teachers, *({"fixed"} if self.fixed else ())}
        if known or not self.destylizer:  # a destylizer alone makes real paint only
            known.add("generated")
        if self.destylizer:
            known.add("destylized")
        self.kinds = [k for k in SHARES if k in known]
        weights = np.array([SHARES[k] for k in self.kinds])
        self.weights = weights / weights.sum()
        self.photos = load_pictures(args.photos, args.sources, 128)
        self.art = load_pictures(args.art, args.sources, 128)
        self.seed, self.sides, self.style_px = args.seed, args.sides, args.style_px
        self.candidates = args.candidates if self.vgg else 1
        self.photos_per_style = args.photos_per_style

    def _judge(self, kind: str, photo: Tensor, styled: list[tuple[Tensor, Tensor]]) -> list[Made]:
        """Distances of all candidates (style, stylized) of one photo; not a number without VGG."""
        if self.vgg is None:
            return [Made(kind, photo, *pair, math.nan, math.nan) for pair in styled]
        content = _features(self.vgg, photo)[-1]
        made = []
        for style, stylized in styled:
            s, x = _features(self.vgg, style), _features(self.vgg, stylized)
            distances = float(style_distance(x, s)), float(content_distance(x[-1], content))
            made.append(Made(kind, photo, style, stylized, *distances))
        return made

    def _candidates(self, kind: str, photo: Tensor, art: Frame, rng: np.random.Generator) -> list[Made]:
        """The photo in several crops of the artwork; in half as many by the teachers that run VGG."""
        count = max(1, self.candidates // (2 if kind in ("adain", "swap") else 1))
        side = max(photo.shape[-1], self.style_px)
        styles = [square(art, side, scale, rng) for scale in rng.uniform(0.4, 1.0, count)]
        teacher = self.teachers[kind]
        return self._judge(kind, photo, [(s, teacher((photo + 1) / 2, (s + 1) / 2) * 2 - 1) for s in styles])

    def _fixed(self, photo: Tensor, other: Tensor, rng: np.random.Generator) -> list[Made]:
        """Two photos in one fixed style, one of which serves as the style picture."""
        name = list(self.fixed)[int(rng.integers(len(self.fixed)))]
        stylized, style = (self.fixed[name]((x + 1) / 2, x) * 2 - 1 for x in (photo, other))
        return self._judge(f"fixed:{name}", photo, [(style, stylized)])

    def _generated(self, photo: Tensor, other: Tensor, rng: np.random.Generator) -> list[Made]:
        """Two photos in one drawn style (halftone, glass, ink, ...): exact, and free of any teacher."""
        source = self.art.frames[self.art.draw(rng)] if rng.random() < 0.6 else None
        name, apply = draw_style(rng, source)
        style, stylized = (to_tensor([apply(to_frames(x)[0], rng)]) for x in (other, photo))
        return self._judge(f"generated:{name}", photo, [(style, stylized)])

    def _destylized(
        self, art: Frame, side: int, rng: np.random.Generator, at: np.random.Generator
    ) -> list[Made]:
        """A crop of an artwork as the target, and the same without its style as the photo."""
        assert self.destylizer is not None
        style = square(art, max(side, self.style_px), rng.uniform(0.5, 1.0), rng)
        target = square(art, side, at.uniform(0.5, 1.0), at)
        return self._judge(
            "destylized", sample(self.destylizer, target, None, 2).clamp(-1, 1), [(style, target)]
        )

    @torch.no_grad()
    def make(self, number: int) -> tuple[Made, str, str] | None:
        """Triplet ``number`` with the names of its sources, or None where no candidate is good enough."""
        rng = np.random.default_rng([self.seed, number // self.photos_per_style])
        of_photo = np.random.default_rng([self.seed, number, 1])
        kind = self.kinds[int(rng.choice(len(self.kinds), p=self.weights))]
        side = int(rng.choice(self.sides))
        at = self.photos.draw(of_photo)
        photo = square(self.photos.frames[at], side, of_photo.uniform(0.6, 1.0), of_photo)
        if kind in ("fixed", "generated"):
            other = self.photos.draw(rng)
            make = self._fixed if kind == "fixed" else self._generated
            made = make(photo, square(self.photos.frames[other], max(side, self.style_px), 1.0, rng), rng)
            source = self.photos.names[other]
        else:
            drawn = self.art.draw(rng)
            source, art = self.art.names[drawn], self.art.frames[drawn]
            if kind == "destylized":
                made = self._destylized(art, side, rng, of_photo)
            else:
                made = self._candidates(kind, photo, art, rng)
        best = min(made, key=lambda m: m.score)
        names = source if kind == "destylized" else self.photos.names[at], source
        return (best, *names) if best.good else None


def write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def write(out: Path, name: str, made: Made) -> None:
    """Three files; the stylized one, which marks the triplet as done, comes last."""
    jpeg = [cv2.IMWRITE_JPEG_QUALITY, 95]
    for folder, suffix, picture, options in (
        ("content", ".jpg", made.photo, jpeg),
        ("style", ".jpg", made.style, jpeg),
        ("stylized", ".png", made.stylized, []),
    ):
        bgr = cv2.cvtColor(to_frames(picture)[0], cv2.COLOR_RGB2BGR)
        write_atomically(out / folder / f"{name}{suffix}", cv2.imencode(suffix, bgr, options)[1].tobytes())


def known_rows(path: Path) -> dict[str, dict[str, str]]:
    """Rows of the metadata file by name; triplets that were dropped have an empty teacher.

    A last line that a stopped run left unfinished is cut off.
    """
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    with path.open(encoding="utf-8", newline="") as f:
        return {row["name"]: row for row in csv.DictReader(f)}


def make_all(maker: Maker, out: Path, numbers: range) -> None:
    """Make what is missing; a line of metadata for each, also for dropped ones, which are not tried again."""
    for folder in ("content", "style", "stylized"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    path = out / "metadata.csv"
    known = known_rows(path)
    new = not path.exists() or not path.stat().st_size
    with path.open("a", encoding="utf-8", newline="") as f:
        table = csv.DictWriter(f, COLUMNS)
        if new:
            table.writeheader()
        for number in numbers:
            name = f"{number:06d}"
            if name in known:
                continue
            made = maker.make(number)
            row = dict.fromkeys(COLUMNS, "") | {"name": name}
            if made is not None:
                best, photo, art = made
                write(out, name, best)
                row |= {"teacher": best.teacher, "photo": photo, "art": art}
                if maker.vgg is not None:
                    row |= {k: f"{getattr(best, k):.4f}" for k in ("style_distance", "content_distance")}
            table.writerow(row)
            f.flush()
            print(", ".join(row.values()), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", required=True, help="folder of photos")
    parser.add_argument("--art", required=True, help="folder of style pictures")
    parser.add_argument("--sources", default="", help="CSV with the columns file, group, for even sampling")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--adain", help="VGG-19, the judge, and the AdaIN decoder (safetensors)")
    parser.add_argument("--microast", help="safetensors")
    parser.add_argument("--cd-wct", help="safetensors")
    parser.add_argument("--fixed", help="feed-forward styles (safetensors)")
    parser.add_argument("--magenta", help="folder with the predict and transform ONNX files")
    parser.add_argument("--destylizer", type=Path, help="pipeline folder trained with reverse = true")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES_PX, help="of photos, in pixels")
    parser.add_argument("--style-px", type=int, default=256, help="least side of a style picture")
    parser.add_argument("--candidates", type=int, default=2, help="style crops tried for a triplet")
    parser.add_argument("--photos-per-style", type=int, default=1, help="triplets that share a style picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    make_all(Maker(args), args.out, range(args.count))


if __name__ == "__main__":
    main()
