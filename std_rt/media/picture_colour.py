"""The colours of pictures: any mode, depth and encoding as 8-bit sRGB, and alpha beside it.

Where a picture says how its numbers are meant, that is believed in this order: a PNG's cICP chunk, an ICC
profile, an AVIF's or HEIC's colour box (both CICP, ITU-T H.273), a PNG's sRGB and gAMA chunks, the Exif mark
of cameras for Adobe RGB. Nothing said means sRGB.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from std_rt.media.picture_formats import DAMAGE

__all__ = ["scale_note", "to_8bit", "to_srgb"]

Pixels = NDArray[np.uint8]  # [H, W, 3]

_LONGEST_PROFILE = 1 << 22  # bytes; those of presses, the largest, have two million
_ROWS = 256  # converted at a time
_LINEAR_LEVELS = 1 << 14  # of the table from linear light to sRGB: steps below half an 8-bit level
_PQ, _HLG, _LINEAR, _GAMMA_28 = 16, 18, 8, 5  # H.273 transfer characteristics that are not sRGB-like
_WHITE_NITS, _HLG_PEAK_NITS = 203.0, 1000.0  # ITU-R BT.2408
_LUMINANCE_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
_D65 = (0.3127, 0.3290)
_SRGB = (*_D65, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060)  # x and y of white, red, green, blue
_PRIMARIES = {  # H.273 colour primaries
    5: (*_D65, 0.640, 0.330, 0.290, 0.600, 0.150, 0.060),
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
_ADOBE_RGB = (*_D65, 0.640, 0.330, 0.210, 0.710, 0.150, 0.060)
_DISPLAY_GAMMA = 0.45455  # what a gAMA chunk says of sRGB
_SAME = 2  # levels: two encodings that differ by less are one


@dataclass(frozen=True)
class _Encoding:
    """How numbers are meant: an H.273 transfer or a power, and chromaticities (x, y of white, R, G, B)."""

    transfer: int = 0
    power: float = 0.0  # linear light = value ** power; 0: as ``transfer`` says
    primaries: tuple[float, ...] = _SRGB

    @property
    def is_srgb(self) -> bool:
        """Whether nothing would change."""
        plain = not self.power and self.transfer not in (_PQ, _HLG, _LINEAR, _GAMMA_28)
        return plain and np.allclose(self.primaries, _SRGB, atol=0.002)

    def linear(self) -> NDArray[np.float32]:
        """Linear light of the 256 levels, 1 the white of a page; HDR goes beyond."""
        value = np.arange(256) / 255
        if self.transfer == _PQ:  # SMPTE ST 2084
            root = value ** (32 / 2523)
            nits = 1e4 * (np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (
                16384 / 2610
            )
            return (nits / _WHITE_NITS).astype(np.float32)
        if self.transfer == _HLG:  # ITU-R BT.2100: light of the scene; of the display in _convert
            low, high = value**2 / 3, (np.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12
            return np.where(value <= 0.5, low, high).astype(np.float32)
        power = self.power or {_LINEAR: 1.0, _GAMMA_28: 2.8}.get(self.transfer, 0.0)
        if power:
            return np.asarray(value**power, np.float32)
        return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_srgb(picture: Image.Image) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """A loaded picture as RGB in sRGB, its alpha (L) if it has any transparency, and one-line notes."""
    chunks = _png_chunks(picture)
    notes: list[str] = []
    if picture.mode == "F":
        notes += scale_note(np.asarray(picture))
    colours, alpha = _split(picture, chunks)
    profile, cicp = _profile(picture), chunks.get(b"cICP")
    if profile and cicp is None:
        return _apply_profile(colours, profile), alpha, notes
    encoding = _encoding(picture, cicp)
    if colours.mode in ("CMYK", "LAB") or encoding.is_srgb:
        return _apply_profile(colours, None), alpha, notes
    if encoding.transfer in (_PQ, _HLG):
        notes.append(f"HDR (PQ or HLG): brightness above {_WHITE_NITS:.0f} nits, a page's white, was clipped")
    return Image.fromarray(_convert(np.asarray(colours.convert("RGB")), encoding)), alpha, notes


def to_8bit(values: NDArray[Any]) -> Pixels:
    """Numbers of any type to 0..255, of any shape. White is 1 for floats, beyond which they are clipped.

    White is the type's maximum for unsigned integers. Signed ones, which Pillow also uses for depths of its
    own, have the smallest white that holds them of 255 and 65535, or are stretched from minimum to maximum.
    NaN becomes black.
    """
    real = np.nan_to_num(values.astype(np.float32), nan=0.0)
    low, high = 0.0, 1.0
    if values.dtype.kind == "u":
        high = float(np.iinfo(values.dtype).max)
    elif values.dtype.kind != "f":
        low, high = min(0.0, float(real.min())), float(real.max())
        high = next((white for white in (255.0, 65535.0) if high <= white), high)
    share = (np.clip(real, low, high) - low) / max(high - low, 1e-12)
    return np.asarray(np.rint(share * 255), dtype=np.uint8)


def scale_note(values: NDArray[Any]) -> list[str]:
    """A line if floats are obviously not on the scale of 0 to 1: half of those that are not 0, or more."""
    known = values[np.isfinite(values) & (values != 0)]
    if not known.size or np.mean((known < 0) | (known > 1)) < 0.5:
        return []
    low, high = (f"{value:g}" for value in (known.min(), known.max()))
    return [
        f"its numbers go from {low} to {high} and were clipped to 0 (black) to 1 (white), the scale of floats"
        " in pictures; scale them first"
    ]


def _png_chunks(picture: Image.Image) -> dict[bytes, bytes]:
    """IHDR and cICP of a PNG, of which Pillow keeps too little."""
    found: dict[bytes, bytes] = {}
    if picture.format != "PNG":
        return found
    with Path(picture.filename).open("rb") as file:  # type: ignore[attr-defined]
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            length = int.from_bytes(head[:4], "big")
            if head[4:] in (b"IHDR", b"cICP"):
                found[head[4:]] = file.read(min(length, 64))
                file.seek(4 - min(length, 64) + length, 1)
            else:
                file.seek(length + 4, 1)
    return found


def _split(picture: Image.Image, chunks: dict[bytes, bytes]) -> tuple[Image.Image, Image.Image | None]:
    """Colours in a mode that profiles fit (L, RGB, CMYK, LAB), and alpha."""
    key = picture.info.get("transparency")
    if picture.mode[0] in "IF":
        values = _tiff_levels(picture, np.asarray(picture))
        alpha = None if not isinstance(key, int) else Image.fromarray(np.uint8(255) * (values != key))
        return Image.fromarray(to_8bit(values)), alpha
    if not picture.has_transparency_data:
        known = picture.mode in ("L", "RGB", "CMYK", "LAB")
        return picture if known else picture.convert("L" if picture.mode == "1" else "RGB"), None
    if picture.mode in ("1", "L", "RGB") and b"IHDR" in chunks:
        picture = picture.convert("L") if picture.mode == "1" else picture.copy()
        picture.info["transparency"] = _eight_bit_key(key, chunks[b"IHDR"][8])
    if picture.mode == "La":
        picture = picture.convert("LA")
    with_alpha = picture.convert("RGBA")
    # A grey profile fits grey pixels only, so grey keeps its one channel.
    is_grey = picture.mode in ("L", "LA")
    colours = picture.getchannel("L") if is_grey else with_alpha.convert("RGB")
    return colours, with_alpha.getchannel("A")


def _tiff_levels(picture: Image.Image, values: NDArray[Any]) -> NDArray[Any]:
    """Grey of a TIFF in 16 bits with black at 0; Pillow leaves 12 bits, and white at 0, as they are."""
    if picture.format != "TIFF" or values.dtype != np.uint16:
        return values
    tags = picture.tag_v2  # type: ignore[attr-defined]
    if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,):
        values = values << 4 | values >> 8
    return 65535 - values if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else values


def _eight_bit_key(key: Any, bits: int) -> Any:
    """A PNG's transparent colour, stated in its own depth, at the 8 bits that Pillow decodes it to."""
    if isinstance(key, tuple):
        return tuple(_eight_bit_key(value, bits) for value in key)
    return key >> 8 if bits == 16 else key * 255 // ((1 << bits) - 1)


# Profiles


def _profile(picture: Image.Image) -> bytes | None:
    """The picture's ICC profile; that of JPEG 2000 from its colour box, which Pillow passes over."""
    profile: bytes | None = picture.info.get("icc_profile")
    if profile or picture.format != "JPEG2000":
        return profile
    head = _first_bytes(picture, _LONGEST_PROFILE).partition(b"jp2c")[0]  # then come the pixels
    at = head.find(b"colr\x02")
    return head[at + 7 : at - 4 + int.from_bytes(head[at - 4 : at], "big")] if at >= 4 else None


def _first_bytes(picture: Image.Image, count: int) -> bytes:
    with Path(picture.filename).open("rb") as file:  # type: ignore[attr-defined]
        return file.read(count)


def _apply_profile(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB. A profile that is broken or of another colour space is ignored, as viewers do."""
    if picture.mode == "LAB":
        return _transform(picture, ImageCms.createProfile("LAB"))
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space.strip() == "RGB" and picture.mode == "L":
                picture = picture.convert("RGB")
            if picture.mode != "RGB" or not _changes_nothing(source):
                return _transform(picture, source)
        except (ImageCms.PyCMSError, OSError):
            pass
    return picture.convert("RGB")


def _changes_nothing(source: Any) -> bool:
    """Whether an RGB profile is that of sRGB by what it does to the colours of a coarse cube."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, len(levels), 3)
    result = np.asarray(_transform(Image.fromarray(cube), source))
    return int(np.abs(result.astype(np.int16) - cube).max()) <= _SAME


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


# Encodings without a profile


def _encoding(picture: Image.Image, cicp: bytes | None) -> _Encoding:
    info = picture.info
    primaries, transfer = (cicp[0], cicp[1]) if cicp and len(cicp) >= 2 else _colour_box(picture)
    if (primaries, transfer) != (2, 2):  # 2: not specified
        return _Encoding(transfer, primaries=_PRIMARIES.get(primaries, _SRGB))
    if picture.format == "PNG" and "srgb" not in info:
        gamma, said = info.get("gamma") or _DISPLAY_GAMMA, tuple(info.get("chromaticity") or ())
        usual = abs(gamma - _DISPLAY_GAMMA) < 0.01 or not 0.05 < gamma < 20
        known = len(said) == 8 and all(0 < value < 1 for value in said)
        return _Encoding(power=0.0 if usual else 1 / gamma, primaries=said if known else _SRGB)
    if picture.format in ("JPEG", "MPO") and _is_adobe_rgb(picture):
        return _Encoding(power=563 / 256, primaries=_ADOBE_RGB)
    return _Encoding()


def _colour_box(picture: Image.Image) -> tuple[int, int]:
    """CICP primaries and transfer of an AVIF or HEIC; 2 means that it does not say."""
    if picture.format == "HEIF":
        said = picture.info.get("nclx_profile") or {}
        return int(said.get("color_primaries", 2)), int(said.get("transfer_characteristics", 2))
    if picture.format == "AVIF":  # Pillow does not tell; all properties lie in the box at the beginning.
        head = _first_bytes(picture, 1 << 16)
        at = head.find(b"colrnclx")
        if 0 <= at <= len(head) - 12:
            primaries, transfer = struct.unpack_from(">HH", head, at + 8)
            return primaries, transfer
    return 2, 2


def _is_adobe_rgb(picture: Image.Image) -> bool:
    """Whether a camera set to Adobe RGB made it, which says so in Exif and embeds no profile (DCF 2.0)."""
    try:
        return bool(picture.getexif().get_ifd(ExifTags.IFD.Interop).get(1) == "R03")
    except DAMAGE:
        return False


def _convert(rgb: Pixels, encoding: _Encoding) -> Pixels:
    light = np.linspace(0, 1, _LINEAR_LEVELS)
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    levels = np.rint(255 * curve).astype(np.uint8)
    linear, matrix = encoding.linear(), _to_srgb_primaries(encoding.primaries)
    converted = np.empty_like(rgb)
    for row in range(0, len(rgb), _ROWS):
        values = linear[rgb[row : row + _ROWS]]
        if encoding.transfer == _HLG:
            luminance = values @ _LUMINANCE_2020
            values *= _HLG_PEAK_NITS / _WHITE_NITS * luminance[..., None] ** 0.2
        scaled = np.clip(values @ matrix.T, 0, 1) * (_LINEAR_LEVELS - 1)
        converted[row : row + _ROWS] = levels[np.rint(scaled).astype(np.intp)]
    return converted


def _to_srgb_primaries(primaries: tuple[float, ...]) -> NDArray[np.float32]:
    """The matrix [3, 3] between linear colours of two sets of primaries; white stays white."""
    matrix = np.linalg.solve(_rgb_to_xyz(_SRGB), _rgb_to_xyz(primaries))
    return np.asarray(matrix / matrix.sum(axis=1, keepdims=True), np.float32)


def _rgb_to_xyz(primaries: tuple[float, ...]) -> NDArray[np.float64]:
    """The matrix [3, 3] of chromaticities (x, y of white, R, G, B); SMPTE RP 177."""
    x, y = np.reshape(primaries, (4, 2)).T
    white, *colours = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
    columns = np.stack(colours, axis=1)
    return np.asarray(columns * np.linalg.solve(columns, white))
