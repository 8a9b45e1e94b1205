"""A schedule of ours beside the diffusers scheduler it is named after, driven as diffusers' pipelines do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from std_rt.core.samplers import evaluations, schedule_rows
from std_rt.core.schedule import NoiseSchedule, add_noise, step, to_eps

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

__all__ = ["SCHEDULE", "SDXL", "SHAPE", "Draws", "compare", "cut", "make_scheduler", "network"]

SCHEDULE = NoiseSchedule.scaled_linear()
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (1, 4, 3, 3)


def make_scheduler(kind: str, prediction_type: str) -> Any:
    """As the model cards make them: from SDXL's configuration, in which ``set_alpha_to_one`` is off."""
    match kind:
        case "diffusers" | "tcd":
            return diffusers.TCDScheduler(prediction_type=prediction_type, **SDXL)
        case "lcm" | "lcm_diffusers":
            return diffusers.LCMScheduler(prediction_type=prediction_type, **SDXL)
        case "ddim_trailing":
            return diffusers.DDIMScheduler(
                prediction_type=prediction_type,
                timestep_spacing="trailing",
                clip_sample=False,
                set_alpha_to_one=False,
                **SDXL,
            )
        case _:
            return diffusers.EulerDiscreteScheduler(
                prediction_type=prediction_type, timestep_spacing="trailing", **SDXL
            )


def network(x: Any, t: Any) -> Any:
    """Any function of the (scaled) latents and the timestep will do; float64."""
    return (0.4 + float(t) / 2000) * x + 0.05 * float(t) / 1000


class Draws:
    """Noise in the order in which a pipeline draws it."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.count = 0

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.count += 1
        return torch.from_numpy(self._rng.normal(size=SHAPE))


def cut(scheduler: Any, kind: str, steps: int, eta: float) -> Any:
    """Set timesteps as ``StableDiffusionXLImg2ImgPipeline.get_timesteps``, or by the scheduler's strength."""
    if kind in ("tcd", "lcm"):  # diffusers cuts int(50 eta), which binary rounding makes one too small
        scheduler.set_timesteps(steps, strength=eta + 1e-9 if eta < 1 else eta)
        return scheduler.timesteps
    scheduler.set_timesteps(steps)
    start = max(steps - min(int(steps * eta), steps), 0)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    return scheduler.timesteps[start * scheduler.order :]


def theirs(kind: str, prediction_type: str, steps: int, eta: float, gamma: float, patch: Any) -> Any:
    """Clean latents and timesteps by diffusers, in float64 as far as the scheduler has it."""
    scheduler, draws = make_scheduler(kind, prediction_type), Draws()
    timesteps = cut(scheduler, kind, steps, eta)
    patch.setattr(type(scheduler).__module__ + ".randn_tensor", draws)
    z = torch.from_numpy(np.random.default_rng(9).normal(size=SHAPE))
    x = scheduler.add_noise(z, draws(), timesteps[:1])
    for t in timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        extra = {"eta": gamma} if kind in ("diffusers", "tcd") else {}
        x = scheduler.step(output, t, x, **extra, return_dict=False)[0]
    return x.numpy(), [int(t) for t in timesteps]


def ours(kind: str, prediction_type: str, steps: int, eta: float, gamma: float) -> Any:
    rows, draws = schedule_rows(SCHEDULE, kind, eta, None, steps, gamma), Draws()
    z = np.random.default_rng(9).normal(size=SHAPE)
    x = add_noise(z, draws().numpy(), rows[0])
    for c in rows:
        eps = to_eps(network(x, c.timestep), x, c, prediction_type)
        x = step(x, eps, c, draws().numpy() if c.noise else None)
    return x, [c.timestep for c in rows]


def compare(kind: str, prediction_type: str, steps: int, eta: float, gamma: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        expected, walked = theirs(kind, prediction_type, steps, eta, gamma, patch)
    found, timesteps = ours(kind, prediction_type, steps, eta, gamma)
    assert timesteps == walked
    assert len(walked) == evaluations(kind, eta, steps)
    # Their schedules are float32, ours float64: 1e-5 is what that leaves.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
