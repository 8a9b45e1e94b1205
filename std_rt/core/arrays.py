"""Array types that cross module boundaries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Frame", "Size"]

Frame = NDArray[np.uint8]  # [H, W, 3] RGB, or a batch of them [B, H, W, 3]
Array = NDArray[np.float32]
Size = tuple[int, int]  # (H, W) in pixels
