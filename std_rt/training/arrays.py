"""Array types of the training code.

OpenCV's stubs return an array of "integer or floating", which fits no precise type; so these say what
is meant, not what is checked: a frame is uint8 ``[H, W, 3]`` RGB, an image float32 in [0, 1].
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

Frame = NDArray[Any]
Image = NDArray[Any]
