"""Noise schedule, timestep grid and the one step ``t -> s`` that training and runtime share.

Terms: ``index`` is a position in the 50-point solver grid, ``timestep`` a value in 0..999; the two are
never mixed. ``eta`` is the share of the schedule at which the trajectory starts (diffusers'
``strength``), ``tau`` the timestep there, ``gamma`` the stochasticity of a step (TCD, arXiv 2402.19159).
NumPy only, float64 inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "GRID_POINTS",
    "NoiseSchedule",
    "StepCoefficients",
    "add_noise",
    "grid_timestep",
    "img2img_timesteps",
    "start_index",
    "start_timestep",
    "step",
    "to_eps",
    "trajectory_timesteps",
]

GRID_POINTS = 50
TRAIN_STEPS = 1000
_STRIDE = TRAIN_STEPS // GRID_POINTS
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

Array = NDArray[Any]


def grid_timestep(index: int) -> int:
    """Timestep of a grid index: ``20 (i + 1) - 1``, so 0..49 give 19, 39, ..., 999."""
    if not 0 <= index < GRID_POINTS:
        raise ValueError(f"grid index {index} is outside 0..{GRID_POINTS - 1}")
    return _STRIDE * (index + 1) - 1


def start_index(eta: float) -> int:
    """Grid index of the largest point with ``timestep <= 1000 eta``: ``floor(50 eta) - 1``."""
    if not 1 / GRID_POINTS <= eta <= 1:
        raise ValueError(f"eta must be in [{1 / GRID_POINTS}, 1], got {eta}")
    # The small term undoes binary rounding: 50 * 0.58 is 28.999...
    return int(np.floor(GRID_POINTS * eta + 1e-9)) - 1


def start_timestep(eta: float) -> int:
    """``tau``: the timestep at which the trajectory of ``eta`` starts (0.75 -> 739)."""
    return grid_timestep(start_index(eta))


def trajectory_timesteps(eta: float, steps: int, start: int | None = None) -> list[int]:
    """``steps`` timesteps from exactly ``tau`` downwards, evenly over the grid below it.

    The rule of diffusers' ``TCDScheduler.set_timesteps(steps, strength=eta)``. ``start`` overrides
    ``tau`` (a grid timestep) for LoRAs that were trained from another point. Raises ValueError if
    there are fewer grid points than steps.
    """
    last = start_index(eta) if start is None else (start + 1) // _STRIDE - 1
    if start is not None and grid_timestep(last) != start:
        raise ValueError(f"start timestep {start} is not on the grid 19, 39, ..., 999")
    if not 1 <= steps <= last + 1:
        raise ValueError(f"steps must be in 1..{last + 1} for eta {eta}, got {steps}")
    down = np.linspace(0, last + 1, num=steps, endpoint=False)
    return [grid_timestep(last - int(np.floor(i))) for i in down]


def img2img_timesteps(eta: float, steps: int) -> list[int]:
    """Timesteps of diffusers' img2img pipeline: the tail of a full schedule (for parity only).

    It starts at another noise level for every step count and so leaves the trained trajectory.
    """
    full = [
        grid_timestep(GRID_POINTS - 1 - int(np.floor(i))) for i in np.linspace(0, GRID_POINTS, steps, False)
    ]
    kept = min(int(steps * eta), steps)
    if kept < 1:
        raise ValueError(f"{steps} steps at eta {eta} leave no step to run; use more steps")
    return full[steps - kept :]


def _cumprod(betas: Array) -> NDArray[np.float64]:
    """``alphas_cumprod`` for these betas."""
    return np.asarray(np.cumprod(1 - betas.astype(np.float64)), np.float64)


def _zero_terminal_snr(alphas_cumprod: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nothing of the picture left at the last timestep (arXiv 2305.08891, algorithm 1)."""
    alpha = np.sqrt(alphas_cumprod)
    rescaled: NDArray[np.float64] = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return rescaled


@dataclass(frozen=True)
class NoiseSchedule:
    """``alphas_cumprod[t]`` for t in 0..999 (float64, falling), and the network's prediction type."""

    alphas_cumprod: NDArray[np.float64]
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type {self.prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}"
            )

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
        """The schedule of Stable Diffusion 1.x, 2.x and XL."""
        betas = np.linspace(beta_start**0.5, beta_end**0.5, TRAIN_STEPS) ** 2
        return cls(_cumprod(betas))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoiseSchedule:
        """From a diffusers ``scheduler_config.json``; ``trained_betas`` wins over the formula."""
        kind = config.get("prediction_type", "epsilon")
        if config.get("trained_betas") is not None:
            return cls(_cumprod(np.asarray(config["trained_betas"])), kind)
        start, end = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
        finish = _zero_terminal_snr if config.get("rescale_betas_zero_snr") else np.asarray
        match config.get("beta_schedule", "scaled_linear"):
            case "scaled_linear":
                return cls(finish(cls.scaled_linear(start, end).alphas_cumprod), kind)
            case "linear":
                return cls(finish(_cumprod(np.linspace(start, end, TRAIN_STEPS))), kind)
            case other:
                raise ValueError(
                    f"beta_schedule {other!r} is not supported: scaled_linear, linear or trained_betas"
                )

    def shifted(self, ratio: float) -> NoiseSchedule:
        """Shift the log-SNR by ``2 ln(ratio)`` (simple diffusion, arXiv 2301.11093, eq. 4).

        ``ratio`` is the latent side the schedule was made for over the one in use: 128 / 32 = 4 keeps
        at 32x32 the share of content that the original schedule keeps at 128x128.
        """
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod) * ratio**2
        return NoiseSchedule(snr / (1 + snr), self.prediction_type)

    def betas(self) -> NDArray[np.float64]:
        """The betas that give these alphas: what goes into ``trained_betas``."""
        before = np.concatenate([[1.0], self.alphas_cumprod[:-1]])
        betas: NDArray[np.float64] = 1 - self.alphas_cumprod / before
        return betas

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        """``(sqrt(ab_t), sqrt(1 - ab_t))``; timestep -1 is the clean end ``(1, 0)``."""
        if timestep == -1:
            return 1.0, 0.0
        ab = float(self.alphas_cumprod[timestep])
        return ab**0.5, (1 - ab) ** 0.5

    def coefficients(self, timesteps: list[int], gamma: float = 0.0) -> list[StepCoefficients]:
        """One entry per step: each timestep goes to the next, the last one to the clean estimate."""
        targets = [*timesteps[1:], -1]
        return [self.coefficient(t, s, gamma) for t, s in zip(timesteps, targets, strict=True)]

    def coefficient(self, t: int, s: int, gamma: float = 0.0) -> StepCoefficients:
        """The step from timestep ``t`` to ``s`` (-1: the clean estimate)."""
        alpha_t, sigma_t = self.alpha_sigma(t)
        alpha_s, sigma_s = self.alpha_sigma(s)
        # TCD, Algorithm 4: jump to s' = (1 - gamma) s, then re-noise from s' to s.
        alpha_m, sigma_m = (alpha_s, sigma_s) if s < 0 else self.alpha_sigma(int(np.floor((1 - gamma) * s)))
        keep = alpha_s / alpha_m
        noise = max(0.0, 1 - keep**2) ** 0.5
        return StepCoefficients(t, s, alpha_t, sigma_t, alpha_m * keep, sigma_m * keep, noise)


@dataclass(frozen=True)
class StepCoefficients:
    """``x_s = alpha_s x_0 + sigma_s eps + noise n`` with ``x_0 = (x_t - sigma_t eps) / alpha_t``.

    With gamma 0, ``noise`` is 0 and (alpha_s, sigma_s) lie on the schedule. ``target`` -1 is the end.
    """

    timestep: int
    target: int
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    noise: float = 0.0

    def affine(self) -> tuple[float, float]:
        """``(a, b)`` of the same step in one go: ``x_s = a x_t + b eps`` (without the noise term)."""
        a = self.alpha_s / self.alpha_t
        return a, self.sigma_s - a * self.sigma_t


def to_eps(output: Array, x_t: Array, c: StepCoefficients, prediction_type: str) -> Array:
    """Noise prediction from a network output of any prediction type; shapes as ``x_t``."""
    match prediction_type:
        case "epsilon":
            return output
        case "v_prediction":
            return c.alpha_t * output + c.sigma_t * x_t
        case "sample":
            return (x_t - c.alpha_t * output) / c.sigma_t
        case other:
            raise ValueError(f"prediction_type {other!r} is not one of {', '.join(PREDICTION_TYPES)}")


def step(x_t: Array, eps: Array, c: StepCoefficients, noise: Array | None = None) -> Array:
    """One step ``t -> s``; ``noise`` (shape of ``x_t``) is needed only if ``c.noise`` is not 0."""
    a, b = c.affine()
    x_s = a * x_t + b * eps
    if c.noise:
        if noise is None:
            raise ValueError("a step with gamma > 0 needs noise")
        x_s = x_s + c.noise * noise
    return x_s


def add_noise(x_0: Array, noise: Array, c: StepCoefficients) -> Array:
    """``x_t`` at the timestep of ``c``: ``alpha_t x_0 + sigma_t noise``."""
    return c.alpha_t * x_0 + c.sigma_t * noise
