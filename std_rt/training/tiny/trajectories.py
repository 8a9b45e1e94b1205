"""The trajectories of std-tiny: states on them, the squared error of v, runs, and sheets of runs.

The network learns the very trajectory that std-rt runs: img2img from a photo. Along one deterministic
DDIM trajectory that starts at ``tau`` from content c and ends in the target z, the state at t is

    x_t = alpha_t ((1 - k) z + k c) + sigma_t n,      k = (sigma_t / alpha_t) / (sigma_tau / alpha_tau)

because the noise estimate of the first step carries ``(alpha_tau / sigma_tau) (c - z)`` along with n.
In ``y = x / alpha`` this is the straight line from ``c + (sigma_tau / alpha_tau) n`` to z: a rectified
flow from noised content to stylized picture. So the input is all content at tau and fades to the
target as the run proceeds, and the style can only come from the style tokens. Prediction type: v.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from std_rt.core.errors import counted
from std_rt.core.schedule import (
    NoiseSchedule,
    grid_timestep,
    start_index,
    trajectory_timesteps,
)
from std_rt.pipeline.denoise import Guidance, denoise
from std_rt.training.run.recipe import SheetConfig
from std_rt.training.run.sheet import save_sheet, spread_pairs, to_frames, to_tensor
from std_rt.training.tiny.tiny_pipeline import TinyPipeline, run_unet


@dataclass(frozen=True)
class NoisyBatch:
    """Everything one training step sees; ``alpha`` and ``sigma`` are ``[B, 1, 1, 1]``."""

    x_t: Tensor
    t: Tensor
    z: Tensor
    alpha: Tensor
    sigma: Tensor

    def first(self, n: int) -> NoisyBatch:
        """Its first ``n`` samples."""
        return NoisyBatch(*(value[:n] for value in vars(self).values()))


def draw_levels(
    batch: int,
    rng: np.random.Generator,
    *,
    eta: float,
    etas: tuple[float, float],
    run_steps: tuple[int, ...],
    on_runs: float,
) -> tuple[list[int], list[int]]:
    """Per sample a start ``tau`` and a timestep ``t <= tau``.

    Half the starts are that of ``eta``, the others lie between both ``etas``. The share ``on_runs`` of the
    timesteps are those of a run of one of ``run_steps``, the others any grid point.
    """
    low, high = map(start_index, etas)
    taus, ts = [], []
    for _ in range(batch):
        main = rng.random() < 0.5
        index = start_index(eta) if main else int(rng.integers(low, high + 1))
        tau = grid_timestep(index)
        if rng.random() < on_runs:
            t = int(rng.choice(trajectory_timesteps(1.0, int(rng.choice(run_steps)), start=tau)))
        else:
            t = grid_timestep(int(rng.integers(0, index + 1)))
        taus.append(tau)
        ts.append(t)
    return taus, ts


def noisy_states(
    z: Tensor,
    c: Tensor,
    schedule: NoiseSchedule,
    levels: tuple[list[int], list[int]],
    rng: np.random.Generator,
    generator: torch.Generator,
) -> NoisyBatch:
    """States on trajectories from c to z (module docstring), k jittered for robustness to own errors.

    ``levels``: each sample's start ``tau``, and its timestep ``t <= tau``.
    """
    taus, ts = levels
    alpha, sigma = (
        torch.tensor(v, dtype=torch.float32, device=z.device)[:, None, None, None]
        for v in zip(*(schedule.alpha_sigma(t) for t in ts), strict=True)
    )
    starts = [s_ / a for a, s_ in map(schedule.alpha_sigma, taus)]
    start = torch.tensor(starts, device=z.device)[:, None, None, None]
    jitter = torch.tensor(np.exp(rng.normal(0, 0.25, len(z))), dtype=torch.float32, device=z.device)
    k = (sigma / alpha / start).float().clamp(max=1.0) ** jitter[:, None, None, None]
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    x_t = alpha * ((1 - k) * z + k * c) + sigma * noise
    return NoisyBatch(x_t, torch.tensor(ts, device=z.device), z, alpha, sigma)


def v_loss(v: Tensor, batch: NoisyBatch, weights: Tensor | None = None, most: float = 10.0) -> Tensor:
    """Squared error of v, weighted so that the clean estimate counts with SNR + 1 clamped at ``most``.

    ``weights``: one for each latent channel (`latent_weights`).
    """
    target = (batch.alpha * batch.x_t - batch.z) / batch.sigma
    error = (most * batch.sigma**2).clamp(max=1.0) * (v - target).square()
    return (error if weights is None else weights * error).mean()


@torch.no_grad()
def sample(
    pipeline: TinyPipeline,
    images: Tensor,
    styles: Tensor | None,
    steps: int,
    guidance: float = 1.0,
    eta: float = 0.75,
    seed: int = 0,
) -> Tensor:
    """Stylize ``images [B, 3, H, W]`` in the looks of ``styles [B, 3, S, S]``, deterministically.

    ``styles`` is None: the network is told no style.
    """
    z = pipeline.vae.encode(images).latents
    tokens, pooled = pipeline.style_encoder(images if styles is None else styles)
    ids = torch.tensor([[images.shape[2], images.shape[3], 0, 0, images.shape[2], images.shape[3]]]).float()
    ids = ids.expand(len(z), 6)
    noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(seed))

    def predict(x: Tensor, timestep: int, unstyled: bool) -> Tensor:
        t, styled = torch.full((len(z),), timestep), 0 if unstyled or styles is None else 1
        return run_unet(pipeline.unet, x, t, styled * tokens, styled * pooled, ids, z)

    z_0 = denoise(
        z,
        predict,
        noise=[noise],
        steps=pipeline.schedule.coefficients(trajectory_timesteps(eta, steps)),
        prediction_type="v_prediction",
        guidance=Guidance("none" if guidance == 1 else "full", guidance),
    )
    return pipeline.vae.decode(z_0).sample


def run_sheet(
    pipeline: TinyPipeline,
    config: SheetConfig,
    path: Path,
    settings: list[tuple[int, float]],
    styled: bool = True,
) -> None:
    """One row a pair of unseen pictures: content, style, then one output per (steps, guidance).

    ``styled``: the network is told the style.
    """
    pairs = spread_pairs(Path(config.contents), Path(config.styles), config.pairs, config.size_px)
    images, styles = to_tensor([a for a, _ in pairs]), to_tensor([b for _, b in pairs])
    told = styles if styled else None
    columns = [to_frames(sample(pipeline, images, told, n, g)) for n, g in settings]
    names = ["content", "style", *(f"{counted(n, 'step')}, guidance {g:g}" for n, g in settings)]
    save_sheet(path, [[a, b, *outs] for (a, b), *outs in zip(pairs, *columns, strict=True)], names)
