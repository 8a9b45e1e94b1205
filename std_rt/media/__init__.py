"""Pictures and clips as NumPy frames: read, fit to a working size, write.

A *frame* is ``uint8 [H, W, 3]``, RGB with the sRGB (or the clip's own) transfer curve, upright. Nothing
here knows a model; every failure a user can cause is a :class:`~std_rt.core.errors.MediaError` with one line.
"""

from __future__ import annotations

from std_rt.core.files import check_output
from std_rt.media.fit import from_working, result_size, to_working, working_size
from std_rt.media.image import MAX_PIXELS, Picture, read_picture, write_picture
from std_rt.media.kind import PICTURE_SUFFIXES, VIDEO_SUFFIXES, is_picture, is_video, media_kind
from std_rt.media.sources import Job, expand_inputs, output_path, plan_outputs
from std_rt.media.video.record import Recorder, Recording, numbered
from std_rt.media.video.transcode import VideoInfo, VideoReport, probe, transcode, transcode_stream

__all__ = [
    "MAX_PIXELS",
    "PICTURE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Job",
    "Picture",
    "Recorder",
    "Recording",
    "VideoInfo",
    "VideoReport",
    "check_output",
    "expand_inputs",
    "from_working",
    "is_picture",
    "is_video",
    "media_kind",
    "numbered",
    "output_path",
    "plan_outputs",
    "probe",
    "read_picture",
    "result_size",
    "to_working",
    "transcode",
    "transcode_stream",
    "working_size",
    "write_picture",
]
