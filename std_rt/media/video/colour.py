"""The colour of clips: a frame's matrix and range, conversion to RGB and back, and the output's tags.

An untagged clip is read the way players do: BT.709 from 720 lines up, BT.601 below, limited range.
The output keeps the matrix of the source (RGB sources: BT.709) and is always tagged limited range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray

__all__ = ["Colour", "colour_of", "format_has_alpha", "tag_stream", "to_rgb", "to_yuv"]

# FFmpeg's AVColorSpace numbers; the last two are what unknown frames are taken for.
_RGB, _BT709, _UNSPECIFIED, _BT470BG, _SMPTE170M, _BT2020 = 0, 1, 2, 5, 6, 9
_SWSCALE = {_BT709: 1, 4: 4, _BT470BG: 5, _SMPTE170M: 5, 7: 7, _BT2020: 9, 10: 9}
_HD_LINES = 720
_HDR_CURVES = frozenset({16, 18})  # PQ and HLG


@dataclass(frozen=True)
class Colour:
    """Tags in FFmpeg's numbers: matrix (AVColorSpace, resolved), full range?, primaries, transfer curve."""

    matrix: int
    full_range: bool
    primaries: int
    transfer: int

    @property
    def is_hdr(self) -> bool:
        """True for PQ and HLG clips, whose brightness this 8-bit path does not tone-map."""
        return self.transfer in _HDR_CURVES


def colour_of(frame: VideoFrame) -> Colour:
    """The colour of a decoded frame; missing tags are guessed."""
    name = frame.format.name
    full = frame.color_range == ColorRange.JPEG or name.startswith("yuvj")
    # Grey without a tag is full range, as FFmpeg has it.
    full |= frame.color_range == ColorRange.UNSPECIFIED and name.startswith(("gray", "ya8", "ya16"))
    if frame.format.is_rgb or name == "pal8":
        return Colour(_BT709, False, _BT709, _BT709)
    matrix = int(frame.colorspace)
    if matrix not in _SWSCALE:
        lines = min(frame.height, frame.width)
        matrix = _BT709 if lines >= _HD_LINES else _SMPTE170M
    return Colour(matrix, full, int(frame.color_primaries), int(frame.color_trc))


def format_has_alpha(kind: VideoFormat) -> bool:
    """True if pixels of this format may be transparent."""
    return kind.has_palette or any(component.is_alpha for component in kind.components)


def to_rgb(frame: VideoFrame, colour: Colour) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """uint8 [H, W, 3] of a decoded frame, and its alpha, uint8 [H, W], or None if its format has none."""
    has_alpha = format_has_alpha(frame.format)
    if has_alpha and not frame.format.name.startswith("yuva"):
        rgba = np.asarray(frame.to_ndarray(format="rgba"), dtype=np.uint8)
    else:
        rgba = np.asarray(
            frame.reformat(
                format="rgba" if has_alpha else "rgb24",
                src_colorspace=_SWSCALE[colour.matrix],
                src_color_range=ColorRange.JPEG if colour.full_range else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
                interpolation=Interpolation.BILINEAR,
            ).to_ndarray(),
            dtype=np.uint8,
        )
    return (np.ascontiguousarray(rgba[:, :, :3]), rgba[:, :, 3]) if has_alpha else (rgba, None)


def to_yuv(rgb: NDArray[np.uint8], colour: Colour, pix_fmt: str = "yuv420p") -> VideoFrame:
    """A limited-range frame of ``rgb`` (uint8 [H, W, 3], or 4 with alpha) by the matrix of ``colour``.

    pix_fmt: a YUV format, one with alpha if ``rgb`` has it.
    """
    given = "rgb24" if rgb.shape[2] == 3 else "rgba"
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format=given).reformat(
        format=pix_fmt,
        dst_colorspace=_SWSCALE[colour.matrix],
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC,
    )
    frame.colorspace, frame.color_range = colour.matrix, ColorRange.MPEG
    frame.color_primaries, frame.color_trc = colour.primaries, colour.transfer
    return frame


def tag_stream(stream: VideoStream, colour: Colour) -> None:
    """Write the tags of :func:`to_yuv`'s frames on an output stream, before its first frame."""
    context = stream.codec_context
    context.colorspace, context.color_range = colour.matrix, ColorRange.MPEG
    context.color_primaries, context.color_trc = colour.primaries, colour.transfer
