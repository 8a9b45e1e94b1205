"""Where published SDXL LoRAs start and how they are sampled: they carry no notes of their own.

Values are those of the model cards. What a bundle's schedule (steps over the 50-point grid, each from the
last to the next) cannot do is listed too, with the reason, and refused: a wrong schedule gives a picture,
only a worse one. Rank and alpha are not here: fusing reads them from the file.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from std_rt.errors import ExportError

__all__ = ["PROFILES", "REFUSED", "Profile", "find_profile"]


@dataclass(frozen=True)
class Profile:
    """How one published LoRA is run. ``guidance`` is diffusers' scale (1: none), ``gamma`` stochasticity."""

    name: str
    file: str  # where the weights are published
    eta: float = 0.75
    tau: int | None = None  # the start as a timestep; None: that of eta
    fixed: bool = False  # trained for this eta alone
    steps: tuple[int, ...] = (4, 2, 6, 8)  # the first is the default
    gamma: float = 0.0
    guidance: tuple[float, float] = (1.0, 1.0)
    note: str = ""


def _std(eta: float, tau: int) -> Profile:
    return Profile(
        name=f"std-{eta}",
        file=f"SecondComming/Single-Trajectory-Distillation: std_sdxl_i2i_eta{eta}.safetensors",
        eta=eta,
        tau=tau,
        fixed=True,
        steps=(8, 4, 6),
        guidance=(2.0, 8.0),
        note="starts two grid steps above 1000 eta's, where it was trained",
    )


_ALL = (
    _std(0.65, 679),
    _std(0.75, 779),
    _std(0.85, 879),
    _std(0.95, 979),
    Profile(
        name="tcd",
        file="h1t/TCD-SDXL-LoRA",
        steps=(4, 2, 6, 8),
        gamma=0.3,
        note="TCDScheduler; more steps bear a higher gamma",
    ),
    Profile(
        name="lcm",
        file="latent-consistency/lcm-lora-sdxl",
        steps=(4, 2, 6, 8),
        gamma=1.0,
        guidance=(1.0, 2.0),
        note="LCMScheduler: noise is drawn again in every step",
    ),
    Profile(
        name="hyper-sdxl-1step",
        file="ByteDance/Hyper-SD: Hyper-SDXL-1step-lora.safetensors",
        steps=(1, 2, 4, 8),
        gamma=1.0,
        note="the unified LoRA, with TCDScheduler; a lower gamma gives more detail in several steps",
    ),
)
PROFILES: dict[str, Profile] = {profile.name: profile for profile in _ALL}

_TRAILING = "is sampled by {} with timestep_spacing 'trailing', whose timesteps lie off the 50-point grid"
_DDIM, _EULER = _TRAILING.format("DDIM"), _TRAILING.format("Euler")
_VIDEO = "was trained in a UNet with a motion adapter, which std-rt does not export"

# Published LoRAs that a bundle's schedule cannot run, and why.
REFUSED: dict[str, str] = {
    **{f"std-v2v-{eta}": _VIDEO for eta in (0.65, 0.75, 0.85, 0.95)},
    **{f"pcm-{cfg}": _DDIM for cfg in ("smallcfg", "normalcfg")},
    **{f"hyper-sdxl-{kind}": _DDIM for kind in ("2steps", "4steps", "8steps", "8steps-cfg", "12steps-cfg")},
    **{f"lightning-{count}step": _EULER for count in (2, 4, 8)},
    "tdd": "is sampled by a scheduler of its own (TDDScheduler)",
}


def find_profile(name: str) -> Profile:
    """A profile by name. Raises ExportError where there is none, or where a bundle cannot run it."""
    if name in PROFILES:
        return PROFILES[name]
    if name in REFUSED:
        raise ExportError(f"profile {name!r} cannot be exported: it {REFUSED[name]}")
    near = difflib.get_close_matches(name, [*PROFILES, *REFUSED], 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ExportError(f"unknown --profile {name!r}{hint} (there are {', '.join(PROFILES)})")
