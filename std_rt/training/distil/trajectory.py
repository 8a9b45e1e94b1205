"""The maths of one distillation step, pure and batched: every sample has its own t, s and guidance.

``index`` counts the 50 solver points (0..49), -1 is the clean end. One deterministic step:
``x_s = alpha_s x_0 + sigma_s eps`` (DDIM; Single Trajectory Distillation, arXiv 2412.18945, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from std_rt.core.schedule import GRID_POINTS, NoiseSchedule, grid_timestep, trajectory_timesteps

__all__ = [
    "CLEAN",
    "METHODS",
    "Levels",
    "content_share",
    "draw_start",
    "draw_target",
    "jump",
    "last_index",
    "phase_edges",
    "pseudo_huber",
    "randint",
    "run_indices",
    "send",
    "to_x0_eps",
    "trajectory_state",
]

METHODS = ("std", "tcd", "lcm", "pcm", "mcm", "dmd")
CLEAN = -1


@dataclass(frozen=True)
class Levels:
    """alpha, sigma and timestep of every grid index as tensors; index -1 is the clean end (1, 0)."""

    tau_index: int
    timesteps: Tensor  # [51]; the first entry, of the clean end, is 0
    alphas: Tensor
    sigmas: Tensor
    device: torch.device | str = "cpu"  # of what the methods return
    dims: int = 4  # of the latents that they are multiplied with: 5 of clips

    @classmethod
    def of(cls, schedule: NoiseSchedule, tau: int, dims: int = 4) -> Levels:
        """For trajectories from the grid timestep ``tau``, of latents with so many ``dims``."""
        grid = [grid_timestep(i) for i in range(GRID_POINTS)]
        pairs = [schedule.alpha_sigma(t) for t in (-1, *grid)]
        alphas, sigmas = (torch.tensor(v, dtype=torch.float32) for v in zip(*pairs, strict=True))
        return cls(grid.index(tau), torch.tensor([0, *grid]), alphas, sigmas, dims=dims)

    def to(self, device: torch.device | str) -> Levels:
        """The same, with what it returns on ``device``.

        The tables stay on the CPU, as the indices do: a GPU's table, asked with them, waits for the GPU.
        """
        return replace(self, device=device)

    def timestep(self, index: Tensor) -> Tensor:
        """``[B]`` -> ``[B]``; the clean end is asked for as timestep 0."""
        return send(self.timesteps[index + 1], self.device)

    def alpha(self, index: Tensor) -> Tensor:
        """``[B]`` -> ``[B, 1, 1, 1]``, of clips ``[B, 1, 1, 1, 1]``."""
        return send(self.column(self.alphas[index + 1]), self.device)

    def sigma(self, index: Tensor) -> Tensor:
        """As `alpha`."""
        return send(self.column(self.sigmas[index + 1]), self.device)

    def column(self, values: Tensor) -> Tensor:
        """``[B]`` in the shape that multiplies latents row by row."""
        return values.view(-1, *[1] * (self.dims - 1))


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on a device. What goes to a GPU it fetches from page-locked memory by itself: nobody waits."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def to_x0_eps(
    output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Clean estimate and noise from a network output of any prediction type."""
    match prediction_type:
        case "epsilon":
            return (x - sigma * output) / alpha, output
        case "v_prediction":
            return alpha * x - sigma * output, alpha * output + sigma * x
        case "sample":
            # At the clean end sigma is 0, and so is what eps is multiplied with later.
            return output, (x - alpha * output) / sigma.clamp(min=1e-6)
        case other:
            raise ValueError(f"unknown prediction_type {other!r}")


def jump(x_0: Tensor, eps: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """``x_s`` on the straight DDIM step."""
    return alpha_s * x_0 + sigma_s * eps


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """``sqrt((a - b)^2 + c^2) - c``, mean over everything but the batch: ``[B]``."""
    return ((a - b).square() + c * c).sqrt().sub(c).flatten(1).mean(1)


def last_index(tau: int, run_steps: tuple[int, ...]) -> int:
    """The lowest grid index that a run of any supported step count visits."""
    return min(run_indices(tau, n)[-1] for n in run_steps)


def phase_edges(tau: int, phases: int) -> tuple[int, ...]:
    """Grid indices where the phases of PCM (arXiv 2405.18407) end, falling; the last is the clean end."""
    return (*run_indices(tau, phases)[1:], CLEAN)


def run_indices(tau: int, steps: int) -> list[int]:
    """Grid indices that a run of so many steps visits, falling."""
    return [(t + 1) // 20 - 1 for t in trajectory_timesteps(1.0, steps, start=tau)]


def randint(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Integers uniform in ``[low, high]`` per entry (LongTensors on CPU)."""
    span = high - low + 1
    return low + (torch.rand(low.shape, generator=generator, dtype=torch.float64) * span).long()


def draw_start(method: str, tau_index: int, last: int, batch: int, generator: torch.Generator) -> Tensor:
    """Where fresh samples enter: STD and DMD at tau only, the others at any grid point up to tau. ``[B]``."""
    top = torch.full((batch,), tau_index)
    return top if method in ("std", "dmd") else randint(torch.full((batch,), last), top, generator)


def draw_target(
    method: str,
    t_index: Tensor,
    window: int,
    edges: tuple[int, ...],
    generator: torch.Generator,
    stride: Tensor | int = 1,
) -> Tensor:
    """Index of s for every t (the table of methods): always below t, possibly the clean end. ``[B]``.

    With a ``stride`` (at most ``window``) the random ones lie at most where one teacher step arrives.
    """
    clean = torch.full_like(t_index, CLEAN)
    below = (t_index - stride).clamp(min=CLEAN)
    match method:
        case "std":
            return randint((t_index - window).clamp(min=CLEAN), below, generator)
        case "tcd":
            return randint(clean, below, generator)
        case "lcm" | "mcm" | "dmd":
            return clean
        case "pcm":
            falls = torch.tensor(edges)
            lower = falls[None, :] < t_index[:, None]
            return falls[lower.int().argmax(1)]
        case other:
            raise ValueError(f"unknown method {other!r}")


def content_share(levels: Levels, index: Tensor) -> Tensor:
    """``k = NSR(t) / NSR(tau)``, shaped as `Levels.alpha`: how much of the start's content a state at t has.

    DDIM from a start that holds content c while the clean estimate is z passes
    ``x_t = alpha_t ((1 - k) z + k c) + sigma_t n``: so a state at any t is made without solving. Where c is
    z itself this is plain forward noising.
    """
    tau = torch.tensor([levels.tau_index], device=index.device)
    top = levels.sigma(tau) / levels.alpha(tau)
    return (levels.sigma(index) / levels.alpha(index) / top).clamp(max=1.0)


def trajectory_state(levels: Levels, index: Tensor, clean: Tensor, content: Tensor, noise: Tensor) -> Tensor:
    """The state at ``index [B]`` on the way from ``content`` to ``clean`` (latents); see `content_share`."""
    k = content_share(levels, index)
    return levels.alpha(index) * ((1 - k) * clean + k * content) + levels.sigma(index) * noise
