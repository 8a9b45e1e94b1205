"""Array types that cross module boundaries, and sizes as they are typed."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import UsageError

__all__ = ["Array", "Frame", "Size", "parse_size"]

Frame = NDArray[np.uint8]  # [H, W, 3] RGB, or a batch of them [B, H, W, 3]
Array = NDArray[np.float32]
Size = tuple[int, int]  # (H, W) in pixels


def parse_size(text: str) -> int | Size:
    """``512`` -> 512, ``512x384`` (WIDTHxHEIGHT) -> (384, 512). Raises UsageError on anything else."""
    match = re.fullmatch(r"(\d{1,6})(?:[xX](\d{1,6}))?", text.strip())
    if match is None or int(match[1]) == 0 or (match[2] and int(match[2]) == 0):
        shown = repr(text)[:40]
        raise UsageError(f"{shown} is not a size; use pixels such as 512, or WIDTHxHEIGHT such as 512x384")
    return (int(match[2]), int(match[1])) if match[2] else int(match[1])
