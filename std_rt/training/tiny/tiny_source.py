"""What a distillation of std-tiny draws from: the teacher's stored latents instead of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from std_rt.training.distil.bank import Shape
from std_rt.training.distil.base import Base, Conditioning
from std_rt.training.run.recipe import LatentsConfig
from std_rt.training.tiny.latents import STYLE_LATENTS, Triple, draw_triples, load_latents, random_crop_of
from std_rt.training.tiny.teacher import random_time_ids

__all__ = ["Fresh", "TripleSource"]


@dataclass(frozen=True)
class Fresh:
    """New samples: where trajectories end and start, what is real, and what they are conditioned on."""

    z: Tensor  # [n, C, h, w] the end, as far as it is known: without a known target the content itself
    c: Tensor  # [n, C, h, w] the content that a trajectory starts from
    real: Tensor  # [n, C, h, w] what the discriminator takes for real
    cond: Conditioning


class TripleSource:
    """Crops of stored (target, content, style) latents; each process has its own share of them."""

    def __init__(self, config: LatentsConfig, base: Base, seed: int, rank: int = 0, world: int = 1) -> None:
        assert base.style_encoder is not None, "stored latents belong to a base with a style encoder"
        self.config, self.base, self.style_encoder = config, base, base.style_encoder
        stored = load_latents(Path(config.file))
        self.latents = {kind: triples[rank::world] or triples for kind, triples in stored.items()}
        self.rng = np.random.default_rng((seed, rank, 7))
        self.shapes: list[Shape] = [(config.side, config.side)]
        self.weights = np.ones(1)

    @torch.no_grad()
    def take(self, n: int, shape: Shape) -> Fresh:
        """``n`` new samples; styles are encoded here, once a trajectory."""
        rows = [self._one(shape[0]) for _ in range(n)]
        z, c, real, s = (torch.stack(column) for column in zip(*rows, strict=True))
        tokens, pooled = self.style_encoder.encode_latents(s.to(next(self.style_encoder.parameters())))
        ids = random_time_ids(n, self.rng)
        return Fresh(z, c, real, self.base.styled(tokens.float().cpu(), pooled.float().cpu(), ids))

    def _one(self, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Target, content, real and style latents of one sample."""
        if self.rng.random() < self.config.paired:
            share = self.config.share_art
            shares = {"art": share, "generated": 1 - share}
            z, c, s = draw_triples(self.latents, shares, 1, side, self.rng)
            return z[0], c[0], z[0], s[0]
        return self._unpaired(side)

    def _unpaired(self, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A photo under a style that has nothing to do with it, as in use.

        No target is known: what forward noising has is the photo, and what is real is the style picture.
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
