"""The asymmetric adversarial loss (Single Trajectory Distillation, arXiv 2412.18945, section 3).

Fake is the student's ``x_s``, still noisy; real is the same item's ``z_0`` re-noised to a level r strictly
below s. Small heads judge frozen features of both. All losses are per sample, so that samples without a
pair (s is the clean end already) can be masked, and divide by the batch, so that the mean of two
half-batches is the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from std_rt.core.errors import RecipeError
from std_rt.training.distil.features import Features
from std_rt.training.distil.trajectory import CLEAN, Levels, randint

__all__ = [
    "Adversary",
    "Heads",
    "draw_real_index",
    "has_pair",
    "hinge_d",
    "hinge_g",
    "renoise",
]

Judge = Callable[[list[Tensor], Tensor], Tensor]
SLOPE = 0.2


class Head(nn.Module):
    """Judges the positions of one map, given a condition.

    The residual branch is normalised (per sample: batch statistics would tie samples together), the
    way around it is not, or a map of too little contrast would look like any other.
    """

    def __init__(self, channels: int, condition_dim: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 1)
        self.look = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.judge = nn.Conv2d(width, 1, 1)
        # No bias: a dropped condition (zeros) leaves the unconditional judgement alone.
        self.embed = nn.Linear(condition_dim, width, bias=False)

    def forward(self, x: Tensor, condition: Tensor, size: tuple[int, int]) -> Tensor:
        """``[B, C, fh, fw]`` -> logits ``[B, size[0] * size[1]]``: unconditional + projection."""
        h = F.leaky_relu(self.enter(x), SLOPE)
        h = h + F.leaky_relu(self.norm(self.look(h)), SLOPE)
        if h.shape[2:] != size:
            h = F.adaptive_avg_pool2d(h, size)
        # Projection discriminator (Miyato & Koyama 2018, arXiv 1802.05637).
        projection = torch.einsum("bw,bwij->bij", self.embed(condition), h) / h.shape[1] ** 0.5
        return (self.judge(h)[:, 0] + projection).flatten(1)


class Heads(nn.Module):
    """One head a feature map; all that the discriminator trains.

    Each map is judged at as many places as the coarsest has, so that each has an equal say. Runs in the
    precision of its weights (fp32) whatever autocast says: the R1 penalty differentiates it twice.
    """

    def __init__(self, channels: Sequence[int], condition_dim: int, width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(c, condition_dim, width) for c in channels)

    def forward(self, features: list[Tensor], condition: Tensor) -> Tensor:
        """Maps ``[B, ch, fh, fw]`` and ``[B, P]`` -> logits ``[B, maps * places]``, high where real."""
        dtype = next(self.parameters()).dtype
        size = (min(f.shape[2] for f in features), min(f.shape[3] for f in features))
        with torch.autocast(condition.device.type, enabled=False):
            maps = zip(self.heads, features, strict=True)
            return torch.cat([head(f.to(dtype), condition.to(dtype), size) for head, f in maps], 1)


def hinge_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``mean(relu(1 - real)) + mean(relu(1 + fake))`` per sample: ``[B, N]`` twice -> ``[B]``, fp32."""
    return F.relu(1 - real_logits.float()).mean(1) + F.relu(1 + fake_logits.float()).mean(1)


def hinge_g(fake_logits: Tensor) -> Tensor:
    """``-mean(fake)`` per sample: ``[B, N]`` -> ``[B]``, fp32."""
    return -fake_logits.float().mean(1)


def _squared_gradient(logits: Tensor, features: list[Tensor]) -> Tensor:
    """Per sample ``|d sum(logits) / d features|^2``, itself differentiable: ``[B]``.

    It is R1 (Mescheder et al. 2018, arXiv 1801.04406) on features, without its ``gamma / 2``.
    """
    # Samples do not meet in the heads, so one gradient of the batch's sum holds each sample's own.
    with torch.autocast(logits.device.type, enabled=False):
        gradients = torch.autograd.grad(logits.sum(), features, create_graph=True)
        return torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0)


def draw_real_index(s_index: Tensor, rng: torch.Generator, mode: str) -> Tensor:
    """Grid index r of the real latents for each s (LongTensors ``[B]`` on CPU).

    "below": uniform over ``-1..s-1``; where s is the clean end there is none, and -1 stands in (see
    ``has_pair``). "same": r = s, the symmetric loss it is compared with. Raises RecipeError on others.
    """
    if mode == "same":
        return s_index.clone()
    if mode != "below":
        raise RecipeError(f'adversarial.real = {mode!r} is neither "below" nor "same"')
    return randint(torch.full_like(s_index, CLEAN), s_index - 1, rng)


def has_pair(s_index: Tensor, mode: str) -> Tensor:
    """Which samples have a real level to be compared with: bool ``[B]``."""
    return s_index > CLEAN if mode == "below" else torch.ones_like(s_index, dtype=torch.bool)


def renoise(z: Tensor, index: Tensor, levels: Levels, noise: Tensor) -> Tensor:
    """Clean latents ``[B, C, h, w]`` at the level of each sample's grid index; -1 leaves them clean."""
    return levels.alpha(index) * z + levels.sigma(index) * noise


def _batch_mean(per_sample: Tensor, mask: Tensor) -> Tensor:
    """Over the whole batch, masked samples counting 0: the mean of equal parts is the mean of all."""
    return (per_sample * mask.to(per_sample)).sum() / len(per_sample)


def _log_mean(per_sample: Tensor, mask: Tensor) -> Tensor:
    """Over the unmasked samples, detached and still on its device (no wait for the GPU)."""
    m = mask.to(per_sample)
    return ((per_sample * m).sum() / m.sum().clamp(min=1)).detach()


class Adversary:
    """Frozen features and trainable heads, and what each side of the game minimises.

    A step that needs both losses computes ``features(fake)`` once, with gradients, and hands it to both.
    ``heads`` is all there is to save.
    """

    def __init__(self, features: Features, condition_dim: int, width: int = 64) -> None:
        self.features = features
        self.heads = Heads(features.channels, condition_dim, width)

    def to(self, device: torch.device | str) -> Self:
        """Features and heads, moved in place."""
        self.features.to(device)
        self.heads.to(device)
        return self

    def generator_loss(
        self, fake: Tensor, condition: Tensor, mask: Tensor, fake_features: list[Tensor] | None = None
    ) -> Tensor:
        """The student's: ``sum(mask * hinge_g) / B``; gradients reach ``fake`` and not the heads.

        ``fake [B, C, h, w]``, ``condition [B, P]``, ``mask [B]`` of 0/1.
        """
        maps = self.features(fake) if fake_features is None else fake_features
        # Detached weights rather than requires_grad_(False): the heads may be in another graph (DDP's) now.
        frozen = {name: p.detach() for name, p in self.heads.named_parameters()}
        logits = functional_call(self.heads, frozen, (maps, condition.detach()))
        return _batch_mean(hinge_g(logits), mask)

    def discriminator_loss(
        self,
        heads: Judge,
        fake: Tensor,
        real: Tensor,
        condition: Tensor,
        mask: Tensor,
        r1_weight: float,
        fake_features: list[Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The heads': ``sum(mask * (hinge_d + r1_weight * R1)) / B``, and mean logits and R1 to log.

        ``heads`` are this adversary's, or the same ones wrapped; they run once, on real and fake
        together, because a DDP wrapper expects one forward a backward. Shapes as in ``generator_loss``.
        """
        with torch.no_grad():
            fakes = self.features(fake.detach()) if fake_features is None else fake_features
            reals = self.features(real.detach())
        reals = [f.detach().requires_grad_(r1_weight > 0) for f in reals]
        both = [torch.cat([r, f.detach()]) for r, f in zip(reals, fakes, strict=True)]
        real_logits, fake_logits = heads(both, condition.detach().repeat(2, 1)).chunk(2)
        nothing = torch.zeros_like(real_logits[:, 0])
        penalty = _squared_gradient(real_logits, reals) if r1_weight > 0 else nothing
        loss = _batch_mean(hinge_d(real_logits, fake_logits) + r1_weight * penalty, mask)
        shown = {"d_real": real_logits.mean(1), "d_fake": fake_logits.mean(1), "r1": penalty}
        return loss, {name: _log_mean(value, mask) for name, value in shown.items()}
