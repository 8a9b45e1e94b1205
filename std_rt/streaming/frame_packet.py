"""A frame packet: one frame with its times and its result, from source to screen."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["FramePacket"]

Frame = NDArray[np.uint8]


@dataclass(eq=False, slots=True)
class FramePacket:
    """One frame uint8 [H, W, 3] with its result; handed from thread to thread, used by one at a time.

    ``captured_s``: when the source had it. ``style_s``: when its style was looked up. ``styled``: the result,
    None until there is one. ``skipped``: it shows the result of an earlier, similar frame. ``stages_ms``: the
    duration of each stage.
    """

    frame: Frame
    captured_s: float = 0.0
    index: int = 0
    style_s: float = 0.0
    styled: Frame | None = None
    skipped: bool = False
    stages_ms: dict[str, float] = field(default_factory=dict)
