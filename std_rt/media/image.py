"""Pictures: reads any mode and orientation as upright 8-bit sRGB; writes atomically."""

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

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from std_rt.core.errors import MediaError
from std_rt.core.files import atomic_file, check_input, reason
from std_rt.media.fit import over_white

__all__ = [
    "MAX_PIXELS",
    "PICTURE_SUFFIXES",
    "WRITABLE_SUFFIXES",
    "Picture",
    "decode_picture",
    "is_animated",
    "open_picture",
    "quiet_pillow",
    "read_picture",
    "write_picture",
]

MAX_PIXELS = 200_000_000
"""Largest picture that is decoded (200 megapixels: 600 MB as RGB); a larger one is refused unread."""
WRITABLE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif", ".ppm"}
)
PICTURE_SUFFIXES = WRITABLE_SUFFIXES.union(
    {".mpo", ".apng", ".dib", ".pgm", ".pbm", ".pnm", ".jp2", ".ico", ".psd", ".qoi", ".tga"}
)

Frame = NDArray[np.uint8]  # [H, W, 3] RGB

# Formats whose first bytes identify them; Pillow knows more, some of which claim any file.
_FORMATS = frozenset(
    {"JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "ICO", "PSD", "QOI"}
)
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"subsampling": 0},
    "PNG": {"compress_level": 4},
    "TIFF": {"compression": "tiff_lzw"},
}
_WITH_ALPHA = frozenset({"PNG", "WEBP", "TIFF", "AVIF"})
_ANIMATED = frozenset({"GIF", "PNG", "WEBP", "AVIF"})
_WITH_QUALITY = frozenset({"JPEG", "WEBP", "AVIF"})
# The transposition that undoes an EXIF orientation. (Pillow's exif_transpose also rewrites the EXIF block,
# which fails on the ones that some cameras write.)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What decoders raise on damaged files.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(AssertionError, MemoryError, RuntimeError, struct.error, zlib.error),
)
_PILLOW = threading.RLock()


@dataclass(frozen=True)
class Picture:
    """One decoded picture: upright, sRGB, EXIF and ICC applied and dropped.

    frame: ``uint8 [H, W, 3]`` RGB, contiguous; not premultiplied by alpha.
    alpha: ``uint8 [H, W]``, or None if the picture is fully opaque.
    """

    frame: Frame
    alpha: NDArray[np.uint8] | None = None


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read the first (or only) picture of a file.

    Any Pillow mode, 16-bit and float included; EXIF orientation applied, an ICC profile converted to sRGB.
    Raises MediaError (one line) for everything that cannot be read: missing, folder, empty, not a
    picture, truncated, or more than ``max_pixels`` (checked before decoding).
    """
    check_input(path)
    with quiet_pillow():
        size = _float_tiff_size(path)
    if size is not None:
        _check_size(path, size, max_pixels)
        return Picture(to_8bit(_read_float_tiff(path)))
    with open_picture(path) as picture:
        _check_size(path, picture.size, max_pixels)
        return decode_picture(path, picture)


def decode_picture(path: Path, picture: Image.Image) -> Picture:
    """The frame that an opened picture is at; ``path`` is for messages. Raises MediaError if damaged."""
    try:
        picture.load()
        upright = _UPRIGHT.get(_orientation(picture))
        layers = [
            None if layer is None else np.asarray(layer if upright is None else layer.transpose(upright))
            for layer in _to_srgb(picture)
        ]
    except _DAMAGE as error:
        raise MediaError(f"{path} is damaged and cannot be read completely: {reason(error)}") from error
    frame, alpha = layers
    assert frame is not None
    return Picture(frame, None if alpha is None or (alpha == 255).all() else alpha)


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """The Pillow image of a file, header read only, without Pillow's warnings and size limit inside.

    Raises MediaError if it is not a known picture.
    """
    check_input(path)
    with quiet_pillow():
        Image.init()  # Asked for some formats by name, Pillow would not load all of their readers.
        formats = [name for name in Image.ID if name in _FORMATS]
        if path.suffix.lower() == ".tga":  # It has no signature: it is believed only under its own name.
            formats.append("TGA")
        try:
            picture = Image.open(path, formats=formats)
        except _DAMAGE as error:
            raise MediaError(
                f"{path} cannot be read as a picture (damaged, or misnamed);"
                " give a JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF"
            ) from error
        with picture:
            yield picture


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """No warnings, no limit (callers check sizes). Both are process-wide, hence one picture at a time."""
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def is_animated(picture: Image.Image) -> bool:
    """Whether an opened picture is an animated GIF, PNG, WebP or AVIF."""
    try:
        return picture.format in _ANIMATED and bool(getattr(picture, "is_animated", False))
    except _DAMAGE:  # Broken after its first frame.
        return False


def _check_size(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    w, h = size
    if w * h > max_pixels:
        found, limit = f"{w * h / 1e6:,.0f} megapixels", f"{max_pixels / 1e6:,.0f}"
        raise MediaError(
            f"{path} is {w} x {h} px ({found}); the limit is {limit} megapixels, so scale it down"
        )


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation still to apply, asked after loading (TIFF and AVIF apply and drop it)."""
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:  # A damaged EXIF block says nothing about the pixels.
        return 1


def _to_srgb(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours as an RGB image and, if the picture has any transparency, its alpha."""
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
    assert converted is not None  # Only the in-place form, not used here, returns nothing.
    return converted


# Colour TIFFs of 32-bit floats: the one common kind that Pillow does not read, and OpenCV does.


def _float_tiff_size(path: Path) -> tuple[int, int] | None:
    """(width, height) px if ``path`` is a TIFF of float colours, else None; reads its directory only."""
    with path.open("rb") as file:
        head = file.read(8)
        if head[:4] not in (b"II*\0", b"MM\0*"):
            return None
        tags: Any = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        try:
            tags.load(file)
            samples, sample_format = tags[TiffImagePlugin.SAMPLESPERPIXEL], tags[TiffImagePlugin.SAMPLEFORMAT]
            if samples < 3 or sample_format[0] != 3:  # 3: IEEE floats
                return None
            return int(tags[TiffImagePlugin.IMAGEWIDTH]), int(tags[TiffImagePlugin.IMAGELENGTH])
        except (OSError, ValueError, TypeError, LookupError):
            return None  # Not this kind; the ordinary reader reports what is wrong.


def _read_float_tiff(path: Path) -> NDArray[np.float32]:
    """float32 [H, W, 3] RGB as stored (any range; a fourth channel is dropped). MediaError if damaged."""
    log = cv2.utils.logging
    before = log.setLogLevel(log.LOG_LEVEL_SILENT)  # It prints on damaged files; the error below is enough.
    try:
        # Through bytes: OpenCV's own file names break on non-ASCII paths under Windows.
        bgr = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error):
        bgr = None
    finally:
        log.setLogLevel(before)
    if bgr is None or bgr.ndim != 3:
        raise MediaError(f"{path} is damaged and cannot be read completely")
    return np.ascontiguousarray(bgr[:, :, 2::-1], dtype=np.float32)


def write_picture(
    path: Path, frame: Frame, alpha: NDArray[np.uint8] | None = None, quality: int = 95
) -> None:
    """Write ``frame`` (uint8 [H, W, 3] RGB) atomically; an existing file is replaced.

    The suffix selects the format: :data:`WRITABLE_SUFFIXES`. ``alpha`` (uint8 [H, W]) is stored if
    the format supports it (png, webp, tiff, avif); otherwise the picture is laid over white. quality: 1..100
    for jpg, webp and avif. Raises MediaError for an unknown suffix or a place that cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in WRITABLE_SUFFIXES:
        known = " ".join(sorted(WRITABLE_SUFFIXES))
        raise MediaError(
            f"{path}: cannot write a picture as {suffix or 'a name without suffix'!r}; use {known}"
        )
    file_format = Image.registered_extensions().get(suffix, "")
    if alpha is None:
        picture = Image.fromarray(np.ascontiguousarray(frame))
    elif file_format in _WITH_ALPHA:
        picture = Image.fromarray(np.dstack([frame, alpha]))
    else:
        picture = Image.fromarray(over_white(frame, alpha))
    options = dict(_SAVE_OPTIONS.get(file_format, {}))
    if file_format in _WITH_QUALITY:
        options["quality"] = quality
    with atomic_file(path, error=MediaError) as partial:
        try:
            picture.save(partial, **options)
        except _DAMAGE as error:
            raise MediaError(f"{path} cannot be written: {reason(error)}") from error
