"""The consistency loss of clips compares not the latents as they are but a representation of their motion.

Motion Consistency Model (arXiv 2406.06890): so that what a clip's frames look like is left to the
discriminator. Single Trajectory Distillation of video takes the learned one. Latents are ``[B, C, T, h, w]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from std_rt.training.distil.lora import Average
from std_rt.training.run.recipe import MotionConfig

__all__ = ["MotionHead", "Representation", "low_pass"]

WIDTH = 64
BLOCKS = 2
CUTOFF = 0.25  # of the highest frequency that frames have


class MotionHead(nn.Module):
    """1x1 convolutions on each frame, added to it; the last begins at zero, and so the whole as identity."""

    def __init__(self, channels: int, width: int = WIDTH) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 1))
            for _ in range(BLOCKS)
        )
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 1))
        for value in self.leave[2].parameters():
            nn.init.zeros_(value)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, h, w]`` -> the same shape, in the precision of the weights whatever autocast says."""
        with torch.autocast(x.device.type, enabled=False):
            frames = x.transpose(1, 2).flatten(0, 1).to(self.enter.weight)
            h = self.enter(frames)
            for block in self.blocks:
                h = h + block(h)
            h = frames + self.leave(h)
            return h.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def low_pass(frames: int) -> Tensor:
    """Matrix ``[T, T]`` that keeps a clip's mean and its frequencies up to ``CUTOFF`` of the highest."""
    spectrum = torch.fft.rfft(torch.eye(frames, dtype=torch.float64), dim=0)
    kept = torch.arange(len(spectrum)) <= CUTOFF * frames / 2
    return torch.fft.irfft(spectrum * kept[:, None], n=frames, dim=0).float()


class Representation:
    """What the two sides of the consistency loss become.

    ``head``, if there is one, is trained; the target's side takes ``average``, its moving average.
    """

    def __init__(self, config: MotionConfig, channels: int) -> None:
        self.kind = config.representation
        self.head = MotionHead(channels) if self.kind == "head" else None
        self.average = None if self.head is None else Average(dict(self.head.named_parameters()))
        low = low_pass(config.frames)
        self._filter = low if self.kind == "low" else torch.eye(config.frames) - low
        self._decay = config.head_decay

    def to(self, device: torch.device | str) -> Representation:
        """Moved in place."""
        self._filter = self._filter.to(device)
        if self.head is not None:
            self.head.to(device)
            self.average = Average(dict(self.head.named_parameters()))
        return self

    def student(self, x: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Of the student's x_s; ``head``: the own one, wrapped for several processes."""
        if self.head is None:
            return self._fixed(x)
        return (head or self.head)(x)

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        """Of the target's x_s."""
        if self.head is None or self.average is None:
            return self._fixed(x)
        made: Tensor = functional_call(self.head, self.average.tensors, (x,))
        return made

    def _fixed(self, x: Tensor) -> Tensor:
        match self.kind:
            case "difference":
                return x[:, :, 1:] - x[:, :, :-1]
            case "low" | "high":
                return torch.einsum("ts,bcshw->bcthw", self._filter, x)
            case _:
                return x

    def update(self) -> None:
        """After an optimizer step: one step of the moving average."""
        if self.average is not None:
            self.average.update(self._decay)
