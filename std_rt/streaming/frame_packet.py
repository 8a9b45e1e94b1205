"""A frame on its way from the source to the screen."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["FramePacket"]

Frame = NDArray[np.uint8]


@dataclass(eq=False, slots=True)
class FramePacket:
    """One frame uint8 [H, W, 3] and what became of it; handed from thread to thread, used by one at a time.

    captured_s: when the source had it. painted_s: when the style it was painted in was looked up. styled:
    the result, None before. skipped: it shows the result of an earlier frame, for it hardly differed.
    stages_ms: what each stage took.
    """

    frame: Frame
    captured_s: float = 0.0
    index: int = 0
    painted_s: float = 0.0
    styled: Frame | None = None
    skipped: bool = False
    stages_ms: dict[str, float] = field(default_factory=dict)
