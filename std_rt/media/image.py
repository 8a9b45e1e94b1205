"""Pictures: any mode and orientation in, upright 8-bit sRGB out; written whole or not at all."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

from std_rt.core.errors import MediaError
from std_rt.core.files import atomic_file, check_input, reason
from std_rt.media.fit import Turn
from std_rt.media.float_tiff import float_tiff_size, read_float_tiff

__all__ = [
    "DAMAGE",
    "MAX_PIXELS",
    "WRITABLE_SUFFIXES",
    "Picture",
    "open_picture",
    "read_picture",
    "write_picture",
]

MAX_PIXELS = 200_000_000
"""Largest picture that is decoded (200 megapixels: 600 MB as RGB); a larger one is refused unread."""

Frame = NDArray[np.uint8]  # [H, W, 3] RGB

# Formats whose first bytes identify them; Pillow knows more, some of which claim any file.
_FORMATS = [
    "JPEG",
    "PNG",
    "GIF",
    "WEBP",
    "AVIF",
    "TIFF",
    "BMP",
    "DIB",
    "PPM",
    "JPEG2000",
    "ICO",
    "PSD",
    "QOI",
]
# What decoders throw on damaged files.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_SAVE_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".ppm": "PPM",
}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"subsampling": 0},
    "PNG": {"compress_level": 4},
    "TIFF": {"compression": "tiff_lzw"},
}
_WITH_ALPHA = frozenset({"PNG", "WEBP", "TIFF", "AVIF"})
_WITH_QUALITY = frozenset({"JPEG", "WEBP", "AVIF"})
WRITABLE_SUFFIXES = frozenset(_SAVE_FORMATS)
_PILLOW = threading.RLock()


@dataclass(frozen=True)
class Picture:
    """One decoded picture: upright, sRGB, EXIF and ICC applied and dropped.

    frame: ``uint8 [H, W, 3]`` RGB, contiguous; not premultiplied by alpha.
    alpha: ``uint8 [H, W]`` or None where the picture is opaque throughout.
    """

    frame: Frame
    alpha: NDArray[np.uint8] | None = None


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read the first (or only) picture of a file.

    Any Pillow mode, 16-bit and float included; EXIF orientation applied, an ICC profile converted to sRGB.
    Raises MediaError (one line) for everything that cannot be read whole: missing, folder, empty, not a
    picture, truncated, or more than ``max_pixels`` (checked before decoding).
    """
    check_input(path)
    with _quiet_pillow():
        size = float_tiff_size(path)
    if size is not None:
        _check_size(path, size, max_pixels)
        return Picture(to_8bit(read_float_tiff(path)))
    with open_picture(path) as picture:
        _check_size(path, picture.size, max_pixels)
        try:
            picture.load()
            turn = Turn.from_exif(_orientation(picture))
            rgb, alpha = _to_srgb(picture)
            frame, mask = np.asarray(rgb, dtype=np.uint8), None if alpha is None else np.asarray(alpha)
            opaque = mask is None or bool((mask == 255).all())
            return Picture(turn.apply(frame), None if mask is None or opaque else turn.apply(mask))
        except DAMAGE as error:
            raise MediaError(f"{path} is damaged and cannot be read whole: {reason(error)}") from error


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """The Pillow image of a file, header read only, without Pillow's warnings and size limit inside.

    Raises MediaError if it is no known picture.
    """
    check_input(path)
    with _quiet_pillow(), _identify(path) as picture:
        yield picture


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """No warnings, no limit (callers check sizes). Both are process-wide, hence one picture at a time."""
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _identify(path: Path) -> Image.Image:
    # TGA has no signature: it is believed only under its own name.
    formats = [*_FORMATS, "TGA"] if path.suffix.lower() == ".tga" else _FORMATS
    Image.init()  # Asked for some formats by name, Pillow would not load all of their readers.
    try:
        return Image.open(path, formats=[name for name in formats if name in Image.OPEN])
    except DAMAGE as error:
        raise MediaError(
            f"{path} is no picture that can be read (damaged, or not what its name says);"
            " give a JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF"
        ) from error


def _check_size(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    w, h = size
    if w * h > max_pixels:
        found, limit = f"{w * h / 1e6:,.0f} megapixels", f"{max_pixels / 1e6:,.0f}"
        raise MediaError(
            f"{path} is {w} x {h} px ({found}); the limit is {limit} megapixels, so scale it down"
        )


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation still to apply, asked after loading (TIFF and AVIF turn themselves and drop it)."""
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:  # A damaged EXIF block says nothing about the pixels.
        return 1


def _to_srgb(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours as an RGB image and, where the picture has any transparency, its alpha."""
    profile = picture.info.get("icc_profile")
    if picture.mode[0] in "IF":
        return _apply_profile(Image.fromarray(to_8bit(np.asarray(picture))), profile), None
    if not picture.has_transparency_data:
        return _apply_profile(picture, profile), None
    with_alpha = picture.convert("RGBA")
    # A grey profile fits grey pixels only, so LA keeps its one channel.
    colours = picture.getchannel("L") if picture.mode == "LA" else with_alpha.convert("RGB")
    return _apply_profile(colours, profile), with_alpha.getchannel("A")


def to_8bit(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Integers of 16 or 32 bits or floats to 0..255, by the smallest usual white: 1 (floats), 255, 65535.

    Values beyond that are stretched from their minimum to their maximum; NaN becomes black.
    """
    real = np.nan_to_num(values.astype(np.float32), nan=0.0)
    low, high = 0.0, float(real.max())
    if values.dtype == np.uint16:
        high = 65535.0
    elif high <= 65535 and real.min() >= 0:
        whites = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
        high = next(white for white in whites if high <= white)
    else:
        low = float(real.min())
    scaled = (real - low) * (255 / max(high - low, 1e-12))
    return np.asarray(np.clip(np.rint(scaled), 0, 255), dtype=np.uint8)


def _apply_profile(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB. A profile that is broken or of another colour space is ignored, as viewers do."""
    if picture.mode == "LAB":
        return _transform(picture, ImageCms.createProfile("LAB"))
    plain = picture if picture.mode in ("L", "RGB", "CMYK") else picture.convert("RGB")
    if not profile:
        return plain.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if plain.mode == "RGB" and ImageCms.getProfileDescription(source).startswith("sRGB"):
            return plain
        return _transform(plain, source)
    except (ImageCms.PyCMSError, OSError):
        return plain.convert("RGB")


def _transform(picture: Image.Image, source: Any) -> Image.Image:
    converted = ImageCms.profileToProfile(
        picture,
        source,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if converted is None:  # Only the in-place form, not used here, returns nothing.
        raise ImageCms.PyCMSError("no picture came back")
    return converted


def write_picture(
    path: Path, frame: Frame, alpha: NDArray[np.uint8] | None = None, quality: int = 95
) -> None:
    """Write ``frame`` (uint8 [H, W, 3] RGB) atomically; an existing file is replaced.

    The suffix picks the format: :data:`WRITABLE_SUFFIXES`. ``alpha`` (uint8 [H, W]) is stored where the
    format has it (png, webp, tiff, avif); elsewhere the picture is laid over white. quality: 1..100 for
    jpg, webp and avif. Raises MediaError for an unknown suffix or a place that cannot be written.
    """
    file_format = _SAVE_FORMATS.get(path.suffix.lower())
    if file_format is None:
        known = " ".join(sorted(WRITABLE_SUFFIXES))
        raise MediaError(
            f"{path}: a picture cannot be written as {path.suffix or 'a name without suffix'!r}; use {known}"
        )
    picture = _with_alpha(Image.fromarray(np.ascontiguousarray(frame)), alpha, file_format in _WITH_ALPHA)
    options = dict(_SAVE_OPTIONS.get(file_format, {}))
    if file_format in _WITH_QUALITY:
        options["quality"] = quality
    with atomic_file(path, error=MediaError) as partial:
        try:
            picture.save(partial, format=file_format, **options)
        except DAMAGE as error:
            raise MediaError(f"{path} cannot be written: {reason(error)}") from error


def _with_alpha(picture: Image.Image, alpha: NDArray[np.uint8] | None, keep: bool) -> Image.Image:
    if alpha is None:
        return picture
    mask = Image.fromarray(np.ascontiguousarray(alpha))
    if keep:
        picture.putalpha(mask)
        return picture
    return Image.composite(picture, Image.new("RGB", picture.size, "white"), mask)
