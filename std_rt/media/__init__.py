"""Pictures and clips as NumPy frames: read, resize, write.

A *frame* is ``uint8 [H, W, 3]``, RGB with the sRGB (or the clip's own) transfer curve, upright. Nothing
here knows a model; every failure a user can cause is a one-line :class:`~std_rt.core.errors.MediaError`.
"""

from __future__ import annotations

from std_rt.media.image import Picture, read_picture, write_picture
from std_rt.media.video.clip import VideoInfo, probe
from std_rt.media.video.transcode import VideoReport, transcode_stream

__all__ = [
    "Picture",
    "VideoInfo",
    "VideoReport",
    "probe",
    "read_picture",
    "transcode_stream",
    "write_picture",
]
