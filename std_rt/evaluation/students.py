"""Students beside their teacher, on the same pictures and noise: how far from its 50-step result?

Every candidate (a LoRA, or the bare teacher) runs from the same content latents and the same noise, along
the schedule that starts exactly at its ``tau``. The yardstick is the teacher's deterministic run over all
grid points from that ``tau`` down. A run is counted in UNet evaluations, since guidance other than 1 costs
two a step: tables compare at equal evaluations. How good a single picture is, a ``judge`` says, which the
caller hands in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from std_rt.core.errors import UsageError
from std_rt.core.schedule import (
    GRID_POINTS,
    img2img_timesteps,
    trajectory_timesteps,
)
from std_rt.evaluation.candidates import Candidate, attached, label_of, read_candidate, teachers
from std_rt.evaluation.inpaint import Mask, composite, keep_outside, latent_mask, outside_difference
from std_rt.training.data.picture_set import Frame
from std_rt.training.distil.base import Base
from std_rt.training.distil.sampling import (
    Scene,
    draw_noise,
    encode_scene,
    reference_timesteps,
    sample_latents,
)
from std_rt.training.run.sheet import to_frames

__all__ = [
    "SCHEDULES",
    "Candidate",
    "Reference",
    "Row",
    "Scene",
    "Setting",
    "aggregate",
    "attached",
    "choose_device",
    "compare",
    "draw_noise",
    "encode_scene",
    "label_of",
    "read_candidate",
    "reference",
    "sample_latents",
    "teachers",
    "timesteps_for",
]

SCHEDULES = ("aligned", "diffusers")

Judge = Callable[[Frame, Frame, Frame, Mask | None], dict[str, float]]
ClipJudge = Callable[[Sequence[Frame]], dict[str, float]]  # the outputs of a clip's frames, in order


@dataclass(frozen=True)
class Setting:
    """How a candidate is run. ``schedule``: ``aligned`` starts at tau, ``diffusers`` is img2img's cut."""

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
        return asdict(
            replace(self, frames=[]), dict_factory=lambda items: {k: v for k, v in items if k != "frames"}
        )


def choose_device(name: str) -> str:
    """``auto``: a GPU where there is one. Raises UsageError where the device cannot be used."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"--device {name} cannot be used ({reason}); try --device cpu") from None
    return chosen


def timesteps_for(candidate: Candidate, setting: Setting) -> list[int]:
    """The timesteps of a run. Raises UsageError where the trajectory has fewer points than steps."""
    try:
        if setting.schedule == "aligned":
            return trajectory_timesteps(candidate.eta, setting.steps, start=candidate.tau)
        return _img2img_cut(candidate.eta, setting.steps)
    except ValueError as error:
        raise UsageError(f"--steps {setting.steps} cannot be run: {error}") from None


def _img2img_cut(eta: float, steps: int) -> list[int]:
    """diffusers' img2img schedule of exactly ``steps`` evaluations: it is asked for more, and cuts."""
    asked = next((n for n in range(steps, GRID_POINTS + 1) if int(n * eta) == steps), None)
    if asked is None:
        raise ValueError(f"no diffusers schedule at eta {eta:g} runs {steps} steps")
    return img2img_timesteps(eta, asked)


def _run(
    base: Base, scene: Scene, timesteps: list[int], guidance: float, gamma: float, batch: int, bf16: bool
) -> Tensor:
    """`sample_latents` over a scene, ``batch`` rows at a time, inside its mask where it has one."""
    done = []
    for i in range(0, len(scene.z), batch):
        rows = slice(i, i + batch)
        z, noise = scene.z[rows], scene.noise[:, rows]
        after = None
        if scene.mask is not None:
            after = keep_outside(base.schedule, z, noise[0], _inside(scene))
        cond = scene.cond.rows(rows)
        done.append(sample_latents(base, cond, z, timesteps, guidance, noise, gamma, after=after, bf16=bf16))
    return torch.cat(done)


def _inside(scene: Scene) -> Tensor:
    assert scene.mask is not None
    return latent_mask(scene.mask, (scene.z.shape[2], scene.z.shape[3])).to(scene.z)


@torch.no_grad()
def _decode(base: Base, z: Tensor, batch: int) -> Tensor:
    """Latents -> images [N, 3, H, W] in [0, 1]."""
    parts = [base.decode(z[i : i + batch]) for i in range(0, len(z), batch)]
    return (torch.cat(parts).clamp(-1, 1) + 1) / 2


def reference(
    base: Base,
    scene: Scene,
    tau: int,
    guidance: float,
    steps: int = GRID_POINTS,
    *,
    batch: int = 4,
    bf16: bool = False,
) -> Reference:
    """The yardstick: the bare teacher over the grid from ``tau``, deterministic, at ``guidance``."""
    timesteps = reference_timesteps(tau, steps)
    z = _run(base, scene, timesteps, guidance, 0.0, batch, bf16)
    return Reference(z, _decode(base, z, batch))


def _evaluations(timesteps: list[int], guidance: float) -> int:
    return len(timesteps) * (1 if guidance == 1 else 2)


def _rmse(a: Tensor, b: Tensor, inside: Tensor | None) -> Tensor:
    """Per row [N], over what is inside ([H, W] of 0/1, None: all)."""
    square = (a - b).square()
    if inside is None:
        return square.flatten(1).mean(1).sqrt()
    share = inside.expand_as(square)
    return ((square * share).flatten(1).sum(1) / share.flatten(1).sum(1)).sqrt()


def _distances(base_z: Reference, z: Tensor, images: Tensor, scene: Scene) -> list[dict[str, float]]:
    """Distance to the reference, per pair: of latents, of images in 0..1, and as PSNR (at most 100 dB)."""
    pixels = None if scene.mask is None else torch.from_numpy(scene.mask).to(images)
    latents = None if scene.mask is None else _inside(scene)
    off_z, off = _rmse(z, base_z.z, latents), _rmse(images, base_z.images, pixels)
    decibel = (-20 * off.clamp(min=1e-5).log10()).tolist()  # JSON knows no infinity
    named = zip(off_z.tolist(), off.tolist(), decibel, strict=True)
    return [{"latent_rmse": a, "image_rmse": b, "psnr_db": c} for a, b, c in named]


def _frames(images: Tensor, scene: Scene) -> list[Frame]:
    frames = to_frames(images * 2 - 1)
    if scene.mask is None:
        return frames
    return [composite(f, content, scene.mask) for f, content in zip(frames, scene.contents, strict=True)]


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


@dataclass(eq=False)
class Bench:
    """Everything that stays the same over a comparison."""

    base: Base
    scene: Scene
    judge: Judge
    clips: Sequence[tuple[Scene, ClipJudge]] = ()
    reference_steps: int = GRID_POINTS
    reference_guidance: float | None = None
    batch: int = 4
    bf16: bool = False
    references: dict[tuple[int, float], Reference] = field(default_factory=dict)

    def reference(self, candidate: Candidate) -> Reference:
        """The yardstick of a candidate; made before any LoRA is attached."""
        return self.references[candidate.tau, candidate.reference_guidance(self.reference_guidance)]

    def add_reference(self, candidate: Candidate) -> Row | None:
        """Run a candidate's yardstick unless it is there; its own row, at distance 0."""
        scale = candidate.reference_guidance(self.reference_guidance)
        if (candidate.tau, scale) in self.references:
            return None
        made = reference(
            self.base,
            self.scene,
            candidate.tau,
            scale,
            self.reference_steps,
            batch=self.batch,
            bf16=self.bf16,
        )
        self.references[candidate.tau, scale] = made
        timesteps = reference_timesteps(candidate.tau, self.reference_steps)
        bare = replace(
            candidate, name="reference", label="reference", tensors=None, method="teacher", seed=None
        )
        return self._row(bare, Setting(len(timesteps), scale), timesteps, made.z, made)

    def run(self, candidate: Candidate, setting: Setting) -> Row:
        """One row of the table; the candidate is attached already."""
        timesteps = timesteps_for(candidate, setting)
        z = _run(self.base, self.scene, timesteps, setting.guidance, candidate.gamma, self.batch, self.bf16)
        return self._row(candidate, setting, timesteps, z, self.reference(candidate))

    def _row(
        self, candidate: Candidate, setting: Setting, timesteps: list[int], z: Tensor, against: Reference
    ) -> Row:
        images = _decode(self.base, z, self.batch)
        frames = _frames(images, self.scene)
        measures = _mean(_distances(against, z, images, self.scene)) | self._judged(frames)
        return Row(
            name=candidate.name,
            label=candidate.label,
            method=candidate.method,
            seed=candidate.seed,
            tau=candidate.tau,
            steps=setting.steps,
            guidance=setting.guidance,
            timesteps=timesteps,
            evaluations=_evaluations(timesteps, setting.guidance),
            measures=measures | self._warping(candidate, setting, timesteps),
            frames=frames,
        )

    def _judged(self, frames: list[Frame]) -> dict[str, float]:
        scene = self.scene
        sets = zip(frames, scene.contents, scene.styles, strict=True)
        found = _mean([self.judge(frame, content, style, scene.mask) for frame, content, style in sets])
        if scene.mask is None:
            return found
        off = [outside_difference(f, c, scene.mask) for f, c in zip(frames, scene.contents, strict=True)]
        return found | {"outside_max": float(max(off))}

    def _warping(self, candidate: Candidate, setting: Setting, timesteps: list[int]) -> dict[str, float]:
        """What the clips' judges say of the candidate, as a mean over clips; {} where they say nothing."""
        found = []
        for clip, judge in self.clips:
            z = _run(self.base, clip, timesteps, setting.guidance, candidate.gamma, self.batch, self.bf16)
            found.append(judge(to_frames(_decode(self.base, z, self.batch) * 2 - 1)))
        known = [each for each in found if each]  # a clip of nothing but cuts says nothing
        return _mean(known) if known else {}


def compare(bench: Bench, candidates: Sequence[Candidate], settings: Sequence[Setting]) -> Iterator[Row]:
    """One row for each yardstick (label ``reference``), then one for each candidate at each setting."""
    for candidate in candidates:
        for setting in settings:
            timesteps_for(candidate, setting)  # what cannot be run is refused before anything is
    for candidate in candidates:
        row = bench.add_reference(candidate)
        if row is not None:
            yield row
    for candidate in candidates:
        with attached(bench.base.unet, candidate):
            for setting in settings:
                yield bench.run(candidate, setting)


def aggregate(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of one label and setting as one: means over seeds, and their sample standard deviation.

    ``spread`` is None for a single seed, which has none.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.label, row.tau, row.steps, row.guidance), []).append(row)
    return [
        {
            "label": each[0].label,
            "method": each[0].method,
            "tau": each[0].tau,
            "steps": each[0].steps,
            "guidance": each[0].guidance,
            "evaluations": each[0].evaluations,
            "seeds": [row.seed for row in each],
            "mean": _mean([row.measures for row in each]),
            "spread": _spread([row.measures for row in each]),
        }
        for each in groups.values()
    ]


def _spread(rows: Sequence[dict[str, float]]) -> dict[str, float] | None:
    if len(rows) < 2:
        return None
    return {key: float(np.std([row[key] for row in rows], ddof=1)) for key in rows[0]}
