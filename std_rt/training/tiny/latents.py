"""Latents of all training pictures, made once: artworks with content versions, photos with styles.

There are two kinds of samples, each a triple of latents (target z, content version c, style s):

* ``art``        z = an artwork, c = its content version, s = another variant of the same artwork
* ``generated``  z = a photo in a generated style, c = the photo, s = another photo in that style
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.models.style_encoder import StyleEncoder
from std_rt.training.data.picture_set import Frame, PictureSet
from std_rt.training.distil.bank import Shape
from std_rt.training.distil.base import Base, Fresh, StyleCode
from std_rt.training.run.checkpoint import whole_file
from std_rt.training.run.recipe import LatentsConfig
from std_rt.training.run.sheet import to_tensor
from std_rt.training.tiny.generated_styles import content_version, draw_style
from std_rt.training.tiny.tiny_pipeline import random_time_ids

STYLE_LATENTS = 28  # side of the style crops in latent pixels: 224 px


@dataclass(frozen=True)
class Triple:
    """One stored training sample, fp16: ``z`` and ``c`` aligned ``[C, h, w]``, ``s`` style latents."""

    z: Tensor
    c: Tensor
    s: tuple[Tensor, ...]


def variant(frame: Frame, rng: np.random.Generator, low_px: int = 256, high_px: int = 400) -> Frame:
    """Random scale and mirror.

    The short side is ``low_px`` to ``high_px``, at most the picture's own unless that is below ``low_px``;
    sides divide by 8 and end at 640 px.
    """
    h, w = frame.shape[:2]
    short = int(rng.integers(low_px, max(low_px + 1, min(high_px, min(h, w)) + 1)))
    scale = short / min(h, w)
    size = (max(1, min(round(w * scale / 8), 80)) * 8, max(1, min(round(h * scale / 8), 80)) * 8)
    out = cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return np.ascontiguousarray(out[:, ::-1] if rng.random() < 0.5 else out)


def _art_frames(art: PictureSet, photos: PictureSet, index: int, seed: int) -> list[Frame]:
    rng = np.random.default_rng((seed, index, 1))
    z, other = variant(art.frames[index], rng), variant(art.frames[index], rng)
    return [z, content_version(z, photos.frames[photos.draw(rng)], rng), other]


def _generated_frames(art: PictureSet, photos: PictureSet, index: int, seed: int) -> list[Frame]:
    rng = np.random.default_rng((seed, index, 2))
    source = art.frames[art.draw(rng)] if rng.random() < 0.65 else None
    _, style = draw_style(rng, source)
    c = variant(photos.frames[index % len(photos.frames)], rng)
    other = variant(photos.frames[photos.draw(rng)], rng)[:288, :288]
    return [style(c, rng), c, style(other, rng)]


@torch.no_grad()
def _encode(vae: AutoencoderPixelShuffle, frame: Frame, bf16: bool) -> Tensor:
    frame = frame[: frame.shape[0] // 8 * 8, : frame.shape[1] // 8 * 8]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return vae.encode(to_tensor([frame])).latents[0].half()


def _triples(
    kind: str,
    make: Callable[[int, int], list[Frame]],
    count: int,
    vae: AutoencoderPixelShuffle,
    seed: int,
    bf16: bool,
) -> Iterator[Triple]:
    # Pictures are made in one thread (OpenCV leaves the interpreter lock) while this one encodes; more
    # threads than that only take the cores from each other.
    with ThreadPoolExecutor(1) as pool:
        waiting: list[Future[list[Frame]]] = []
        for index in track(range(count + 8), f"encoding {kind}"):
            if index < count:
                waiting.append(pool.submit(make, index, seed))
            if index < 8 or not waiting:
                continue
            z, c, *s = [_encode(vae, f, bf16) for f in waiting.pop(0).result()]
            yield Triple(z, c, tuple(s))


def build_latents(
    art: PictureSet,
    photos: PictureSet,
    vae: AutoencoderPixelShuffle,
    counts: dict[str, int],
    seed: int,
    bf16: bool = True,
) -> dict[str, list[Triple]]:
    """Make ``counts[kind]`` triples of each kind (art and generated go round the pictures in turn)."""
    makers: dict[str, Callable[[int, int], list[Frame]]] = {
        "art": lambda i, s: _art_frames(art, photos, i % len(art.frames), s + i // len(art.frames)),
        "generated": lambda i, s: _generated_frames(art, photos, i, s),
    }
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(max(1, threads[0] - 1))
    cv2.setNumThreads(1)
    try:
        return {k: list(_triples(k, makers[k], counts[k], vae, seed, bf16)) for k in makers if counts.get(k)}
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def save_latents(latents: dict[str, list[Triple]], path: Path, made_from: str = "") -> None:
    """Write all triples to one safetensors file; ``made_from`` describes their sources."""
    flat = {}
    for kind, triples in latents.items():
        for i, triple in enumerate(triples):
            for name, value in (
                ("z", triple.z),
                ("c", triple.c),
                *((f"s{j}", s) for j, s in enumerate(triple.s)),
            ):
                flat[f"{kind}/{i:06d}/{name}"] = value.contiguous()
    with whole_file(path) as partial:
        save_file(flat, partial, {"made_from": made_from})


def latents_made_from(path: Path) -> str | None:
    """The ``made_from`` of a file by `save_latents`; None if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as stored:
            return str((stored.metadata() or {}).get("made_from", ""))
    except (SafetensorError, OSError):
        return None


def load_latents(path: Path) -> dict[str, list[Triple]]:
    """Read a file by `save_latents`; RecipeError if it is missing or damaged."""
    if latents_made_from(path) is None:
        raise RecipeError(f"{path} is missing or damaged; delete it and run the teacher's recipe again")
    groups: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, value in load_file(path).items():
        kind, index, name = key.split("/")
        groups.setdefault(kind, {}).setdefault(index, {})[name] = value
    return {
        kind: [
            Triple(t["z"], t["c"], tuple(t[n] for n in sorted(t) if n.startswith("s")))
            for _, t in sorted(items.items())
        ]
        for kind, items in groups.items()
    }


def _crop(x: Tensor, y: int, x0: int, side: int) -> Tensor:
    return x[:, y : y + side, x0 : x0 + side]


def _random_window(x: Tensor, side: int, rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(0, x.shape[1] - side + 1)), int(rng.integers(0, x.shape[2] - side + 1))


def random_crop_of(x: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """A random ``side`` x ``side`` window of ``x [C, h, w]``, fp32."""
    return _crop(x, *_random_window(x, side, rng), side).float()


def draw_triples(
    latents: dict[str, list[Triple]],
    shares: dict[str, float],
    batch: int,
    side: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of crops: z and c ``[B, C, side, side]``, style ``[B, C, 28, 28]``, all fp32."""
    kinds = [k for k in latents if shares.get(k, 0) > 0]
    p = np.array([shares[k] for k in kinds])
    rows = []
    for kind in rng.choice(kinds, size=batch, p=p / p.sum()):
        triple = latents[kind][int(rng.integers(len(latents[kind])))]
        y, x = _random_window(triple.z, side, rng)
        style = triple.s[int(rng.integers(len(triple.s)))]
        crop = _crop(style, *_random_window(style, STYLE_LATENTS, rng), STYLE_LATENTS)
        rows.append((_crop(triple.z, y, x, side), _crop(triple.c, y, x, side), crop))
    z, c, s = (torch.stack(column).float() for column in zip(*rows, strict=True))
    return z, c, s


class TripleSource:
    """The data of a distillation of std-tiny: crops of stored latents, each process with its own share."""

    def __init__(self, config: LatentsConfig, base: Base, seed: int, rank: int = 0, world: int = 1) -> None:
        assert isinstance(base.style_encoder, StyleEncoder), "stored latents belong to a std-tiny"
        self.config, self.base, self.style_encoder = config, base, base.style_encoder
        stored = load_latents(Path(config.file))
        self.latents = {kind: triples[rank::world] or triples for kind, triples in stored.items()}
        self.rng = np.random.default_rng((seed, rank, 7))
        self.shapes: list[Shape] = [(config.side, config.side)]
        self.weights = np.ones(1)

    @torch.no_grad()
    def take(self, n: int, shape: Shape) -> Fresh:
        """``n`` new samples; styles are encoded here, once per trajectory."""
        rows = [self._one(shape[0]) for _ in range(n)]
        z, c, real, s = (torch.stack(column) for column in zip(*rows, strict=True))
        tokens, pooled = self.style_encoder.encode_latents(s.to(next(self.style_encoder.parameters())))
        style = StyleCode(tokens.float().cpu(), pooled.float().cpu())
        return Fresh(z, c, real, self.base.condition(None, style, random_time_ids(n, self.rng)))

    def _one(self, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Target, content, real and style latents of one sample."""
        if self.rng.random() < self.config.paired:
            share = self.config.share_art
            shares = {"art": share, "generated": 1 - share}
            z, c, s = draw_triples(self.latents, shares, 1, side, self.rng)
            return z[0], c[0], z[0], s[0]
        return self._unpaired(side)

    def _unpaired(self, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A photo under an unrelated style, as in use.

        No target is known: the photo stands for it, and the style picture is the discriminator's real one.
        """
        photo = self._draw("generated").c
        other = self._draw("art" if self.rng.random() < self.config.share_art else "generated").s[0]
        style = random_crop_of(other, STYLE_LATENTS, self.rng)
        content = random_crop_of(photo, side, self.rng)
        return content, content, random_crop_of(style, side, self.rng), style

    def _draw(self, kind: str) -> Triple:
        triples = self.latents.get(kind) or next(iter(self.latents.values()))
        return triples[int(self.rng.integers(len(triples)))]

    def state(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state}

    def load_state(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]

    def close(self) -> None:
        """Nothing is open."""
