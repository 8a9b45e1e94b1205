"""Runs of a base or a student: pictures encoded once, img2img along given timesteps, periodic sheets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from std_rt.core.errors import RecipeError, UsageError, counted
from std_rt.core.schedule import (
    GRID_POINTS,
    NoiseSchedule,
    StepCoefficients,
    grid_timestep,
    trajectory_timesteps,
)
from std_rt.pipeline.denoise import denoise
from std_rt.training.data.picture_set import Frame
from std_rt.training.data.picture_source import long_clips
from std_rt.training.data.pictures import read_clip
from std_rt.training.distil.base import Base, Conditioning, Motion, cat
from std_rt.training.distil.distiller import Distiller
from std_rt.training.distil.lora import adapters_off, functional
from std_rt.training.run.precision import precision_context
from std_rt.training.run.recipe import DistilConfig, PicturesConfig
from std_rt.training.run.sheet import centre_crop, save_sheet, spread_pairs, to_frames, to_tensor

__all__ = ["Scene", "SheetMaker", "draw_noise", "encode_scene", "reference_timesteps", "sample_latents"]

_SHOWN = 4  # frames of a clip in a sheet

After = Callable[[Tensor, int], Tensor]  # (state, its timestep; -1: clean) -> state


@dataclass(frozen=True, eq=False)
class Scene:
    """Pictures to run on, encoded once: N contents and styles (frames of one size).

    z [N, C, h, w]; noise [K, N, C, h, w]: the start noise, then one for each stochastic step. Of clips both
    have T before h; ``shown`` frames of each are among the contents, one after the other.
    """

    contents: list[Frame]
    styles: list[Frame]
    z: Tensor
    cond: Conditioning
    noise: Tensor
    mask: NDArray[np.bool_] | None = None
    shown: tuple[int, ...] = ()


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
    mask: NDArray[np.bool_] | None = None,
    device: str = "cpu",
    batch: int = 4,
) -> Scene:
    """Encode pairs of square frames. ``draws``: most steps of any stochastic run; ``one_noise``: all rows
    share theirs, as in a stream; ``prompt``: for bases with text encoders.

    Raises UsageError if the pictures' side does not suit the base.
    """
    contents, styles = [a for a, _ in pairs], [b for _, b in pairs]
    side = contents[0].shape[0]
    if side % base.multiple:
        near = max(base.multiple, round(side / base.multiple) * base.multiple)
        raise UsageError(
            f"--size {side} is not a multiple of {base.multiple}, as this teacher needs; use {near}"
        )
    z, parts = [], []
    for i in range(0, len(pairs), batch):
        z.append(base.encode(to_tensor(contents[i : i + batch]).to(device)))
        looks = None if base.null_tokens is None else base.look(_style_images(base, styles[i : i + batch]))
        ids = torch.tensor([[side, side, 0, 0, side, side]] * len(z[-1]), dtype=torch.float32, device=device)
        parts.append(base.condition(base.read_text([prompt] * len(ids)), looks, ids, z[-1]))
    latents = torch.cat(z)
    rows = 1 if one_noise else len(latents)
    noise = draw_noise(seed, (draws, rows, *latents.shape[1:])).to(device)
    return Scene(contents, styles, latents, cat(parts), noise.expand(-1, len(latents), -1, -1, -1), mask)


@torch.no_grad()
def _encode_clips(
    base: Base, clips: Sequence[Sequence[Frame]], styles: Sequence[Frame], draws: int, device: str
) -> Scene:
    """Clips of square frames of one size, each with a style picture if the base takes one."""
    side, count = clips[0][0].shape[0], len(clips[0])
    shown = tuple(dict.fromkeys(round(i * (count - 1) / (_SHOWN - 1)) for i in range(_SHOWN)))
    z = torch.stack([base.encode(to_tensor(list(clip)).to(device)).transpose(0, 1) for clip in clips])
    looks = None if base.null_tokens is None else base.look(_style_images(base, styles))
    ids = torch.tensor([[side, side, 0, 0, side, side]] * len(z), dtype=torch.float32, device=device)
    return Scene(
        [clip[i] for clip in clips for i in shown],
        [] if looks is None else [style for style in styles for _ in shown],
        z,
        base.condition(base.read_text([""] * len(z)), looks, ids),
        draw_noise(0, (draws, *z.shape)).to(device),
        shown=shown,
    )


def _style_images(base: Base, styles: Sequence[Frame]) -> Tensor:
    """Styles ``[B, 3, S, S]`` at the side the style encoder takes."""
    side = base.style_px
    how = cv2.INTER_AREA if styles[0].shape[0] > side else cv2.INTER_CUBIC
    resized = [np.asarray(cv2.resize(f, (side, side), interpolation=how), np.uint8) for f in styles]
    return to_tensor(resized)


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
    network = base.unet if unet is None else unet
    both = cond if guidance == 1 else cat([cond, base.null(cond)])

    def predict(x: Tensor, timestep: int, _: bool) -> Tensor:
        rows = x if guidance == 1 else torch.cat([x, x])
        t = torch.full((len(rows),), timestep, device=x.device)
        # Autocast that is switched off would switch off the caller's.
        with torch.autocast(x.device.type, torch.bfloat16) if bf16 else nullcontext():
            output = base.predict(network, rows, t, both).float()
        if guidance == 1:
            return output
        styled, free = output.chunk(2)  # one batch of two: faster than two calls
        return free + guidance * (styled - free)

    steps = _steps(base.schedule, timesteps, gamma)
    return denoise(
        z, predict, noise=list(noise), steps=steps, prediction_type=base.schedule.prediction_type, after=after
    )


def reference_timesteps(tau: int, steps: int = GRID_POINTS) -> list[int]:
    """A full schedule of ``steps`` from ``tau`` down: with 50, every grid point. UsageError outside 1..50."""
    points = (tau + 1) * GRID_POINTS // (grid_timestep(GRID_POINTS - 1) + 1)
    if not 1 <= steps <= GRID_POINTS:
        raise UsageError(f"--reference-steps must be in 1..{GRID_POINTS}, got {steps}")
    return trajectory_timesteps(1.0, max(1, points * steps // GRID_POINTS), start=tau)


class SheetMaker:
    """The same unseen pairs and noise in every sheet; the teacher's pictures are made once."""

    def __init__(self, config: DistilConfig, base: Base, distiller: Distiller) -> None:
        self.config, self.base, self.distiller = config, base, distiller
        self.scene = self._scene() if config.sheet.contents else None
        self.left: list[list[Any]] = []  # content, style, teacher of each row

    def make(self, path: Path) -> bool:
        """Write a sheet to ``path``; False if the recipe names no held-out pictures."""
        if self.scene is None:
            return False
        if not self.left:
            with adapters_off(self.distiller.tuner_layers):
                teacher = self._run(reference_timesteps(self.distiller.tau), sum(self.config.guidance) / 2)
            known = (self.scene.contents, self.scene.styles, teacher)
            self.left = [list(row) for row in zip(*(column for column in known if column), strict=True)]
        columns = [
            self._run(trajectory_timesteps(self.config.eta, n, start=self.distiller.tau), 1.0, student=True)
            for n in self.config.run_steps
        ]
        steps = [counted(n, "step") for n in self.config.run_steps]
        styled = ["style"] if self.scene.styles else []
        names = ["content", *styled, f"teacher ({GRID_POINTS}-step grid)", *steps]
        save_sheet(path, [[*left, *outs] for left, *outs in zip(self.left, *columns, strict=True)], names)
        return True

    def _scene(self) -> Scene:
        sheet = self.config.sheet
        for name, value in (("contents", sheet.contents), ("styles", sheet.styles)):
            if value and not Path(value).is_dir():
                raise RecipeError(
                    f"sheet.{name} = {value!r} is not a folder; set it to one, or to '' for no sheets"
                )
        contents = Path(sheet.contents)
        if self.base.motion is not None:
            return self._clips(self.base.motion)
        pairs = spread_pairs(contents, Path(sheet.styles or contents), sheet.pairs, sheet.size_px)
        draws = max(self.config.run_steps)
        return encode_scene(self.base, pairs, draws=draws, device=self.distiller.device)

    def _clips(self, motion: Motion) -> Scene:
        """Clips spread over their folder from their first frames on, styles over theirs."""
        sheet = self.config.sheet
        entries = long_clips(PicturesConfig(sheet.contents), motion, quiet=True).entries
        chosen = [entries[i * len(entries) // sheet.pairs] for i in range(min(sheet.pairs, len(entries)))]
        clips = [
            [
                centre_crop(frame, sheet.size_px)
                for frame in read_clip(entry, 0, motion.frames, motion.interval)
            ]
            for entry in chosen
        ]
        styles = [clip[0] for clip in clips]
        if sheet.styles:
            pairs = spread_pairs(Path(sheet.styles), Path(sheet.styles), len(clips), sheet.size_px)
            styles = [pairs[i % len(pairs)][1] for i in range(len(clips))]
        draws = max(self.config.run_steps)
        return _encode_clips(self.base, clips, styles, draws, self.distiller.device)

    @torch.no_grad()
    def _run(self, timesteps: list[int], guidance: float, *, student: bool = False) -> list[Any]:
        """Frames of all rows; LCM draws new noise between its steps, the others are deterministic."""
        assert self.scene is not None
        gamma = 1.0 if student and self.config.method == "lcm" else 0.0
        averaged = partial(functional, self.base.unet, self.distiller.average.tensors)
        unet: Any = averaged if student else self.base.unet
        frames: list[Any] = []
        for i in range(len(self.scene.z)):
            row = slice(i, i + 1)
            cond, noise = self.scene.cond.rows(row), self.scene.noise[:, row]
            with precision_context(self.config.precision, torch.device(self.distiller.device).type):
                z: Tensor = sample_latents(
                    self.base, cond, self.scene.z[row], timesteps, guidance, noise, gamma, unet=unet
                )
            pictures = z[0].transpose(0, 1)[list(self.scene.shown)] if self.scene.shown else z
            frames += to_frames(self.base.decode(pictures.float()))
        return frames
