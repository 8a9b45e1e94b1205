"""Masked runs: any student or teacher stylizes only inside a mask, without being trained for it.

After each step the latents outside are put back on the content's own trajectory (the content, noised to
the level that was reached), so that inside and outside stay one picture; at the end the content's own
pixels return outside, exactly. Masks are bool [H, W], True = stylize.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from std_rt.core.schedule import NoiseSchedule
from std_rt.training.data.picture_set import Frame
from std_rt.training.distil.sampling import After

__all__ = ["composite", "keep_outside", "latent_mask", "outside_difference"]

Mask = NDArray[np.bool_]


def latent_mask(mask: Mask, size: tuple[int, int]) -> Tensor:
    """``[1, 1, h, w]`` of 0 and 1; a latent is inside if any of its pixels is.

    ``composite`` trims what spills over the mask's edge, pixel by pixel.
    """
    pixels = torch.from_numpy(mask).float()[None, None]
    return F.adaptive_max_pool2d(pixels, size)


def keep_outside(schedule: NoiseSchedule, z: Tensor, noise: Tensor, inside: Tensor) -> After:
    """The hook after each step: outside becomes ``alpha z + sigma noise`` of the step's target.

    ``z``, ``noise`` [B, C, h, w]: the content's latents and the noise that the run started with;
    ``inside`` [1, 1, h, w].
    """

    def after(x: Tensor, timestep: int) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(timestep)
        return inside * x + (1 - inside) * (alpha * z + sigma * noise)

    return after


def composite(frame: Frame, content: Frame, mask: Mask) -> Frame:
    """``frame`` inside the mask, ``content`` outside, bit for bit."""
    return np.where(mask[..., None], frame, content)


def outside_difference(frame: Frame, content: Frame, mask: Mask) -> int:
    """Largest difference (0..255) of any value outside the mask; 0 if there is no outside."""
    off: Any = np.abs(frame.astype(np.int16) - content)[~mask]
    return int(off.max(initial=0))
