"""The reference denoising loop: every engine, program and batching mode must reproduce it.

    image = img2img(image, encode, predict, decode, noise=noise, steps=bundle.coefficients(4))

Symbols as in Single Trajectory Distillation (arXiv 2412.18945): ``z`` the content's latents, ``x_t`` the
noisy latents at timestep ``t``, ``eps`` the predicted noise, ``w`` the guidance scale. Arrays are NumPy's or
torch's: only arithmetic is used. `program_builder` compiles the same loop into a fixed list of launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from std_rt.core.schedule import StepCoefficients, add_noise, step, to_eps

__all__ = ["GUIDANCE_MODES", "Guidance", "denoise", "gap_share", "guided", "img2img", "noise_draws"]

Array = Any  # NDArray or Tensor
Predict = Callable[[Array, int, bool], Array]  # (x_t, timestep, with the negative prompt) -> network output

GUIDANCE_MODES = ("none", "full", "residual")
_FADE_POWER = 4  # of the noise level, measured on std-tiny


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598); ``scale`` is diffusers' guidance scale, 1 is none.

    ``full`` asks the network for both branches in every step. ``residual`` asks for the negative one in the
    first step only and carries the gap ``eps - eps_negative`` on, fading with the noise: one more evaluation
    per frame than ``none``. (StreamDiffusion, arXiv 2312.12491, keeps the first step's clean estimate as the
    negative instead; on a trajectory that reaches x_0 that gap never closes, and std-tiny's pictures came
    out farther from ``full`` than without guidance.) Raises ValueError if mode and scale disagree.
    """

    mode: str = "none"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in GUIDANCE_MODES:
            raise ValueError(f"unknown guidance mode {self.mode!r}; use one of {', '.join(GUIDANCE_MODES)}")
        if not 1 <= self.scale < float("inf") or (self.mode == "none" and self.scale != 1):
            raise ValueError(f"guidance scale {self.scale:g} does not fit mode {self.mode!r}")


def gap_share(c: StepCoefficients, first: StepCoefficients) -> float:
    """Share of the first step's gap that residual guidance keeps in the step of ``c``, 0..1."""
    return (c.sigma_t / first.sigma_t) ** _FADE_POWER


def noise_draws(steps: Sequence[StepCoefficients]) -> int:
    """Noise draws per frame: one to start from, and one for every stochastic step."""
    return 1 + sum(1 for c in steps if c.noise)


def guided(
    x_t: Array, c: StepCoefficients, predict: Predict, prediction_type: str, guidance_scale: float
) -> tuple[Array, Array]:
    """The noise predicted with guidance, from both prompts, and the gap between the two predictions."""
    eps = to_eps(predict(x_t, c.timestep, False), x_t, c, prediction_type)
    eps_negative = to_eps(predict(x_t, c.timestep, True), x_t, c, prediction_type)
    gap = eps - eps_negative
    return eps_negative + guidance_scale * gap, gap


def denoise(
    z: Array,
    predict: Predict,
    *,
    noise: Sequence[Array],
    steps: Sequence[StepCoefficients],
    prediction_type: str = "epsilon",
    guidance: Guidance = Guidance(),
    after: Callable[[Array, int], Array] | None = None,
) -> Array:
    """Latents ``z`` [B, C, h, w] along the trajectory, to the clean latents of the last step.

    ``noise``: `noise_draws` arrays of the shape of ``z``. ``after(x, timestep)`` may change the latents
    after each step (timestep -1: clean), as for a mask.
    """
    first, w = steps[0], guidance.scale
    gap: Array = None
    start, *fresh = noise
    x_t = add_noise(z, start, first)
    for c in steps:
        if guidance.mode == "full" or (guidance.mode == "residual" and gap is None):
            eps, gap = guided(x_t, c, predict, prediction_type, w)
        else:
            eps = to_eps(predict(x_t, c.timestep, False), x_t, c, prediction_type)
            if guidance.mode == "residual":
                eps = eps + (w - 1) * gap_share(c, first) * gap
        x_t = step(x_t, eps, c, fresh.pop(0) if c.noise else None)
        x_t = x_t if after is None else after(x_t, c.target)
    return x_t


def img2img(
    image: Array,
    encode: Callable[[Array], Array],
    predict: Predict,
    decode: Callable[[Array], Array],
    **trajectory: Any,
) -> Array:
    """An image [B, 3, H, W] in [-1, 1], stylized. ``trajectory``: the keywords of `denoise`."""
    return decode(denoise(encode(image), predict, **trajectory))
