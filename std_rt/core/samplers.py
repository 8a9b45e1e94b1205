"""The samplers that published few-step LoRAs were made for, as rows of coefficients.

    rows = schedule_rows(NoiseSchedule.scaled_linear(), "euler_trailing", eta=0.75, steps=4)

Each is one linear step at a time, so `StepCoefficients` holds all of them: ``x_s = a x_t + b eps + noise n``.
Two need explaining. LCM scales its clean estimate towards ``x_t`` near the end (``c_skip``, ``c_out``),
which only changes a and b. Euler works on ``x_t / alpha_t`` and scales the network's input; written for
``x_t`` itself (variance preserving) that scaling is gone, and with it every difference from DDIM to the next
timestep.

Where the sampling starts differs too. ``std``, ``tcd`` and ``lcm`` take all their steps below ``eta``. The
others cut a full schedule as diffusers' img2img pipelines do: of N steps, ``int(N eta)`` are taken, from
another noise level for every N. LoRAs distilled for N steps know only those timesteps.

NumPy only, float64. Tested against diffusers' schedulers, except ``tdd``, which diffusers lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from std_rt.core.schedule import (
    TRAIN_STEPS,
    NoiseSchedule,
    StepCoefficients,
    img2img_timesteps,
    trajectory_timesteps,
)

__all__ = ["SCHEDULES", "evaluations", "schedule_rows", "takes_all"]

Rows = list[StepCoefficients]

_LCM_SIGMA_DATA = 0.5  # diffusers' LCMScheduler: sigma_data and timestep_scaling
_LCM_TIMESTEP_SCALING = 10.0
_TDD_POINTS = 250  # TDDScheduler's tdd_train_step: the grid 3, 7, ..., 999


@dataclass(frozen=True)
class _Sampler:
    """``rows`` makes steps of (schedule, timesteps, steps asked for, gamma)."""

    title: str
    rows: Callable[[NoiseSchedule, list[int], int, float], Rows]
    full: Callable[[int], list[int]] | None = None  # the schedule that is cut; None: all steps below eta
    gamma: float | None = None  # the only one it has; None: any in [0, 1]


def schedule_rows(
    schedule: NoiseSchedule,
    kind: str,
    eta: float,
    tau: int | None = None,
    steps: int = 4,
    gamma: float = 0.0,
) -> list[StepCoefficients]:
    """The steps that ``kind`` (of `SCHEDULES`) takes, as many as `evaluations` says.

    ``eta`` is where it starts (diffusers' ``strength``), ``steps`` diffusers' ``num_inference_steps``.
    ``tau`` overrides the start of a schedule that takes all its steps. ``gamma`` is the stochasticity
    of ``std``, ``diffusers``, ``tcd`` and ``tdd``; that of LCM is 1, of DDIM and Euler 0. Raises ValueError
    if these do not fit together.
    """
    sampler = _sampler(kind)
    if not 0 <= gamma <= 1 or sampler.gamma not in (None, gamma):
        allowed = "in 0..1" if sampler.gamma is None else f"{sampler.gamma:g}"
        raise ValueError(f"the gamma of sampler {kind!r} must be {allowed}, got {gamma:g}")
    timesteps = _timesteps(kind, sampler, eta, tau, steps)
    if schedule.alpha_sigma(timesteps[0])[0] == 0:
        raise ValueError(
            f"timestep {timesteps[0]} of this schedule is pure noise (zero terminal SNR); use a lower eta"
        )
    return sampler.rows(schedule, timesteps, steps, gamma)


def evaluations(kind: str, eta: float, steps: int) -> int:
    """Steps actually taken if ``steps`` are asked for: all of them, or diffusers' ``int(steps eta)``."""
    return steps if _sampler(kind).full is None else min(int(steps * eta), steps)


def takes_all(kind: str) -> bool:
    """Whether all steps asked for are taken below eta; else a full schedule is cut, as diffusers does."""
    return _sampler(kind).full is None


def _sampler(kind: str) -> _Sampler:
    if kind not in SCHEDULES:
        raise ValueError(f"unknown sampler {kind!r}; use one of {', '.join(SCHEDULES)}")
    return _SAMPLERS[kind]


def _timesteps(kind: str, sampler: _Sampler, eta: float, tau: int | None, steps: int) -> list[int]:
    if sampler.full is None:
        return trajectory_timesteps(eta, steps, tau)
    if not 0 < eta <= 1 or not 1 <= steps <= TRAIN_STEPS:
        raise ValueError(f"eta must be in (0, 1] and steps in 1..{TRAIN_STEPS}, got {eta:g} and {steps}")
    kept = evaluations(kind, eta, steps)
    if kept < 1:
        raise ValueError(f"{steps} steps at eta {eta:g} leave no step to run; use more steps")
    timesteps = sampler.full(steps)[steps - kept :]
    if len(set(timesteps)) < kept or timesteps[-1] < 0:
        raise ValueError(f"sampler {kind!r} does not have {steps} different timesteps; use fewer steps")
    if tau not in (None, timesteps[0]):
        raise ValueError(f"sampler {kind!r} starts at timestep {timesteps[0]} in {steps} steps, not at {tau}")
    return timesteps


def _trailing(steps: int) -> list[int]:
    """diffusers' ``timestep_spacing='trailing'``: 999 and down in even parts, without 0."""
    points = np.arange(TRAIN_STEPS, 0, -TRAIN_STEPS / steps)[:steps]  # rounding may leave one too many
    return [int(point) - 1 for point in np.round(points)]


def _tdd_grid(steps: int) -> list[int]:
    """TDDScheduler's timesteps (arXiv 2409.01347), without its optional special jumps."""
    stride = TRAIN_STEPS // _TDD_POINTS
    points = [_TDD_POINTS - int(np.floor(i)) for i in np.linspace(0, _TDD_POINTS, steps, endpoint=False)]
    return [stride * point - 1 for point in points]


def _to_clean(schedule: NoiseSchedule, timesteps: list[int], steps: int, gamma: float) -> Rows:
    """From timestep to timestep, and the last one to the clean estimate."""
    return schedule.coefficients(timesteps, gamma)


def _to_zero(schedule: NoiseSchedule, timesteps: list[int], steps: int, gamma: float) -> Rows:
    """TCDScheduler: the last step goes to timestep 0, and its small amount of noise stays in."""
    pairs = zip(timesteps, [*timesteps[1:], 0], strict=True)
    return [schedule.coefficient(t, s, gamma) for t, s in pairs]


def _ddim(schedule: NoiseSchedule, timesteps: list[int], steps: int, gamma: float) -> Rows:
    """DDIMScheduler: each step goes down ``1000 // steps``, which is not always the next timestep.

    The end is timestep 0 (``set_alpha_to_one`` is off in SDXL's configuration).
    """
    stride = TRAIN_STEPS // steps
    return [schedule.coefficient(t, max(t - stride, 0)) for t in timesteps]


def _lcm(schedule: NoiseSchedule, timesteps: list[int], steps: int, gamma: float) -> Rows:
    """LCMScheduler: ``c_out x_0 + c_skip x_t``, then new noise, but not at the end."""
    rows = []
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        alpha, noise = schedule.alpha_sigma(s)
        scaled = (t * _LCM_TIMESTEP_SCALING) ** 2 + _LCM_SIGMA_DATA**2
        skip, out = _LCM_SIGMA_DATA**2 / scaled, t * _LCM_TIMESTEP_SCALING / scaled**0.5
        # out x_0 + skip x_t, with x_t = alpha_t x_0 + sigma_t eps
        x_0, eps = alpha * (out + skip * alpha_t), alpha * skip * sigma_t
        rows.append(StepCoefficients(t, s, alpha_t, sigma_t, x_0, eps, noise))
    return rows


_full_grid = partial(img2img_timesteps, 1.0)
_SAMPLERS: dict[str, _Sampler] = {
    "std": _Sampler("single trajectory: from tau down, to the clean estimate", _to_clean),
    "diffusers": _Sampler("TCDScheduler in an img2img pipeline", _to_zero, _full_grid),
    "tcd": _Sampler("TCDScheduler, its steps below eta", _to_zero),
    "lcm": _Sampler("LCMScheduler, its steps below eta", _lcm, gamma=1.0),
    "lcm_diffusers": _Sampler("LCMScheduler in an img2img pipeline", _lcm, _full_grid, 1.0),
    "ddim_trailing": _Sampler("DDIMScheduler, trailing", _ddim, _trailing, 0.0),
    "euler_trailing": _Sampler("EulerDiscreteScheduler, trailing", _to_clean, _trailing, 0.0),
    "tdd": _Sampler("TDDScheduler", _to_clean, _tdd_grid),
}
# Name -> description, for help texts.
SCHEDULES: dict[str, str] = {kind: sampler.title for kind, sampler in _SAMPLERS.items()}
