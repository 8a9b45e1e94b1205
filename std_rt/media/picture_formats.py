"""Kinds of picture files: those that are read, those that an extra reads, and what to do about the others.

The content decides. A name counts only where the content is no help: raw files of cameras are TIFFs whose
first picture is a thumbnail.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import TiffImagePlugin

from std_rt.core.errors import MediaError
from std_rt.core.machine import install_hint

__all__ = [
    "DAMAGE",
    "PICTURE_FORMATS",
    "PICTURE_SUFFIXES",
    "WRITABLE_SUFFIXES",
    "RefusedKind",
    "UnreadablePictureError",
    "jxl_size",
    "psd_is_transparent",
    "refused_kind",
    "tiff_tags",
]

# What decoders raise on damaged files.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(AssertionError, MemoryError, RuntimeError, struct.error, zlib.error),
)
# Pillow's formats whose first bytes identify them; it knows more, some of which claim any file. The last two
# are those of the extra [photos].
PICTURE_FORMATS = frozenset(
    (
        *("JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "ICO", "PSD", "QOI"),
        *("HEIF", "JXL"),
    )
)
WRITABLE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif", ".ppm"}
)
_RAW_SUFFIXES = frozenset(
    (
        *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".gpr", ".iiq", ".kdc"),
        *(".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf"),
        *(".srw", ".x3f"),
    )
)
PICTURE_SUFFIXES = WRITABLE_SUFFIXES.union(
    {".mpo", ".apng", ".dib", ".pgm", ".pbm", ".pnm", ".jp2", ".ico", ".psd", ".qoi", ".tga"},
    {".heic", ".heif", ".hif", ".jxl"},
    {".svg", ".pdf", ".eps", ".ai", ".xcf", ".exr", ".hdr"},
    _RAW_SUFFIXES,
)
"""What people take for a picture, read or not: in a folder, none of them is skipped in silence."""


@dataclass(frozen=True)
class RefusedKind:
    """What a file is, with its article, and what to do about it."""

    name: str
    remedy: str


class UnreadablePictureError(MediaError):
    """A picture of a kind that is known and not read. ``kind``: which."""

    def __init__(self, path: Path, kind: RefusedKind) -> None:
        super().__init__(f"{path} is {kind.name}; {kind.remedy}")
        self.kind = kind


_RAW = RefusedKind(
    "a raw file of a camera", "develop it first (darktable, Lightroom, ...) and give the JPEG or TIFF"
)
_HEIC = RefusedKind(
    "a HEIC picture, which needs pillow-heif", f"run: {install_hint('photos')}, or convert it to JPEG"
)
_JXL = RefusedKind(
    "a JPEG XL picture, which needs pillow-jxl-plugin", f"run: {install_hint('photos')}, or convert it to PNG"
)
_DEEP_PSD = RefusedKind("a Photoshop file with more than 8 bits a channel", "save it as PNG or TIFF")
_HALF_FLOAT = RefusedKind("a TIFF of 16-bit floats", "save it with 32-bit floats or 16-bit integers")
_SVG = RefusedKind("an SVG drawing", "export it as PNG first")
_WEB_PAGE = RefusedKind("a web page, not the picture itself", "download the picture again")
_BEGINNINGS = {
    b"%PDF": RefusedKind("a PDF", "export its page as PNG first"),
    b"%!PS": RefusedKind("a PostScript drawing", "export it as PNG first"),
    b"gimp xcf": RefusedKind("a GIMP project", "export it as PNG first"),
    b"\x76\x2f\x31\x01": RefusedKind("an OpenEXR picture", "save it as 16-bit PNG or TIFF first"),
    b"#?RADIANCE": RefusedKind("a Radiance HDR picture", "save it as 16-bit PNG or TIFF first"),
    b"version https://git-lfs": RefusedKind("a Git LFS pointer, not the picture itself", "run: git lfs pull"),
    **dict.fromkeys((b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"\0MRM", b"FOVb"), _RAW),
}
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_JXL_BEGINNINGS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_DNG_VERSION = 50706
_IEEE_FLOAT = 3  # a sample format
_MOST_SUB_PICTURES = 8
_SENSOR_DATA = frozenset({32803, 34892})  # photometric interpretations: a colour filter array, linear raw


def refused_kind(path: Path) -> RefusedKind | None:
    """The kind of ``path`` if it is known and not read here; else None, also for what is no picture at all.

    Loads the reader of HEIC and JPEG XL into Pillow if it is installed and needed.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except (OSError, ValueError):
        return None
    brands = _brands(head)
    if b"crx " in brands or head[6:14] == b"HEAPCCDR" or (head[8:10] == b"CR" and head[:2] == b"II"):
        return _RAW
    if brands & _HEIF_BRANDS and not brands & _AVIF_BRANDS:
        return None if _loads(_load_heif) else _HEIC
    if head.startswith(_JXL_BEGINNINGS):
        return None if _loads(_load_jxl) else _JXL
    if head.startswith(b"8BPS"):
        return _DEEP_PSD if int.from_bytes(head[22:24], "big") > 8 else None
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    return _refused_tiff(path) or _refused_text(head)


def _brands(head: bytes) -> set[bytes]:
    """The brands of an ISO media file (HEIC, AVIF, CR3, MP4): what it is, and what it can be read as."""
    if head[4:8] != b"ftyp":
        return set()
    box = head[: int.from_bytes(head[:4], "big")]
    return {box[8:12], *(box[at : at + 4] for at in range(16, len(box), 4))}


def _loads(load: Callable[[], None]) -> bool:
    try:
        load()
    except ImportError:
        return False
    return True


def _load_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()


def _load_jxl() -> None:
    import pillow_jxl  # noqa: F401  (registers itself)


def _refused_tiff(path: Path) -> RefusedKind | None:
    directories = _tiff_directories(path)
    if not directories:
        return None
    tags = directories[0]
    photometric = {found.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) for found in directories}
    if path.suffix.lower() in _RAW_SUFFIXES or _DNG_VERSION in tags or photometric & _SENSOR_DATA:
        return _RAW
    kinds, bits = (tags.get(tag, ()) for tag in (TiffImagePlugin.SAMPLEFORMAT, TiffImagePlugin.BITSPERSAMPLE))
    return _HALF_FLOAT if _IEEE_FLOAT in kinds and 16 in bits else None


def jxl_size(path: Path) -> tuple[int, int] | None:
    """(width, height) px of a JPEG XL as its header says, or None; its reader would decode it to tell.

    ISO/IEC 18181-1, SizeHeader: fields of bits, the lowest first.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
    start = head.find(b"\xff\x0a")
    if not head.startswith(_JXL_BEGINNINGS) or start < 0:
        return None
    bits = int.from_bytes(head[start + 2 : start + 18], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    def side() -> int:
        return 8 * (take(5) + 1) if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    is_small = take(1)
    height = side()
    ratio = (None, (1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[take(3)]
    return (side() if ratio is None else height * ratio[0] // ratio[1]), height


def psd_is_transparent(path: Path) -> bool:
    """Whether the first channel after a Photoshop file's colours is transparency, not a saved selection.

    Then its number of layers is stored as a negative number (Adobe Photoshop File Formats, "Layer info").
    """
    with path.open("rb") as file:
        file.seek(26)
        for _ in ("colour mode data", "image resources"):
            file.seek(int.from_bytes(file.read(4), "big"), os.SEEK_CUR)
        section, layers, count = file.read(4), file.read(4), file.read(2)  # the first two are sizes
    return any(section) and any(layers) and int.from_bytes(count, "big", signed=True) < 0


def _refused_text(head: bytes) -> RefusedKind | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not text.startswith(b"<"):
        return None
    if b"<svg" in text:
        return _SVG
    return _WEB_PAGE if text.startswith((b"<!doctype html", b"<html")) else None


def tiff_tags(path: Path) -> Any:
    """The tags of a TIFF's first picture, a mapping; None if ``path`` is no TIFF. Reads no pixels."""
    directories = _tiff_directories(path)
    return directories[0] if directories else None


def _tiff_directories(path: Path) -> list[Any]:
    """The first picture's tags, then those of its sub-pictures, where raw files keep the sensor's data."""
    found: list[Any] = []
    with suppress(*DAMAGE), path.open("rb") as file:
        head = file.read(16)
        if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return []
        head = head if b"+" in head[:4] else head[:8]
        first = _tiff_directory(file, head, TiffImagePlugin.ImageFileDirectory_v2(head).next)
        found.append(first)
        below = first.get(TiffImagePlugin.SUBIFD, ())
        for offset in (below if isinstance(below, tuple) else (below,))[:_MOST_SUB_PICTURES]:
            found.append(_tiff_directory(file, head, offset))
    return found


def _tiff_directory(file: Any, head: bytes, offset: int) -> Any:
    tags: Any = TiffImagePlugin.ImageFileDirectory_v2(head)
    file.seek(offset)
    tags.load(file)
    return tags
