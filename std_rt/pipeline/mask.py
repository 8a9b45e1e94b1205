"""The mask: where a picture is painted, and how the result is laid over the input.

    mask = Mask.read(Path("mask.png"))
    styled = stylizer.stylize(frame, mask=mask)

White is painted, black keeps the input bit for bit, grey mixes the two. All that is not black is painted
while denoising; how much of it is seen is decided in pixels, with an edge that fades inwards.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.core.arrays import Array, Frame, Size
from std_rt.core.errors import UsageError
from std_rt.media import fit
from std_rt.media.image import read_picture

__all__ = ["Mask", "unless_whole"]

_ASPECT_TOLERANCE = 0.02  # a small mask of a large picture has rounded sides
_EDGE = 1 / 128  # of the shorter side


class Mask:
    """Where to paint: uint8 [H, W], of the aspect of the pictures. Prepared sizes are remembered."""

    def __init__(self, values: NDArray[np.uint8]) -> None:
        """Raises UsageError unless ``values`` are uint8 [H, W]."""
        if (
            not isinstance(values, np.ndarray)
            or values.dtype != np.uint8
            or values.ndim != 2
            or not values.size
        ):
            found = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values)
            raise UsageError(f"a mask must be a uint8 array [H, W], white (255) where to paint, got {found}")
        self.values = values
        self._feeds: dict[Size, dict[str, Array]] = {}
        self._weights: dict[Size, tuple[Array, Array]] = {}

    @classmethod
    def read(cls, path: Path | str) -> Mask:
        """The brightness of a picture; what is transparent counts as black. Raises MediaError."""
        picture = read_picture(path)
        grey = cv2.cvtColor(picture.frame, cv2.COLOR_RGB2GRAY)
        # The frame lies over white: what that adds is taken off again.
        return cls(np.asarray(grey if picture.alpha is None else cv2.subtract(grey, 255 - picture.alpha)))

    @property
    def whole(self) -> bool:
        """White everywhere: the same as no mask."""
        return bool((self.values == 255).all())

    def check(self, shape: Size) -> None:
        """Raise UsageError unless pictures of ``shape`` (H, W) have the mask's aspect."""
        (h, w), (mask_h, mask_w) = shape, self.values.shape
        if abs(mask_w * h / (mask_h * w) - 1) > _ASPECT_TOLERANCE:
            raise UsageError(
                f"the mask is {mask_w}x{mask_h} px and the picture {w}x{h}; "
                "crop the mask to the aspect of the picture"
            )

    def feeds(self, size: Size, vae_scale: int) -> dict[str, Array]:
        """What a program takes at a working ``size``: ``mask`` [1, 1, h, w] of latents, ``image_mask``
        [1, 1, H, W] of pixels; 1 where to paint, 0 elsewhere. A latent is painted if any of its pixels is.
        """
        if size not in self._feeds:
            painted = (fit.resize(self.values, size) > 0).astype(np.float32)
            cells = painted.reshape(size[0] // vae_scale, vae_scale, size[1] // vae_scale, vae_scale)
            self._feeds[size] = {"mask": cells.max((1, 3))[None, None], "image_mask": painted[None, None]}
        return self._feeds[size]

    def composite(self, frame: Frame, styled: Frame) -> Frame:
        """``styled`` over ``frame`` (uint8 [H, W, 3]), at the size of ``frame``."""
        shape = (frame.shape[0], frame.shape[1])
        if shape not in self._weights:
            weight = self._opacity(shape)
            self._weights[shape] = weight, 1 - weight
        weight, rest = self._weights[shape]
        return np.asarray(cv2.blendLinear(fit.resize(styled, shape), frame, weight, rest), np.uint8)

    def _opacity(self, shape: Size) -> Array:
        """0..1 [H, W]: that of the mask, rising from 0 over a few pixels beside what is black."""
        values = fit.resize(self.values, shape)
        edge_px = max(1, round(min(shape) * _EDGE))
        distance = cv2.distanceTransform((values > 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        faded = np.minimum(1, distance / np.float32(edge_px + 1)) * (values * np.float32(1 / 255))
        return np.asarray(faded, np.float32)


def unless_whole(mask: Mask | None) -> Mask | None:
    """``mask`` itself; None for one that is white everywhere. Raises UsageError if it is no `Mask`."""
    if mask is not None and not isinstance(mask, Mask):
        raise UsageError("a mask must be a Mask, as Mask.read(Path('mask.png')) makes one")
    return None if mask is None or mask.whole else mask
