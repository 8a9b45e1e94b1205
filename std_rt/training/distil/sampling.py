"""Running a base or a student: pictures encoded once, then img2img along given timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from std_rt.core.errors import UsageError
from std_rt.core.schedule import (
    GRID_POINTS,
    NoiseSchedule,
    StepCoefficients,
    grid_timestep,
    trajectory_timesteps,
)
from std_rt.training.arrays import Frame
from std_rt.training.distil.base import Base, Conditioning, cat
from std_rt.training.distil.inpaint import After, Mask
from std_rt.training.distil.trajectory import jump, to_x0_eps
from std_rt.training.run.sheet import to_tensor

__all__ = ["Scene", "draw_noise", "encode_scene", "reference_timesteps", "sample_latents"]


@dataclass(frozen=True, eq=False)
class Scene:
    """Pictures to run on, encoded once: N contents and styles (frames of one size).

    z [N, C, h, w]; noise [K, N, C, h, w]: the start noise, then one for each stochastic step.
    """

    contents: list[Frame]
    styles: list[Frame]
    z: Tensor
    cond: Conditioning
    noise: Tensor
    mask: Mask | None = None


def draw_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Unit normal noise, the same for a seed on every machine and device (as the runtime draws it)."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


@torch.no_grad()
def encode_scene(
    base: Base,
    pairs: Sequence[tuple[Frame, Frame]],
    *,
    seed: int = 0,
    draws: int = 1,
    one_noise: bool = False,
    prompt: str = "",
    mask: Mask | None = None,
    device: str = "cpu",
    batch: int = 4,
) -> Scene:
    """Encode pairs of square frames. ``draws``: most steps of any stochastic run; ``one_noise``: as in a
    stream, all rows share theirs; ``prompt``: for bases with text encoders.

    Raises UsageError where the pictures' side does not suit the base.
    """
    contents, styles = [a for a, _ in pairs], [b for _, b in pairs]
    side = contents[0].shape[0]
    if side % base.multiple:
        near = max(base.multiple, round(side / base.multiple) * base.multiple)
        raise UsageError(
            f"--size {side} is no multiple of {base.multiple}, as this teacher needs; use {near}"
        )
    z, parts = [], []
    for i in range(0, len(pairs), batch):
        z.append(base.encode(to_tensor(contents[i : i + batch]).to(device)))
        looks = _style_images(base, styles[i : i + batch], device)
        ids = torch.tensor([[side, side, 0, 0, side, side]] * len(z[-1]), dtype=torch.float32, device=device)
        parts.append(base.condition([prompt] * len(ids), looks, ids))
    latents = torch.cat(z)
    rows = 1 if one_noise else len(latents)
    noise = draw_noise(seed, (draws, rows, *latents.shape[1:])).to(device)
    return Scene(contents, styles, latents, cat(parts), noise.expand(-1, len(latents), -1, -1, -1), mask)


def _style_images(base: Base, styles: Sequence[Frame], device: str) -> Tensor | None:
    """Styles ``[B, 3, S, S]`` at the side the style encoder takes; None for a base without one."""
    if base.style_encoder is None:
        return None
    side = base.style_px
    how = cv2.INTER_AREA if styles[0].shape[0] > side else cv2.INTER_CUBIC
    resized = [np.asarray(cv2.resize(f, (side, side), interpolation=how), np.uint8) for f in styles]
    return to_tensor(resized).to(device)


def _steps(schedule: NoiseSchedule, timesteps: list[int], gamma: float) -> list[StepCoefficients]:
    """Coefficients of a run; gamma 1 re-noises the clean estimate (LCM): ``alpha_s x_0 + sigma_s n``."""
    if gamma != 1:
        return schedule.coefficients(timesteps, gamma)
    plain = schedule.coefficients(timesteps)
    return [replace(c, sigma_s=0.0, noise=c.sigma_s) for c in plain]


@torch.no_grad()
def sample_latents(
    base: Base,
    cond: Conditioning,
    z: Tensor,
    timesteps: list[int],
    guidance: float,
    noise: Tensor,
    gamma: float = 0.0,
    *,
    unet: Any = None,
    after: After | None = None,
    bf16: bool = False,
) -> Tensor:
    """img2img from latents ``z`` [B, C, h, w] to the clean estimate of the last step.

    ``noise`` [K, B, C, h, w]: the start noise, then one for each stochastic step. ``guidance`` is
    diffusers' scale (1: no unconditional branch). ``after(x, timestep)`` follows each step.
    """
    unet = base.unet if unet is None else unet
    both = cond if guidance == 1 else cat([cond, cond.null()])
    steps = _steps(base.schedule, timesteps, gamma)
    x = steps[0].alpha_t * z + steps[0].sigma_t * noise[0]
    drawn = 1
    for c in steps:
        rows = x if guidance == 1 else torch.cat([x, x])
        t = torch.full((len(rows),), c.timestep, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            output = base.predict(unet, rows, t, both).float()
        if guidance != 1:
            styled, free = output.chunk(2)
            output = free + guidance * (styled - free)
        alpha, sigma = x.new_tensor(c.alpha_t), x.new_tensor(c.sigma_t)
        x_0, eps = to_x0_eps(output, x, alpha, sigma, base.schedule.prediction_type)
        x = jump(x_0, eps, x.new_tensor(c.alpha_s), x.new_tensor(c.sigma_s))
        if c.noise:
            x = x + c.noise * noise[drawn]
            drawn += 1
        x = x if after is None else after(x, c.target)
    return x


def reference_timesteps(tau: int, steps: int = GRID_POINTS) -> list[int]:
    """A full schedule of ``steps`` from ``tau`` down: with 50, every grid point. UsageError outside 1..50."""
    points = (tau + 1) * GRID_POINTS // (grid_timestep(GRID_POINTS - 1) + 1)
    if not 1 <= steps <= GRID_POINTS:
        raise UsageError(f"--reference-steps must be in 1..{GRID_POINTS}, got {steps}")
    return trajectory_timesteps(1.0, max(1, points * steps // GRID_POINTS), start=tau)
