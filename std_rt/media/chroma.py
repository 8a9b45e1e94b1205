"""Keeping the colours of a picture: its chroma, with the lightness of its stylized version.

In CIELAB (D65), because L* depends on luminance alone: the result has exactly the light and dark of the
stylized picture, hence its drawing and brushwork. (In the Y'CbCr of video the luminance changes where colours
are saturated: by 0.6 L* in the mean and up to 22 on the example pictures.) To replace L* under the same a*
and b* is to add one number to the three cube roots of a pixel, so Lab itself is never computed. Its toe
matters: a plain cube root, as in Oklab, amplifies the colour noise of dark pixels that the style makes light.

A colour that sRGB does not have at the new lightness is mixed with the grey of the same luminance until it
just fits: chroma gives way, luminance does not. Clipped channels would change hue and lightness.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from std_rt.core.arrays import Frame
from std_rt.media import fit

__all__ = ["keep_colours"]

_XYZ = np.array(  # linear sRGB -> XYZ (IEC 61966-2-1), below relative to the white
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)
_TO_XYZ = (_XYZ / _XYZ.sum(1, keepdims=True)).astype(np.float32)
_FROM_XYZ = np.linalg.inv(_XYZ / _XYZ.sum(1, keepdims=True)).astype(np.float32)
_LEVELS = np.arange(256) / 255
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4).astype(np.float32)

_TOE = 6 / 29  # of CIELAB: below its cube, the cube root continues as its tangent
_SLOPE = 1 / (3 * _TOE**2)
_DARK = 0.0031308  # of sRGB: below it, the curve is a line
_STRIP_PX = 1 << 15  # a strip's arrays stay in the cache of a core: twice as fast at 1024 px


def keep_colours(photo: Frame, styled: Frame) -> Frame:
    """``styled`` (uint8 [H, W, 3] sRGB) in the colours of ``photo`` (uint8 [h, w, 3], resized to it).

    Luminance is that of ``styled``; hue and chroma are the photo's, with less chroma where sRGB has no more.
    """
    height, width = styled.shape[:2]
    photo = fit.resize(photo, (height, width))
    result = np.empty_like(styled)
    rows = max(1, _STRIP_PX // width)
    for top in range(0, height, rows):
        strip = slice(top, top + rows)
        result[strip] = _recoloured(photo[strip], styled[strip])
    return result


def _recoloured(photo: Frame, styled: Frame) -> Frame:
    roots = _root(cv2.transform(cv2.LUT(photo, _LINEAR), _TO_XYZ))
    luminance = cv2.transform(cv2.LUT(styled, _LINEAR), _TO_XYZ[1:2]).reshape(styled.shape[:2])
    roots += (_root(luminance) - roots[..., 1])[..., None]
    channels = cv2.split(cv2.transform(_cube(roots), _FROM_XYZ))
    above = np.maximum.reduce(channels) - luminance
    below = luminance - np.minimum.reduce(channels)
    room = np.minimum((1 - luminance) / np.maximum(above, 1e-6), luminance / np.maximum(below, 1e-6))
    kept = np.minimum(room, 1)
    return _encoded(cv2.merge([luminance + kept * (channel - luminance) for channel in channels]))


def _root(value: Any) -> Any:
    """CIELAB's f: the cube root of tristimulus values."""
    root = cv2.pow(np.maximum(value, _TOE**3), 1 / 3)
    return cv2.addWeighted(root, 1, np.minimum(value, _TOE**3), _SLOPE, -_SLOPE * _TOE**3)


def _cube(root: Any) -> Any:
    """The inverse of `_root`."""
    above = np.maximum(root, _TOE)
    return cv2.addWeighted(above * above * above, 1, np.minimum(root, _TOE), 1 / _SLOPE, -_TOE / _SLOPE)


def _encoded(linear: Any) -> Frame:
    """Linear sRGB, 0..1, as uint8."""
    curve = cv2.pow(np.maximum(linear, _DARK), 1 / 2.4)
    offset = -255 * (0.055 + 12.92 * _DARK)
    levels = cv2.addWeighted(
        curve, 255 * 1.055, np.minimum(linear, _DARK), 255 * 12.92, offset, dtype=cv2.CV_8U
    )
    return np.asarray(levels, np.uint8)
