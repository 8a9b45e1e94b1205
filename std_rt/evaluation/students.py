"""Comparison of students with their teacher on the same pictures and noise: distance to its 50-step result.

Every candidate (a LoRA, or the bare teacher) runs from the same content latents and the same noise, along
the schedule that starts exactly at its ``tau``. The reference is the teacher's deterministic run over all
grid points from that ``tau`` down. A run is counted in UNet evaluations, since guidance other than 1 costs
two per step: tables compare at equal evaluations. The caller's ``judge`` scores individual pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from std_rt.core.errors import UsageError
from std_rt.core.schedule import GRID_POINTS, img2img_timesteps, trajectory_timesteps
from std_rt.evaluation.candidates import Candidate, attached
from std_rt.evaluation.inpaint import composite, keep_outside, latent_mask, outside_difference
from std_rt.evaluation.measures import Frame, Mask, means
from std_rt.training.distil.base import Base
from std_rt.training.distil.sampling import Scene, reference_timesteps, sample_latents
from std_rt.training.run.sheet import to_frames

__all__ = [
    "SCHEDULES",
    "Comparison",
    "Reference",
    "Row",
    "Setting",
    "aggregate",
    "compare",
    "timesteps_for",
]

SCHEDULES = ("aligned", "diffusers")

Judge = Callable[[Frame, Frame, Frame, Mask | None], dict[str, float]]
ClipJudge = Callable[[Sequence[Frame]], dict[str, float]]  # the outputs of a clip's frames, in order


@dataclass(frozen=True)
class Setting:
    """How a candidate is run. ``schedule``: ``aligned`` starts at tau, ``diffusers`` as img2img does."""

    steps: int
    guidance: float
    schedule: str = "aligned"


@dataclass(frozen=True, eq=False)
class Reference:
    """The teacher's result: latents [N, C, h, w], and images [N, 3, H, W] in [0, 1]."""

    z: Tensor
    images: Tensor


@dataclass(frozen=True)
class Row:
    """One candidate at one setting: ``measures`` are means over the pairs."""

    name: str
    label: str
    method: str
    seed: int | None
    tau: int
    steps: int
    guidance: float
    timesteps: list[int]
    evaluations: int
    measures: dict[str, float]
    frames: list[Frame] = field(default_factory=list, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but the frames."""
        return {name: value for name, value in vars(self).items() if name != "frames"}


def timesteps_for(candidate: Candidate, setting: Setting) -> list[int]:
    """The timesteps of a run. Raises UsageError if the trajectory has fewer points than steps."""
    eta, steps = candidate.eta, setting.steps
    try:
        if setting.schedule == "aligned":
            return trajectory_timesteps(eta, steps, start=candidate.tau)
        # diffusers cuts the head of a longer schedule: ask for the length that leaves exactly ``steps``.
        asked = next((n for n in range(steps, GRID_POINTS + 1) if int(n * eta) == steps), None)
        if asked is None:
            raise ValueError(f"no diffusers schedule at eta {eta:g} runs {steps} steps")
        return img2img_timesteps(eta, asked)
    except ValueError as error:
        raise UsageError(f"--steps {steps} cannot be run: {error}") from None


@dataclass(eq=False)
class Comparison:
    """Everything that stays the same over a comparison; references are filled in by `compare`.

    ``clips`` are scenes of one clip each, with what judges their frames. ``reference_guidance`` None is each
    candidate's own. ``batch`` rows are run at a time.
    """

    base: Base
    scene: Scene
    judge: Judge
    clips: Sequence[tuple[Scene, ClipJudge]] = ()
    reference_steps: int = GRID_POINTS
    reference_guidance: float | None = None
    batch: int = 4
    bf16: bool = False
    references: dict[tuple[int, float], Reference] = field(default_factory=dict)

    def add_reference(self, candidate: Candidate) -> Row | None:
        """Run a candidate's reference, before any LoRA is attached: its row, at distance 0.

        None if another candidate had the same reference.
        """
        scale = candidate.reference_guidance(self.reference_guidance)
        if (candidate.tau, scale) in self.references:
            return None
        bare = replace(
            candidate, name="reference", label="reference", tensors=None, method="teacher", seed=None
        )
        timesteps = reference_timesteps(candidate.tau, self.reference_steps)
        z = self.sample(self.scene, timesteps, scale)
        self.references[candidate.tau, scale] = Reference(z, self.decode(z))
        return self._row(bare, Setting(len(timesteps), scale), timesteps, z)

    def run(self, candidate: Candidate, setting: Setting) -> Row:
        """One row of the table; the candidate is attached already."""
        timesteps = timesteps_for(candidate, setting)
        z = self.sample(self.scene, timesteps, setting.guidance, candidate.gamma)
        return self._row(candidate, setting, timesteps, z)

    def sample(self, scene: Scene, timesteps: list[int], guidance: float, gamma: float = 0.0) -> Tensor:
        """`sample_latents` over a scene, inside its mask if it has one: latents [N, C, h, w]."""
        done = []
        for i in range(0, len(scene.z), self.batch):
            rows = slice(i, i + self.batch)
            z, noise, cond = scene.z[rows], scene.noise[:, rows], scene.cond.rows(rows)
            inside = _inside(scene)
            after = None if inside is None else keep_outside(self.base.schedule, z, noise[0], inside)
            done.append(
                sample_latents(
                    self.base, cond, z, timesteps, guidance, noise, gamma, after=after, bf16=self.bf16
                )
            )
        return torch.cat(done)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents -> images [N, 3, H, W] in [0, 1]."""
        parts = [self.base.decode(z[i : i + self.batch]) for i in range(0, len(z), self.batch)]
        return (torch.cat(parts).clamp(-1, 1) + 1) / 2

    def _row(self, candidate: Candidate, setting: Setting, timesteps: list[int], z: Tensor) -> Row:
        scene, images = self.scene, self.decode(z)
        frames = to_frames(images * 2 - 1)
        if scene.mask is not None:
            frames = [composite(f, c, scene.mask) for f, c in zip(frames, scene.contents, strict=True)]
        target = self.references[candidate.tau, candidate.reference_guidance(self.reference_guidance)]
        measures = means(_distances(target, z, images, scene)) | self._judged(frames)
        return Row(
            name=candidate.name,
            label=candidate.label,
            method=candidate.method,
            seed=candidate.seed,
            tau=candidate.tau,
            steps=setting.steps,
            guidance=setting.guidance,
            timesteps=timesteps,
            evaluations=len(timesteps) * (1 if setting.guidance == 1 else 2),
            measures=measures | self._clips_judged(candidate, setting, timesteps),
            frames=frames,
        )

    def _judged(self, frames: list[Frame]) -> dict[str, float]:
        scene = self.scene
        sets = list(zip(frames, scene.contents, scene.styles, strict=True))
        found = means([self.judge(frame, content, style, scene.mask) for frame, content, style in sets])
        if scene.mask is not None:
            found["outside_max"] = float(max(outside_difference(f, c, scene.mask) for f, c, _ in sets))
        return found

    def _clips_judged(self, candidate: Candidate, setting: Setting, timesteps: list[int]) -> dict[str, float]:
        """Means over the clips that their judges have numbers for: a clip of nothing but cuts has none.

        Frames are judged as the networks give them, without the runtime's temporal filter.
        """
        known = []
        for clip, judge in self.clips:
            images = self.decode(self.sample(clip, timesteps, setting.guidance, candidate.gamma))
            found = judge(to_frames(images * 2 - 1))
            known += [found] if found else []
        return means(known) if known else {}


def _inside(scene: Scene) -> Tensor | None:
    """The scene's mask over its latents [1, 1, h, w]; None if it has none."""
    if scene.mask is None:
        return None
    return latent_mask(scene.mask, (scene.z.shape[2], scene.z.shape[3])).to(scene.z)


def _rmse(a: Tensor, b: Tensor, inside: Tensor | None) -> Tensor:
    """Per row [N], over what is inside ([H, W] of 0/1, None: all)."""
    square = (a - b).square()
    share = torch.ones_like(square) if inside is None else inside.expand_as(square)
    return ((square * share).flatten(1).sum(1) / share.flatten(1).sum(1)).sqrt()


def _distances(target: Reference, z: Tensor, images: Tensor, scene: Scene) -> list[dict[str, float]]:
    """Distance to the reference, per pair: of latents, of images in 0..1, and as PSNR (at most 100 dB)."""
    pixels = None if scene.mask is None else torch.from_numpy(scene.mask).to(images)
    off_z, off = _rmse(z, target.z, _inside(scene)), _rmse(images, target.images, pixels)
    decibel = (-20 * off.clamp(min=1e-5).log10()).tolist()  # JSON has no infinity
    named = zip(off_z.tolist(), off.tolist(), decibel, strict=True)
    return [{"latent_rmse": a, "image_rmse": b, "psnr_db": c} for a, b, c in named]


def compare(
    comparison: Comparison, candidates: Sequence[Candidate], settings: Sequence[Setting]
) -> Iterator[Row]:
    """One row for each reference (label ``reference``), then one for each candidate at each setting.

    Raises UsageError, before anything is run, if a setting has too many steps for a candidate.
    """
    for candidate in candidates:
        for setting in settings:
            timesteps_for(candidate, setting)
    for candidate in candidates:
        row = comparison.add_reference(candidate)
        if row is not None:
            yield row
    for candidate in candidates:
        with attached(comparison.base.unet, candidate):
            for setting in settings:
                yield comparison.run(candidate, setting)


def aggregate(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of one label and setting as one: means over seeds, and their sample standard deviation.

    ``spread`` is None for a single seed, which has none.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.label, row.tau, row.steps, row.guidance), []).append(row)
    shared = ("label", "method", "tau", "steps", "guidance", "evaluations")
    return [
        {name: getattr(each[0], name) for name in shared}
        | {
            "seeds": [row.seed for row in each],
            "mean": means([row.measures for row in each]),
            "spread": _spread([row.measures for row in each]),
        }
        for each in groups.values()
    ]


def _spread(rows: Sequence[dict[str, float]]) -> dict[str, float] | None:
    if len(rows) < 2:
        return None
    return {key: float(np.std([row[key] for row in rows], ddof=1)) for key in rows[0]}
