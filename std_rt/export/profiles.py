"""Profiles of published SDXL LoRAs: sampling settings that the files themselves do not record.

Values are those of the model cards and of the authors' demos. Rank and alpha are read from the file. A LoRA
distilled for N steps (``fixed_steps``) knows N timesteps; below eta 1 a bundle takes those of them that
diffusers' img2img pipeline would: `Profile.evaluations` gives their number.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from std_rt.core.errors import ExportError
from std_rt.core.samplers import evaluations

__all__ = ["PROFILES", "REFUSED", "Profile", "find_profile", "published_as"]


@dataclass(frozen=True)
class Profile:
    """How one published LoRA is run. ``gamma`` is stochasticity, ``guidance`` the range it was published for.

    ``schedule`` is what it is exported with and ``in_diffusers`` what StableDiffusionXLImg2ImgPipeline would
    do with its scheduler (``--schedule diffusers``), both of `core.samplers`. ``scale`` is the guidance to
    take by default (diffusers' scale; 1 is none).
    """

    name: str
    file: str  # where the weights are published
    schedule: str = "std"
    in_diffusers: str = "diffusers"
    eta: float = 0.75
    tau: int | None = None  # the start as a timestep; None: that of eta
    fixed: bool = False  # trained for this eta alone
    steps: tuple[int, ...] = (4, 2, 6, 8)  # the first is the default; diffusers' num_inference_steps
    fixed_steps: bool = False  # distilled for these steps alone
    gamma: float = 0.0
    guidance: tuple[float, float] = (1.0, 1.0)
    scale: float = 1.0

    def evaluations(self, steps: int, eta: float | None = None) -> int:
        """Steps really taken of ``steps`` at ``eta`` (None: the profile's)."""
        return evaluations(self.schedule, self.eta if eta is None else eta, steps)

    def remark(self, steps: int, eta: float) -> str | None:
        """A line for the user if not all of ``steps`` are taken, or others than it was distilled for."""
        known = ", ".join(map(str, self.steps))
        if self.fixed_steps and steps not in self.steps:
            return f"profile {self.name} was distilled for {known} steps, not for {steps}"
        taken = self.evaluations(steps, eta)
        if taken == steps:
            return None
        return f"profile {self.name}: {taken} of {steps} steps are taken at eta {eta:g}, as diffusers does"


def _trailing(name: str, file: str, steps: int, schedule: str = "ddim_trailing", **values: Any) -> Profile:
    """Distilled for one count of steps on trailing timesteps, without noise."""
    return Profile(name, file, schedule, in_diffusers=schedule, steps=(steps,), fixed_steps=True, **values)


_STD = "SecondComming/Single-Trajectory-Distillation: std_sdxl_i2i_eta"
_PCM = "wangfuyun/PCM_Weights: sdxl/pcm_sdxl"
_HYPER = "ByteDance/Hyper-SD: Hyper-SDXL"
_LIGHTNING = "ByteDance/SDXL-Lightning: sdxl_lightning"
_ALL = (
    *(
        # They start two grid steps above 1000 eta's, where they were trained.
        Profile(
            f"std-{eta}",
            f"{_STD}{eta}.safetensors",
            eta=eta,
            tau=tau,
            fixed=True,
            steps=(8, 4, 6),
            guidance=(2.0, 8.0),
            scale=6.0,
        )
        for eta, tau in ((0.65, 679), (0.75, 779), (0.85, 879), (0.95, 979))
    ),
    # TCDScheduler; more steps bear a higher gamma.
    Profile("tcd", "h1t/TCD-SDXL-LoRA", schedule="tcd", gamma=0.3),
    Profile(
        "lcm",
        "latent-consistency/lcm-lora-sdxl",
        schedule="lcm",
        in_diffusers="lcm_diffusers",
        gamma=1.0,
        guidance=(1.0, 2.0),
    ),
    # DDIM, trailing; one phase per step.
    *(
        _trailing(
            f"pcm-{kind}-{steps}step",
            f"{_PCM}_{kind}_{steps}step_converted.safetensors",
            steps,
            guidance=(scale, scale),
            scale=scale,
        )
        for kind, counts, scale in (("smallcfg", (2, 4, 8, 16), 1.0), ("normalcfg", (4, 8, 16), 7.5))
        for steps in counts
    ),
    # TDDScheduler, without its optional special jumps.
    Profile(
        "tdd",
        "RED-AIGC/TDD: sdxl_tdd_lora_weights.safetensors",
        schedule="tdd",
        in_diffusers="tdd",
        steps=(4, 5, 6, 7, 8),
        gamma=0.2,
        guidance=(1.7, 1.7),
        scale=1.7,
    ),
    # The unified LoRA, with TCDScheduler; a lower gamma gives more detail in several steps.
    Profile(
        "hyper-sdxl-1step",
        f"{_HYPER}-1step-lora.safetensors",
        schedule="tcd",
        steps=(1, 2, 4, 8),
        gamma=1.0,
    ),
    *(_trailing(f"hyper-sdxl-{n}steps", f"{_HYPER}-{n}steps-lora.safetensors", n) for n in (2, 4, 8)),
    *(
        _trailing(
            f"hyper-sdxl-{n}steps-cfg",
            f"{_HYPER}-{n}steps-CFG-lora.safetensors",
            n,
            guidance=(5.0, 8.0),
            scale=5.0,
        )
        for n in (8, 12)
    ),
    # Rank 64 with alpha 8, which the file says.
    *(
        _trailing(f"lightning-{n}step", f"{_LIGHTNING}_{n}step_lora.safetensors", n, "euler_trailing")
        for n in (2, 4, 8)
    ),
)
PROFILES: dict[str, Profile] = {profile.name: profile for profile in _ALL}

_VIDEO = "was trained in a UNet with a motion adapter, which std-rt does not export"

# Published LoRAs that a bundle cannot run, and why.
REFUSED: dict[str, str] = {f"std-v2v-{eta}": _VIDEO for eta in (0.65, 0.75, 0.85, 0.95)}


def find_profile(name: str) -> Profile:
    """A profile by name. Raises ExportError if there is none, or if a bundle cannot run it."""
    if name in PROFILES:
        return PROFILES[name]
    if name in REFUSED:
        raise ExportError(f"profile {name!r} cannot be exported: it {REFUSED[name]}")
    near = difflib.get_close_matches(name, [*PROFILES, *REFUSED], 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ExportError(f"unknown --profile {name!r}{hint} (there are {', '.join(PROFILES)})")


def published_as(path: Path) -> Profile | None:
    """The profile whose published file has the name of ``path``, or None.

    TCD's and LCM's LoRAs are published under a name that every LoRA has, and are not recognised.
    """
    for profile in PROFILES.values():
        _, _, file = profile.file.partition(": ")
        if file and file.rpartition("/")[2].lower() == path.name.lower():
            return profile
    return None
