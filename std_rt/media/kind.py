"""Is it a picture or a clip? The content decides; the suffix only where the content says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from PIL import Image

from std_rt.core.errors import MediaError
from std_rt.core.files import check_input
from std_rt.media.image import DAMAGE, open_picture
from std_rt.media.video.clip import first_video_stream, open_clip

__all__ = ["PICTURE_SUFFIXES", "VIDEO_SUFFIXES", "is_picture", "is_video", "media_kind"]

PICTURE_SUFFIXES: frozenset[str] = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".apng",
        ".gif",
        ".webp",
        ".avif",
        ".tif",
        ".tiff",
        ".bmp",
        ".dib",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".ico",
        ".psd",
        ".qoi",
        ".tga",
    }
)
VIDEO_SUFFIXES: frozenset[str] = frozenset(
    {
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".ts",
        ".m2ts",
        ".mts",
        ".wmv",
        ".flv",
        ".ogv",
        ".3gp",
        ".3g2",
        ".mxf",
        ".y4m",
        ".ivf",
    }
)
# Sent the video way, where the error says that there is only sound.
_AUDIO_SUFFIXES = frozenset({".mp3", ".m4a", ".aac", ".wav", ".flac", ".ogg", ".opus", ".wma"})

Kind = Literal["picture", "video"]


def media_kind(path: Path) -> Kind:
    """``"picture"`` or ``"video"``; animated GIF and animated PNG are videos, their still kin pictures.

    Reads headers only. A damaged file is what its suffix says; reading it then tells what is wrong.
    Raises MediaError if the file is missing, a folder, empty, or neither content nor suffix is known.
    """
    check_input(path)
    kind = _picture_kind(path) or _clip_kind(path) or _suffix_kind(path)
    if kind is None:
        raise MediaError(f"{path} is no picture or video that can be read; give a .jpg, .png, .mp4 or alike")
    return kind


def _picture_kind(path: Path) -> Kind | None:
    try:
        with open_picture(path) as picture:
            return "video" if _is_animated(picture) else "picture"
    except MediaError:
        return None


def _is_animated(picture: Image.Image) -> bool:
    # Animated WebP and AVIF stay pictures (their first frame): FFmpeg cannot decode the former.
    try:
        return picture.format in ("GIF", "PNG") and bool(getattr(picture, "is_animated", False))
    except DAMAGE:  # Broken after its first frame.
        return False


def _clip_kind(path: Path) -> Kind | None:
    try:
        with open_clip(path) as container:
            first_video_stream(container, path)
            return "video"
    except MediaError:
        return None


def _suffix_kind(path: Path) -> Kind | None:
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES:
        return "picture"
    return "video" if suffix in VIDEO_SUFFIXES or suffix in _AUDIO_SUFFIXES else None


def is_picture(path: Path) -> bool:
    """True if the stylizer treats this file as one picture (see :func:`media_kind`); False on any error."""
    return _is(path, "picture")


def is_video(path: Path) -> bool:
    """True if the stylizer treats this file as a clip (see :func:`media_kind`); False on any error."""
    return _is(path, "video")


def _is(path: Path, kind: Kind) -> bool:
    try:
        return media_kind(path) == kind
    except MediaError:
        return False
