"""Transparency, floats, profiles and other ways to say what a picture's numbers mean."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from support.media_samples import SRGB_PRIMARIES, Xyz, matrix_profile
from support.picture_samples import write_png, write_tiff

from std_rt.media import read_picture
from std_rt.media.fit import spread

Array = NDArray[Any]
RAMP = np.linspace(0, 1, 256)
# XYZ (D50) of red, green and blue
DISPLAY_P3: tuple[Xyz, Xyz, Xyz] = (
    (0.5151, 0.2412, -0.0011),
    (0.2920, 0.6922, 0.0419),
    (0.1571, 0.0666, 0.7841),
)
ADOBE_RGB: tuple[Xyz, Xyz, Xyz] = (
    (0.6097, 0.3111, 0.0195),
    (0.2053, 0.6257, 0.0609),
    (0.1492, 0.0632, 0.7446),
)
GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def _srgb(light: Array) -> Array:
    """Levels 0..255 of linear light, by the definition of IEC 61966-2-1."""
    return 255 * np.where(
        light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055
    )


# Transparency: a hidden colour must not show anywhere.


def _rgba(hidden: int) -> Array:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., :3], pixels[:2] = hidden, (200, 30, 60, 255)
    return pixels


def _keyed(path: Path, pixels: Array, key: int, bits: int = 0) -> Path:
    """Grey or RGB with one transparent colour, ``key``."""
    data = struct.pack(">H", key) * (1 if pixels.ndim == 2 else 3)
    return write_png(path, pixels, bits, [(b"tRNS", data)])


def _half(low: int, kind: type[Any], channels: int = 1) -> Array:
    """Upper half near black, lower half ``low``."""
    pixels = np.full((4, 4, channels), 3 if kind is np.uint8 else 3 * 257, kind)
    pixels[2:] = low
    return pixels[..., 0] if channels == 1 else pixels


Write = Callable[[Path, int], Path]


def _by_pillow(mode: str, suffix: str, **options: Any) -> Write:
    def write(folder: Path, hidden: int) -> Path:
        path = folder / f"a{suffix}"
        Image.fromarray(_rgba(hidden)).convert(mode).save(path, **options)
        return path

    return write


def _palette(folder: Path, hidden: int) -> Path:
    picture = Image.new("P", (4, 4))
    picture.putpalette([200, 30, 60, hidden, hidden, hidden])
    picture.putdata([0] * 8 + [1] * 8)
    picture.save(folder / "a.png", transparency=1)
    return folder / "a.png"


def _deep(channels: int) -> Write:
    def write(folder: Path, hidden: int) -> Path:
        pixels = _rgba(hidden).astype(np.uint16) * 257
        return write_png(folder / "a.png", pixels if channels == 4 else pixels[..., [0, 3]])

    return write


def _float(folder: Path, hidden: int) -> Path:
    return write_tiff(folder / "a.tif", (_rgba(hidden) / 255).astype(np.float32), tags={338: (3, [2])})


TRANSPARENT: dict[str, Write] = {
    "rgba": _by_pillow("RGBA", ".png"),
    "grey and alpha": _by_pillow("LA", ".png"),
    "palette": _palette,
    "16-bit rgba": _deep(4),
    "16-bit grey and alpha": _deep(2),
    "webp": _by_pillow("RGBA", ".webp", lossless=True, exact=True),
    "tiff": _by_pillow("RGBA", ".tif"),
    "grey tiff": _by_pillow("LA", ".tif"),
    "float tiff": _float,
    "16-bit rgb, a transparent colour": lambda f, v: _keyed(
        f / "a.png", _half(v * 257, np.uint16, 3), v * 257
    ),
    "16-bit grey, a transparent colour": lambda f, v: _keyed(f / "a.png", _half(v * 257, np.uint16), v * 257),
    "8-bit rgb, a transparent colour": lambda f, v: _keyed(f / "a.png", _half(v, np.uint8, 3), v),
    "4-bit grey, a transparent colour": lambda f, v: _keyed(f / "a.png", _half(v % 16, np.uint8), v % 16, 4),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_hidden_shows_nowhere(tmp_path: Path, kind: str) -> None:
    black, red = (read_picture(TRANSPARENT[kind](tmp_path, hidden)) for hidden in (8, 250))
    for picture in (black, red):
        assert picture.alpha is not None
        assert picture.alpha.tolist() == [[255] * 4] * 2 + [[0] * 4] * 2
        assert (picture.frame[2:] == 255).all()  # on white
        assert (picture.frame[:2] != 255).any()
    np.testing.assert_array_equal(black.frame, red.frame)


def test_a_transparent_bit_of_a_1_bit_picture(tmp_path: Path) -> None:
    picture = read_picture(_keyed(tmp_path / "a.png", np.uint8([[0, 1], [0, 1]]), 0, bits=1))
    assert picture.alpha is not None
    assert picture.alpha.tolist() == [[0, 255], [0, 255]]


def test_a_transparent_gif_is_on_white(tmp_path: Path) -> None:
    Image.fromarray(_rgba(8)).save(tmp_path / "a.gif")
    picture = read_picture(tmp_path / "a.gif")
    assert (picture.frame[2:] == 255).all()
    np.testing.assert_allclose(picture.frame[:2], np.broadcast_to((200, 30, 60), (2, 4, 3)), atol=4)


def test_a_cut_out_gets_no_white_rim_from_its_ground() -> None:
    # A dark disc with a soft edge: wherever anything of it is seen, its colour is the disc's.
    y, x = np.mgrid[:256, :256]
    alpha = np.uint8(255 * np.clip((96 - np.hypot(x - 128, y - 128)) / 4, 0, 1))
    colour = np.array([40, 20, 90])
    on_white = np.rint(colour * (alpha[..., None] / 255) + 255 - alpha[..., None]).astype(np.uint8)
    filled = spread(on_white, alpha)

    def rim(frame: Array) -> float:
        """The largest wrong level that can be seen once the picture has its alpha again."""
        return float((np.abs(frame - colour).max(axis=2) * (alpha / 255)).max())

    assert rim(on_white.astype(int)) > 40
    assert rim(filled.astype(int)) < 2
    assert (filled[0, :8] == 255).all()  # far from it
    # An opaque picture stays as it is.
    np.testing.assert_array_equal(spread(on_white, np.full_like(alpha, 255)), on_white)


# Floats


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_floats_go_from_0_to_1_whatever_the_brightest_is(
    tmp_path: Path, channels: int, kind: type[Any]
) -> None:
    values = np.repeat(RAMP.reshape(16, 16, 1), channels, axis=2).astype(kind)
    values[0, 0] = 400.0  # one spark
    values[0, 1], values[0, 2] = np.nan, -3
    picture = read_picture(write_tiff(tmp_path / "a.tif", values[..., 0] if channels == 1 else values))
    expected = GREYS.copy()
    expected[0, :3] = (255, 0, 0)
    np.testing.assert_array_equal(picture.frame, np.repeat(expected[..., None], 3, axis=2))
    assert picture.notes == ()


@pytest.mark.parametrize("channels", [1, 3])
def test_floats_of_another_scale_are_named(tmp_path: Path, channels: int) -> None:
    values = np.repeat(RAMP.reshape(16, 16, 1) * 400, channels, axis=2).astype(np.float32)
    picture = read_picture(write_tiff(tmp_path / "a.tif", values[..., 0] if channels == 1 else values))
    assert len(picture.notes) == 1
    assert "400" in picture.notes[0]
    assert "clipped" in picture.notes[0]


def test_the_profile_of_a_float_tiff_is_honoured(tmp_path: Path) -> None:
    values = np.repeat(RAMP.reshape(16, 16, 1), 3, axis=2).astype(np.float32)
    linear = matrix_profile("linear", gamma=1.0)
    picture = read_picture(write_tiff(tmp_path / "a.tif", values, tags={34675: (7, linear)}))
    np.testing.assert_allclose(picture.frame[..., 1].ravel(), _srgb(RAMP), atol=2)


@pytest.mark.parametrize(
    ("photometric", "expected"), [(1, [0, 4, 255]), (0, [255, 251, 0])], ids=["black is 0", "white is 0"]
)
def test_16_bit_grey_tiffs(tmp_path: Path, photometric: int, expected: list[int]) -> None:
    path = write_tiff(tmp_path / "a.tif", np.uint16([[0, 1000, 65535]]), photometric)
    assert read_picture(path).frame[0, :, 0].tolist() == expected


def test_32_bit_integers_keep_their_brightness(tmp_path: Path) -> None:
    values = (RAMP * (2**32 - 1)).astype(np.uint32).reshape(16, 16)
    for pixels in (values, np.repeat(values[..., None], 3, axis=2)):
        picture = read_picture(write_tiff(tmp_path / "a.tif", pixels))
        np.testing.assert_allclose(picture.frame[..., 0], GREYS, atol=1)


# Profiles and their like


def _with_profile(folder: Path, profile: bytes, mode: str = "RGB") -> Array:
    Image.fromarray(GREYS).convert(mode).save(folder / "a.png", icc_profile=profile)
    return read_picture(folder / "a.png").frame[..., 1].ravel()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_a_profile_is_judged_by_what_it_does_and_not_by_its_name(tmp_path: Path, mode: str) -> None:
    linear = _with_profile(tmp_path, matrix_profile("sRGB-elle-V2-g10.icc", gamma=1.0), mode)
    np.testing.assert_allclose(linear, _srgb(RAMP), atol=2)


def test_srgb_by_another_name_changes_nothing(tmp_path: Path) -> None:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    name = "sRGB built-in".encode("utf-16-be")
    assert name in profile
    renamed = bytes(profile).replace(name, "camera no. 12".encode("utf-16-be"))
    np.testing.assert_array_equal(_with_profile(tmp_path, renamed), np.arange(256))


@pytest.mark.parametrize("primaries", [DISPLAY_P3, ADOBE_RGB], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("colour", [(230, 40, 60), (30, 200, 90), (128, 128, 128)])
def test_colours_of_wide_spaces_come_back(
    tmp_path: Path, primaries: tuple[Xyz, Xyz, Xyz], colour: tuple[int, int, int]
) -> None:
    level = np.array(colour) / 255
    light = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    wide = np.linalg.solve(np.transpose(primaries), np.transpose(SRGB_PRIMARIES) @ light)
    stored = np.rint(255 * wide ** (1 / 2.2)).astype(np.uint8)
    assert colour[0] == colour[1] or np.abs(stored - np.array(colour)).max() > 10
    picture = Image.fromarray(np.ascontiguousarray(np.broadcast_to(stored, (4, 4, 3))))
    picture.save(tmp_path / "a.png", icc_profile=matrix_profile("sRGB", primaries))
    np.testing.assert_allclose(read_picture(tmp_path / "a.png").frame[0, 0], colour, atol=2)


def test_the_profile_of_jpeg_2000_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "a.jp2"
    Image.fromarray(GREYS).convert("RGB").save(path)
    data = path.read_bytes()
    at, header = data.index(b"colr") - 4, data.index(b"jp2h") - 4
    profile = b"colr\x02\0\0" + matrix_profile("sRGB", gamma=1.0)
    box = struct.pack(">I", len(profile) + 4) + profile
    end = at + int.from_bytes(data[at : at + 4], "big")
    size = int.from_bytes(data[header : header + 4], "big") + len(box) - (end - at)
    path.write_bytes(data[:header] + struct.pack(">I", size) + data[header + 4 : at] + box + data[end:])
    np.testing.assert_allclose(read_picture(path).frame[..., 1].ravel(), _srgb(RAMP), atol=2)


@pytest.mark.parametrize("gamma", [1.0, 1.8])
def test_png_gamma_is_applied(tmp_path: Path, gamma: float) -> None:
    said = (b"gAMA", struct.pack(">I", round(1e5 / gamma)))
    found = read_picture(write_png(tmp_path / "a.png", GREYS, chunks=[said])).frame[..., 0]
    np.testing.assert_allclose(found.ravel(), _srgb(RAMP**gamma), atol=1.5)


@pytest.mark.parametrize("more", [(b"gAMA", struct.pack(">I", 45455)), (b"sRGB", b"\0")])
def test_a_png_that_says_srgb_is_left_alone(tmp_path: Path, more: tuple[bytes, bytes]) -> None:
    wrong = [(b"gAMA", struct.pack(">I", 100_000))] if more[0] == b"sRGB" else []
    path = write_png(tmp_path / "a.png", GREYS, chunks=[more, *wrong])
    np.testing.assert_array_equal(read_picture(path).frame[..., 0], GREYS)


def test_png_chromaticities_are_applied(tmp_path: Path) -> None:
    wide = (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046)  # BT.2020
    said = [
        (b"gAMA", struct.pack(">I", 45455)),
        (b"cHRM", struct.pack(">8I", *(round(v * 1e5) for v in wide))),
    ]
    green = np.full((4, 4, 3), (0, 200, 0), np.uint8)
    found = read_picture(write_png(tmp_path / "a.png", green, chunks=said)).frame[0, 0]
    assert found[1] > 205
    grey = np.full((4, 4, 3), 120, np.uint8)
    found = read_picture(write_png(tmp_path / "a.png", grey, chunks=said)).frame[0, 0]
    np.testing.assert_allclose(found, 120, atol=1)


def _cicp_png(folder: Path, pixels: Array, primaries: int, transfer: int) -> Path:
    return write_png(folder / "a.png", pixels, chunks=[(b"cICP", bytes([primaries, transfer, 0, 1]))])


def _cicp_avif(folder: Path, pixels: Array, primaries: int, transfer: int) -> Path:
    path = folder / "a.avif"
    Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels[..., None], (*pixels.shape, 3)))).save(
        path, quality=100, subsampling="4:4:4"
    )
    data = bytearray(path.read_bytes())
    at = data.index(b"colrnclx")
    data[at + 8 : at + 12] = struct.pack(">HH", primaries, transfer)
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("write", [_cicp_png, _cicp_avif], ids=["png", "avif"])
def test_cicp_curves_are_converted(tmp_path: Path, write: Callable[..., Path]) -> None:
    flat = np.repeat(np.uint8([[0, 77, 148, 192, 255]]), 8, axis=0).repeat(8, axis=1)

    def levels(transfer: int) -> tuple[list[int], tuple[str, ...]]:
        picture = read_picture(write(tmp_path, flat, 9, transfer))
        assert np.ptp(picture.frame[4, 4::8].astype(int), axis=-1).max() <= 2  # grey stays grey
        return picture.frame[4, 4::8, 1].tolist(), picture.notes

    assert levels(13) == ([0, 77, 148, 192, 255], ())  # sRGB
    linear, notes = levels(8)
    np.testing.assert_allclose(linear, _srgb(np.array([0, 77, 148, 192, 255]) / 255), atol=2)
    assert notes == ()
    # PQ (ST 2084): 77 of 255 is 10 nits, 148 is 203, the white of a page. HLG: 75 %, near 192, is white.
    pq, notes = levels(16)
    assert pq[0] == 0
    assert pq[1] in range(61, 65)
    assert pq[2] in range(252, 256)
    assert pq[3:] == [255, 255]
    assert "HDR" in notes[0]
    hlg, notes = levels(18)
    assert hlg[2] in range(150, 200)
    assert hlg[3] in range(252, 256)
    assert "HDR" in notes[0]


def test_adobe_rgb_by_the_mark_of_cameras(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    flat = Image.new("RGB", (16, 16), (180, 60, 60))
    flat.save(tmp_path / "plain.jpg", quality=100, subsampling=0)
    flat.save(tmp_path / "marked.jpg", quality=100, subsampling=0, exif=exif)
    profile = matrix_profile("Adobe RGB", ADOBE_RGB, 563 / 256)
    flat.save(tmp_path / "profile.jpg", quality=100, subsampling=0, icc_profile=profile)
    plain, marked, right = (
        read_picture(tmp_path / f"{stem}.jpg").frame[8, 8].astype(int)
        for stem in ("plain", "marked", "profile")
    )
    np.testing.assert_allclose(marked, right, atol=2)
    assert abs(plain[0] - right[0]) > 10


def test_a_lab_photoshop_file_is_read(tmp_path: Path) -> None:
    h, w = 4, 4
    exif = Image.Exif()
    exif[0x8298] = "me"
    block = exif.tobytes()[6:]
    resource = b"8BIM" + struct.pack(">HHI", 1058, 0, len(block)) + block + bytes(len(block) % 2)
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, h, w, 8, 9)
    head += struct.pack(">II", 0, len(resource)) + resource + bytes(4)
    planes = [np.full((h, w), value, np.uint8).tobytes() for value in (255, 128, 128)]
    (tmp_path / "a.psd").write_bytes(head + struct.pack(">H", 0) + b"".join(planes))
    picture = read_picture(tmp_path / "a.psd")
    np.testing.assert_allclose(picture.frame, 255, atol=4)
    assert b"me\0" in picture.exif


def test_cv2_and_the_samples_of_this_test_agree(tmp_path: Path) -> None:
    values = np.random.default_rng(1).random((8, 8, 3)).astype(np.float32)
    assert cv2.imwrite(str(tmp_path / "b.tif"), values[..., ::-1])
    ours = read_picture(write_tiff(tmp_path / "a.tif", values)).frame
    np.testing.assert_array_equal(ours, read_picture(tmp_path / "b.tif").frame)
