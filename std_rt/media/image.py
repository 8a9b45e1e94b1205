"""Pictures: reads any mode and orientation as upright 8-bit sRGB; writes atomically."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, IptcImagePlugin, TiffImagePlugin

from std_rt.core.arrays import Frame
from std_rt.core.errors import MediaError
from std_rt.core.files import atomic_file, check_input, reason
from std_rt.media.fit import over_white, resize, spread
from std_rt.media.fit import upscale as enlarge
from std_rt.media.picture_colour import scale_note, to_8bit, to_srgb
from std_rt.media.picture_formats import (
    DAMAGE,
    PICTURE_FORMATS,
    PICTURE_SUFFIXES,
    WRITABLE_SUFFIXES,
    UnreadablePictureError,
    jxl_size,
    psd_is_transparent,
    refused_kind,
    tiff_tags,
)

__all__ = [
    "MAX_PIXELS",
    "PICTURE_SUFFIXES",
    "WRITABLE_SUFFIXES",
    "Picture",
    "decode_picture",
    "is_animated",
    "not_stored",
    "open_picture",
    "painted",
    "quiet_pillow",
    "read_picture",
    "write_picture",
]

MAX_PIXELS = 200_000_000
"""Largest picture that is decoded (200 megapixels: 600 MB as RGB); a larger one is refused unread."""


_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"subsampling": 0},
    "PNG": {"compress_level": 4},
    "TIFF": {"compression": "tiff_lzw"},
}
_WITH_ALPHA = frozenset({"PNG", "WEBP", "TIFF", "AVIF"})
_UNUSED_ALPHA = frozenset({"BMP", "DIB", "TGA"})  # programs leave 0 in it throughout, and mean opaque
_ANIMATED = frozenset({"GIF", "PNG", "WEBP", "AVIF"})
_WITH_QUALITY = frozenset({"JPEG", "WEBP", "AVIF"})
_WITH_EXIF = frozenset({"JPEG", "PNG", "WEBP", "AVIF", "TIFF"})
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
_PHOTOSHOP_VERSION, _PHOTOSHOP_EXIF = 1057, 1058  # image resources
_NEW_SUBFILE_TYPE = 254  # TIFF tags and their values
_UNSIGNED, _PREMULTIPLIED, _ALPHA = 1, 1, 2
_PILLOW = threading.RLock()
_Tag = ExifTags.Base
# What stays true of a stylized picture, as of a clip; not its size, orientation, colour space or thumbnail.
_KEPT_TAGS = (
    *(_Tag.ImageDescription, _Tag.Make, _Tag.Model, _Tag.DateTime, _Tag.Artist, _Tag.Copyright),
    *(_Tag.XPTitle, _Tag.XPComment, _Tag.XPAuthor, _Tag.XPKeywords, _Tag.XPSubject),
)
_KEPT_EXIF_TAGS = (
    *(_Tag.ExifVersion, _Tag.DateTimeOriginal, _Tag.DateTimeDigitized, _Tag.OffsetTime),
    *(
        _Tag.OffsetTimeOriginal,
        _Tag.OffsetTimeDigitized,
        _Tag.SubsecTime,
        _Tag.SubsecTimeOriginal,
        _Tag.SubsecTimeDigitized,
    ),
    *(_Tag.UserComment, _Tag.CameraOwnerName, _Tag.LensMake, _Tag.LensModel),
)
# Where pictures without these tags state the same: IPTC data sets of agencies, keywords of PNG texts.
_ELSEWHERE = {
    _Tag.Artist: ((2, 80), "Author"),
    _Tag.Copyright: ((2, 116), "Copyright"),
    _Tag.ImageDescription: ((2, 120), "Description"),
}


@dataclass(frozen=True)
class Picture:
    """One decoded picture: upright, sRGB, EXIF orientation and ICC applied and dropped.

    frame: ``uint8 [H, W, 3]`` RGB, contiguous; laid over white where it is transparent.
    alpha: ``uint8 [H, W]``, or None if the picture is fully opaque.
    exif: date, author, copyright, place and camera as an EXIF block for `write_picture`; empty if unknown.
    notes: one line each on what a user may want to know (several pages, HDR, ...).
    """

    frame: Frame
    alpha: NDArray[np.uint8] | None = None
    exif: bytes = b""
    notes: tuple[str, ...] = ()


def read_picture(path: Path | str, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read the first (or only) picture of a file.

    Any Pillow mode, 16-bit and float included; EXIF orientation applied, colours converted to sRGB. Raises
    MediaError (one line) for everything that cannot be read: missing, folder, empty, not a picture, of a
    kind that needs another program, truncated, or more than ``max_pixels`` (checked before decoding).
    """
    path = Path(path)
    check_input(path)
    with quiet_pillow():
        _refuse(path)
        tags = tiff_tags(path)
        if tags is not None and _needs_opencv(tags):
            _check_size(
                path, (tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]), max_pixels
            )
            return decode_picture(path, *_read_tiff(path, tags))
    with open_picture(path) as picture:
        _check_size(path, picture.size, max_pixels)
        return decode_picture(path, picture, _pages_note(picture))


def decode_picture(path: Path, picture: Image.Image, notes: Sequence[str] = ()) -> Picture:
    """The frame that an opened picture is at; ``path`` is for messages. Raises MediaError if damaged."""
    try:
        picture.load()
        upright = _UPRIGHT.get(_orientation(picture))
        colours, transparency, more = to_srgb(picture)
        frame, alpha = (
            None if layer is None else np.asarray(layer if upright is None else layer.transpose(upright))
            for layer in (colours, transparency)
        )
    except DAMAGE as error:
        raise MediaError(f"{path} is damaged and cannot be read completely: {reason(error)}") from error
    assert frame is not None
    if alpha is not None and ((alpha == 255).all() or not _is_meant(alpha, picture)):
        alpha = None
    elif alpha is not None and not alpha.any():
        notes = [*notes, "it is transparent everywhere, which makes it all white"]
    shown = frame if alpha is None else over_white(frame, alpha)
    return Picture(np.ascontiguousarray(shown), alpha, _kept_exif(picture), (*notes, *more))


def _is_meant(alpha: NDArray[np.uint8], picture: Image.Image) -> bool:
    """Whether the fourth channel is the picture's transparency."""
    if picture.format == "PSD":
        return psd_is_transparent(Path(picture.filename))  # type: ignore[attr-defined]
    return picture.format not in _UNUSED_ALPHA or bool(alpha.any())


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """The Pillow image of a file, header read only, without Pillow's warnings and size limit inside.

    Raises UnreadablePictureError if it is of a known kind that is not read here, MediaError if it is none.
    """
    check_input(path)
    with quiet_pillow():
        _refuse(path)
        jxl = jxl_size(path)
        if jxl is not None:
            _check_size(path, jxl, MAX_PIXELS)
        Image.init()  # Asked for some formats by name, Pillow would not load all of their readers.
        formats = [name for name in Image.ID if name in PICTURE_FORMATS]
        if path.suffix.lower() == ".tga":  # It has no signature: it is believed only under its own name.
            formats.append("TGA")
        try:
            picture = Image.open(path, formats=formats)
        except DAMAGE as error:
            found = "a TIFF of a rare layout, or damaged" if tiff_tags(path) else "damaged, or misnamed"
            raise MediaError(
                f"{path} cannot be read as a picture ({found});"
                " give a JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF"
            ) from error
        with picture:
            version = _photoshop_resource(picture, _PHOTOSHOP_VERSION)
            if version[4:5] == b"\0":  # no merged picture: in its place, Photoshop stores white
                raise MediaError(
                    f"{path} holds layers without the picture that they make; save it in Photoshop with"
                    " 'Maximize compatibility', or as PNG"
                )
            yield picture


def _photoshop_resource(picture: Image.Image, number: int) -> bytes:
    """The image resource of that number of a Photoshop file; empty if there is none."""
    found = getattr(picture, "resources", ())
    return next((bytes(data) for kind, _, data in found if kind == number), b"")


def _refuse(path: Path) -> None:
    kind = refused_kind(path)
    if kind is not None:
        raise UnreadablePictureError(path, kind)


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
    except DAMAGE:  # Broken after its first frame.
        return False


def _check_size(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    w, h = size
    if w * h > max_pixels:
        found, limit = f"{w * h / 1e6:,.0f} megapixels", f"{max_pixels / 1e6:,.0f}"
        raise MediaError(
            f"{path} is {w} x {h} px ({found}); the limit is {limit} megapixels, so scale it down"
        )


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation still to apply, asked after loading (TIFF, AVIF and HEIC apply and drop it)."""
    if picture.format == "JXL" and not getattr(picture, "jpeg", False):
        return 1  # Its decoder has applied its own; what Exif says does not count.
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:  # A damaged EXIF block says nothing about the pixels.
        return 1


def _pages_note(picture: Image.Image) -> list[str]:
    """A line if a file holds more pictures than the first; asked before loading."""
    try:
        if picture.format not in ("TIFF", "WEBP", "AVIF", "GIF", "PNG") or not getattr(
            picture, "is_animated", False
        ):
            return []
        count = getattr(picture, "n_frames", 0)
        if picture.format == "TIFF":  # Some list a small copy of the first page as the second.
            picture.seek(1)
            is_copy = int(picture.tag_v2.get(_NEW_SUBFILE_TYPE, 0)) & 1  # type: ignore[attr-defined]
            picture.seek(0)
            if is_copy:
                return []
    except DAMAGE:  # Broken after the first.
        return []
    return [f"only the first of its {count} pictures was used"]


def _kept_exif(picture: Image.Image) -> bytes:
    """What `Picture.exif` says. Of a damaged block, what comes before the damage."""
    kept = Image.Exif()
    with suppress(*DAMAGE):
        found = picture.getexif()
        block = _photoshop_resource(picture, _PHOTOSHOP_EXIF)
        if block:
            found = Image.Exif()
            found.load(block)
        _copy(found, kept, _KEPT_TAGS)
        for part, tags in ((ExifTags.IFD.Exif, _KEPT_EXIF_TAGS), (ExifTags.IFD.GPSInfo, range(32))):
            copied: dict[int, Any] = {}
            _copy(found.get_ifd(part), copied, tags)
            if copied:
                kept[part] = copied
    with suppress(*DAMAGE):
        iptc: Any = {}
        if isinstance(picture, ImageFile.ImageFile):
            iptc = IptcImagePlugin.getiptcinfo(picture) or {}
        for tag, (record, keyword) in _ELSEWHERE.items():
            said = iptc.get(record) or picture.info.get(keyword)
            text = b", ".join(said) if isinstance(said, list) else said
            if text and tag not in kept:
                kept[tag] = text if isinstance(text, bytes) else text.encode("utf-8")
    return kept.tobytes() if len(kept) else b""


def _copy(source: Any, target: Any, tags: Iterable[int]) -> None:
    for tag in tags:
        value = source.get(tag)
        if isinstance(value, str) and not value.isascii():
            value = value.encode("latin-1", "replace")  # the bytes, mostly UTF-8, that Pillow read as Latin-1
        with suppress(*DAMAGE):
            trial = Image.Exif()
            trial[tag] = value
            if value not in (None, "", b"") and trial.tobytes():
                target[tag] = value


# TIFFs that Pillow does not read and OpenCV does: colours of 32 bits and all of 64, floats or integers.


def _needs_opencv(tags: Any) -> bool:
    try:
        samples, kinds = (
            tags.get(tag, usual)
            for tag, usual in ((TiffImagePlugin.SAMPLESPERPIXEL, 1), (TiffImagePlugin.SAMPLEFORMAT, (1,)))
        )
        bits = tags[TiffImagePlugin.BITSPERSAMPLE][0]
        plain = tags[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] in (1, 2) and samples != 2
        lost = bits == 64 or (bits == 32 and (samples > 2 or kinds[0] == _UNSIGNED))
        return bool(plain and lost and tags[TiffImagePlugin.IMAGEWIDTH] and tags[TiffImagePlugin.IMAGELENGTH])
    except (ValueError, TypeError, LookupError):
        return False  # The ordinary reader reports what is wrong.


def _read_tiff(path: Path, tags: Any) -> tuple[Image.Image, list[str]]:
    """The picture with its profile and EXIF, and notes. MediaError if damaged."""
    log = cv2.utils.logging
    before = log.setLogLevel(log.LOG_LEVEL_SILENT)  # It prints on damaged files; the error below is enough.
    try:
        # Through bytes: OpenCV's own file names break on non-ASCII paths under Windows.
        data = path.read_bytes()
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error):
        values = None
    finally:
        log.setLogLevel(before)
    if values is None:
        raise MediaError(f"{path} is damaged and cannot be read completely")
    notes = scale_note(values) if values.dtype.kind == "f" else []
    if values.ndim == 3:
        extra = tags.get(TiffImagePlugin.EXTRASAMPLES, (0,))[0]
        values = values[:, :, [2, 1, 0, 3] if extra in (_PREMULTIPLIED, _ALPHA) else [2, 1, 0]]  # was BGR(A)
        if extra == _PREMULTIPLIED:
            values[:, :, :3] = values[:, :, :3] / np.maximum(values[:, :, 3:], 1e-6)
    picture = Image.fromarray(to_8bit(values))
    picture.info["exif"] = data  # An EXIF block is a TIFF, and the other way round.
    if TiffImagePlugin.ICCPROFILE in tags:
        picture.info["icc_profile"] = bytes(tags[TiffImagePlugin.ICCPROFILE])
    return picture, notes


def painted(picture: Picture, paint: Callable[[Frame], Frame], *, upscale: bool = False) -> Picture:
    """``picture`` with its frame painted: a cut-out without white rims, and its alpha at the result's size.

    ``upscale``: the result at the picture's own size, along its edges (`fit.upscale`).
    """
    frame, alpha = picture.frame, picture.alpha
    if alpha is not None:
        frame = spread(frame, alpha)
    styled = paint(frame)
    if upscale:
        styled = enlarge(styled, frame)
    if alpha is not None and alpha.shape != styled.shape[:2]:
        alpha = np.ascontiguousarray(resize(alpha, (styled.shape[0], styled.shape[1])))
    return replace(picture, frame=styled, alpha=alpha)


def write_picture(
    path: Path | str,
    frame: Frame,
    alpha: NDArray[np.uint8] | None = None,
    quality: int = 95,
    exif: bytes = b"",
) -> None:
    """Write ``frame`` (uint8 [H, W, 3] RGB) atomically; an existing file is replaced.

    The suffix selects the format: :data:`WRITABLE_SUFFIXES`. ``alpha`` (uint8 [H, W]) is stored if
    the format supports it (png, webp, tiff, avif); otherwise the picture is laid over white. quality: 1..100
    for jpg, webp and avif. exif: of a `Picture`, stored in png, webp, tiff, avif and jpg. Raises MediaError
    for an unknown suffix or a place that cannot be written.
    """
    path = Path(path)
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
    if exif and file_format in _WITH_EXIF:
        options |= _exif_options(file_format, exif)
    with atomic_file(path, error=MediaError) as partial:
        try:
            picture.save(partial, **options)
        except DAMAGE as error:
            raise MediaError(f"{path} cannot be written: {reason(error)}") from error


def not_stored(picture: Picture, path: Path) -> list[str]:
    """One line each on what `write_picture` cannot store in a file of this name."""
    suffix = path.suffix.lower()
    file_format = Image.registered_extensions().get(suffix)
    lines = []
    if picture.exif and file_format not in _WITH_EXIF:
        lines.append(f"its EXIF (date, author, ...) cannot be stored as {suffix}")
    if picture.alpha is not None and file_format not in _WITH_ALPHA:
        lines.append(f"its transparency cannot be stored as {suffix}: it is laid over white")
    return lines


def _exif_options(file_format: str, exif: bytes) -> dict[str, Any]:
    if file_format != "TIFF":
        return {"exif": exif}
    tags = Image.Exif()
    tags.load(exif)
    for tag in _KEPT_TAGS:
        if isinstance(tags.get(tag), str):  # As bytes: for TIFF, Pillow would reduce text to ASCII.
            tags[tag] = tags[tag].encode("latin-1", "replace")
    return {"exif": tags, "compression": "raw"}  # With compression, libtiff writes and refuses EXIF.
