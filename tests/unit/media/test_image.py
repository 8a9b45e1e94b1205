"""Pictures of every mode and every kind of damage."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin
from support.media_samples import swapped_profile

from std_rt.core.errors import MediaError
from std_rt.media import read_picture, write_picture
from std_rt.media.picture_colour import to_8bit

RAMP = np.linspace(0, 255, 48 * 64).reshape(48, 64)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2).astype(np.uint8)


def _saved(tmp_path: Path, picture: Image.Image, name: str, **options: Any) -> Path:
    path = tmp_path / name
    picture.save(path, **options)
    return path


@pytest.mark.parametrize(("mode", "name"), [("L", "a.png"), ("1", "a.png"), ("P", "a.png"), ("RGB", "a.bmp")])
def test_plain_modes_become_what_pillow_shows(tmp_path: Path, mode: str, name: str) -> None:
    source = Image.fromarray(COLOUR).convert(mode)
    picture = read_picture(_saved(tmp_path, source, name))
    assert picture.alpha is None
    assert picture.frame.dtype == np.uint8
    assert picture.frame.flags.c_contiguous
    np.testing.assert_array_equal(picture.frame, np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_transparent_picture_is_laid_over_white_and_keeps_its_alpha(tmp_path: Path, mode: str) -> None:
    source = Image.fromarray(COLOUR).convert(mode)
    source.putalpha(Image.fromarray(RAMP.astype(np.uint8)))
    picture = read_picture(_saved(tmp_path, source, "a.png"))
    assert picture.alpha is not None
    np.testing.assert_array_equal(picture.alpha, RAMP.astype(np.uint8))
    on_white = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source.convert("RGBA"))
    np.testing.assert_allclose(picture.frame, np.asarray(on_white.convert("RGB")), atol=1)


def test_opaque_alpha_is_none(tmp_path: Path) -> None:
    assert read_picture(_saved(tmp_path, Image.new("RGBA", (4, 4), "red"), "a.png")).alpha is None


def test_palette_with_transparent_colour_has_alpha(tmp_path: Path) -> None:
    source = Image.new("P", (4, 2))
    source.putpalette([255, 0, 0, 0, 0, 255])
    source.putdata([0, 1, 1, 1, 1, 1, 1, 0])
    picture = read_picture(_saved(tmp_path, source, "a.png", transparency=0))
    assert picture.alpha is not None
    assert picture.alpha.tolist() == [[0, 255, 255, 255], [255, 255, 255, 0]]
    assert picture.frame[0, 1].tolist() == [0, 0, 255]


def test_16_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    source = Image.fromarray((RAMP * 257).astype(np.uint16))
    picture = read_picture(_saved(tmp_path, source, "a.png"))
    np.testing.assert_allclose(picture.frame[..., 0], RAMP, atol=1)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_colour_keeps_its_brightness(tmp_path: Path, name: str) -> None:
    assert cv2.imwrite(str(tmp_path / name), COLOUR[:, :, ::-1].astype(np.uint16) * 257)
    np.testing.assert_allclose(read_picture(tmp_path / name).frame.astype(int), COLOUR, atol=1)


def test_huge_float_tiff_is_refused_unread(tmp_path: Path) -> None:
    assert cv2.imwrite(str(tmp_path / "a.tif"), np.zeros((48, 64, 3), np.float32))
    with pytest.raises(MediaError, match="megapixels"):
        read_picture(tmp_path / "a.tif", max_pixels=1000)


def test_white_is_1_for_floats_and_the_largest_number_for_integers() -> None:
    floats = np.array([[-5.0, np.nan, 0.5, 1.0, 400.0, np.inf]])
    assert to_8bit(floats).tolist() == [[0, 0, 128, 255, 255, 255]]
    assert to_8bit(np.array([[0, 65535]], np.int32)).tolist() == [[0, 255]]
    assert to_8bit(np.array([[0, 1000, 65535]], np.uint16)).tolist() == [[0, 4, 255]]


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_red_is_red(tmp_path: Path, name: str) -> None:
    # Pillow writes JPEGs of this mode the Adobe way: marked and inverted.
    picture = read_picture(_saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), name))
    np.testing.assert_allclose(picture.frame[8, 8], [255, 0, 0], atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(COLOUR[:20, :30])
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse, in Pillow's Transpose numbers
    stored = upright.transpose(Image.Transpose(turn[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read_picture(_saved(tmp_path, stored, "a.png", exif=exif))
    np.testing.assert_array_equal(picture.frame, np.asarray(upright))


def test_alpha_turns_with_the_picture(tmp_path: Path) -> None:
    source = Image.new("RGBA", (6, 4), "red")
    source.putpixel((0, 0), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = read_picture(_saved(tmp_path, source, "a.png", exif=exif))
    assert picture.alpha is not None
    assert picture.alpha.shape == (6, 4)
    assert picture.alpha[0, 3] == 0


def test_icc_profile_is_converted(tmp_path: Path) -> None:
    source = Image.new("RGB", (8, 8), (255, 0, 0))
    picture = read_picture(_saved(tmp_path, source, "a.png", icc_profile=swapped_profile()))
    np.testing.assert_allclose(picture.frame[4, 4], [0, 255, 0], atol=6)


def test_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = _saved(tmp_path, Image.fromarray(COLOUR), "a.png", icc_profile=profile)
    np.testing.assert_array_equal(read_picture(path).frame, COLOUR)


def test_broken_profile_is_ignored(tmp_path: Path) -> None:
    path = _saved(tmp_path, Image.fromarray(COLOUR), "a.png", icc_profile=b"no profile at all")
    np.testing.assert_array_equal(read_picture(path).frame, COLOUR)


def test_lab_becomes_rgb(tmp_path: Path) -> None:
    picture = read_picture(_saved(tmp_path, Image.new("LAB", (8, 8), (255, 128, 128)), "a.tif"))
    np.testing.assert_allclose(picture.frame[4, 4], [255, 255, 255], atol=4)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.tif", "a.bmp"])
def test_one_pixel(tmp_path: Path, name: str) -> None:
    write_picture(tmp_path / name, np.full((1, 1, 3), 200, np.uint8))
    np.testing.assert_allclose(read_picture(tmp_path / name).frame, 200, atol=2)


def test_animated_gif_read_as_picture_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = _saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert read_picture(path).frame[0, 0].tolist() == [255, 0, 0]


def _one_line(path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        read_picture(path)
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    return line


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.avif"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, name: str, share: float) -> None:
    write_picture(tmp_path / name, np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    _one_line(tmp_path / name)


def test_things_that_are_no_picture(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture, only text", encoding="utf-8")
    (tmp_path / "text.tga").write_text("not a picture, only text", encoding="utf-8")
    (tmp_path / "folder.png").mkdir()
    assert "empty" in _one_line(tmp_path / "empty.png")
    assert "cannot be read as a picture" in _one_line(tmp_path / "text.png")
    assert "cannot be read as a picture" in _one_line(tmp_path / "text.tga")
    assert "folder" in _one_line(tmp_path / "folder.png")
    assert "does not exist" in _one_line(tmp_path / "missing.png")


def _png_header(path: Path, width: int, height: int) -> Path:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(64))
    chunks = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, data, b"IEND")
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def test_huge_picture_is_refused_before_decoding(tmp_path: Path) -> None:
    # There are no pixels in this file: had it been decoded, the line would say so.
    line = _one_line(_png_header(tmp_path / "a.png", 30_000, 30_000))
    assert "30000 x 30000" in line
    assert "200 megapixels" in line


def test_large_picture_below_the_limit_warns_of_nothing(tmp_path: Path) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    assert "damaged" in _one_line(_png_header(tmp_path / "a.png", 10_000, 19_000))
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.tif", "a.avif"])
def test_flipped_bytes_give_a_picture_or_one_line(tmp_path: Path, name: str) -> None:
    write_picture(tmp_path / name, COLOUR)
    data, rng = np.frombuffer((tmp_path / name).read_bytes(), np.uint8), np.random.default_rng(3)
    for _ in range(40):
        broken = data.copy()
        broken[rng.integers(0, min(len(data), 600), 3)] = rng.integers(0, 256, 3)
        (tmp_path / name).write_bytes(broken.tobytes())
        assert _shape_or_line(tmp_path / name)


def _shape_or_line(path: Path) -> bool:
    try:
        return read_picture(path, max_pixels=10_000_000).frame.ndim == 3
    except MediaError as error:
        return "\n" not in str(error)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_alpha_is_written_where_it_can_be(tmp_path: Path, name: str) -> None:
    alpha = RAMP.astype(np.uint8)
    write_picture(tmp_path / name, COLOUR, alpha)
    read = read_picture(tmp_path / name).alpha
    assert read is not None
    np.testing.assert_array_equal(read, alpha)


def test_alpha_elsewhere_is_laid_over_white(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.jpg", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))
    np.testing.assert_allclose(read_picture(tmp_path / "a.jpg").frame, 255, atol=2)


def test_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"\.jpg .*\.png"):
        write_picture(tmp_path / "a.xyz", COLOUR)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(tmp_path / "a.png", COLOUR)
    before = (tmp_path / "a.png").read_bytes()

    def fail(self: Image.Image, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(MediaError, match="disk full"):
        write_picture(tmp_path / "a.png", COLOUR)
    assert (tmp_path / "a.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MediaError, match="cannot be written"):
        write_picture(tmp_path / "file" / "a.png", COLOUR)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file modes")
def test_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_picture(tmp_path / "a.png", COLOUR)
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "usual").stat().st_mode


# EXIF: what a result keeps


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x0100], exif[0x0101] = 6, 30, 20  # orientation, width, height
    exif[0x8298], exif[0x013B], exif[0x0132] = "© Jörg".encode(), "Ann", "2020:01:02 03:04:05"
    detail = exif.get_ifd(0x8769)
    detail[0x9003], detail[0xA002], detail[0xA003], detail[0xA001] = "2020:01:02 03:04:04", 30, 20, 2
    gps = exif.get_ifd(0x8825)
    gps[1], gps[2], gps[3], gps[4] = "N", (50.0, 30.0, 1.5), "E", (8.0, 0.0, 0.25)
    return exif


def _with_thumbnail(exif: bytes) -> bytes:
    """An EXIF block with a thumbnail, whose directory is linked from the end of the first."""
    data = bytearray(exif[6:])
    (entries,) = struct.unpack_from(">H", data, 8)
    directory = struct.pack(">HHHIIHHIII", 2, 0x0201, 4, 1, 8, 0x0202, 4, 1, 4, 0)
    struct.pack_into(">I", data, 10 + 12 * entries, len(data))
    return b"Exif\0\0" + bytes(data) + directory


@pytest.mark.parametrize("source", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif"])
@pytest.mark.parametrize("result", ["b.jpg", "b.png", "b.webp", "b.tif", "b.avif"])
def test_date_author_copyright_and_place_are_kept_and_nothing_stale(
    tmp_path: Path, source: str, result: str
) -> None:
    given: Any = _with_thumbnail(_exif().tobytes())
    if source in ("a.tif", "a.avif"):  # Pillow writes texts there in ASCII, unless they are bytes.
        block, given = given, Image.Exif()
        given.load(block)
        given[0x8298] = "© Jörg".encode()
        if (
            source == "a.avif"
        ):  # It would keep the orientation beside its EXIF, and make both anew to read it.
            del given[0x0112]
    picture = read_picture(_saved(tmp_path, Image.fromarray(COLOUR[:20, :30]), source, exif=given))
    assert picture.frame.shape[:2] == ((20, 30) if source == "a.avif" else (30, 20))
    write_picture(tmp_path / result, picture.frame[:10, :10], exif=picture.exif)
    with Image.open(tmp_path / result) as written:
        assert written.size == (10, 10)
        kept = written.getexif()
        assert kept[0x8298].encode("latin-1").decode() == "© Jörg"
        assert (kept[0x013B], kept[0x0132]) == ("Ann", "2020:01:02 03:04:05")
        assert kept.get(0x0112, 1) == 1
        assert kept.get(0x0100, 10) == 10  # TIFF has it anyway
        assert kept.get_ifd(0x8769) == {0x9003: "2020:01:02 03:04:04"}
        assert kept.get_ifd(0x8825) == {1: "N", 2: (50.0, 30.0, 1.5), 3: "E", 4: (8.0, 0.0, 0.25)}
        assert not kept.get_ifd(ExifTags.IFD.IFD1)


def test_a_picture_without_exif_gets_none(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    assert read_picture(_saved(tmp_path, Image.fromarray(COLOUR), "a.jpg", exif=exif)).exif == b""


def test_a_damaged_tag_does_not_lose_those_before_it(tmp_path: Path) -> None:
    exif = bytearray(_exif().tobytes())
    at = exif.index(struct.pack(">HH", 0x8298, 2))
    exif[at + 8 : at + 12] = struct.pack(">I", 0x00FFFFFF)  # the copyright lies outside
    picture = read_picture(_saved(tmp_path, Image.fromarray(COLOUR), "a.jpg", exif=bytes(exif)))
    assert b"Ann\0" in picture.exif


def test_author_and_copyright_of_png_texts_and_iptc_become_exif(tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("Author", "Ann Ö")
    path = _saved(tmp_path, Image.fromarray(COLOUR), "a.png", pnginfo=texts)
    assert "Ann Ö".encode() in read_picture(path).exif
    path = _saved(tmp_path, Image.fromarray(COLOUR), "a.jpg")
    said = b"\x1c\x02\x74" + struct.pack(">H", 6) + b"Agency"
    block = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(said)) + said + bytes(len(said) % 2)
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xed" + struct.pack(">H", len(block) + 2) + block + data[2:])
    assert b"Agency" in read_picture(path).exif


# Kinds of input that trouble such tools


@pytest.mark.parametrize("name", ["a.tif", "a.webp", "a.gif", "a.avif"])
def test_more_pictures_in_a_file_are_named(tmp_path: Path, name: str) -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    picture = read_picture(_saved(tmp_path, pages[0], name, save_all=True, append_images=pages[1:]))
    assert picture.frame[4, 4, 0] > 240
    assert picture.notes == ("only the first of its 3 pictures was used",)


def test_a_tiff_with_a_small_copy_is_one_picture(tmp_path: Path) -> None:
    small = Image.new("RGB", (4, 4), "red")
    small.encoderinfo = {"tiffinfo": {254: 1}}
    path = _saved(tmp_path, Image.new("RGB", (8, 8), "red"), "a.tif", save_all=True, append_images=[small])
    assert read_picture(path).notes == ()


def test_the_second_picture_of_a_phone_is_not_mentioned(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = _saved(tmp_path, pages[0], "a.jpg", format="MPO", save_all=True, append_images=pages[1:])
    picture = read_picture(path)
    assert picture.frame[4, 4, 0] > 240
    assert picture.notes == ()


@pytest.mark.parametrize("compression", ["raw", "group4", "tiff_lzw"])
def test_1_bit_tiffs(tmp_path: Path, compression: str) -> None:
    source = Image.fromarray(COLOUR).convert("1")
    picture = read_picture(_saved(tmp_path, source, "a.tif", compression=compression))
    np.testing.assert_array_equal(picture.frame, np.asarray(source.convert("RGB")))


@pytest.mark.parametrize(
    ("layers", "is_transparency"),
    [(struct.pack(">IIh2x", 8, 4, -1), True), (struct.pack(">IIh2x", 8, 4, 1), False), (bytes(4), False)],
    ids=["transparency", "selection", "selection, no layers"],
)
def test_a_fourth_channel_of_photoshop_may_be_a_selection(
    tmp_path: Path, layers: bytes, is_transparency: bool
) -> None:
    size = 4
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 4, size, size, 8, 3) + bytes(8) + layers
    planes = b"".join(bytes([value]) * size * size for value in (200, 240, 220, 0))
    (tmp_path / "a.psd").write_bytes(head + bytes(2) + planes)
    picture = read_picture(tmp_path / "a.psd")
    assert (picture.alpha is not None) == is_transparency
    assert picture.frame[2, 2].tolist() == ([255] * 3 if is_transparency else [200, 240, 220])


@pytest.mark.parametrize(("name", "means_opaque"), [("a.tga", True), ("a.bmp", True), ("a.png", False)])
def test_alpha_that_is_0_throughout(tmp_path: Path, name: str, means_opaque: bool) -> None:
    source = Image.new("RGBA", (8, 8), (200, 40, 20, 0))
    if name == "a.bmp":
        header = struct.pack(
            "<IiiHHIIiiII4I", 108, 8, 8, 1, 32, 3, 256, 0, 0, 0, 0, 255 << 16, 255 << 8, 255, 255 << 24
        )
        data = header + b"BGRs" + bytes(48) + bytes((20, 40, 200, 0)) * 64
        (tmp_path / name).write_bytes(b"BM" + struct.pack("<IHHI", 14 + len(data), 0, 0, 14 + 108) + data)
    else:
        source.save(tmp_path / name)
    picture = read_picture(tmp_path / name)
    assert (picture.alpha is None) == means_opaque
    assert picture.frame[4, 4].tolist() == ([200, 40, 20] if means_opaque else [255] * 3)
    assert len(picture.notes) == (0 if means_opaque else 1)


def test_progressive_jpegs(tmp_path: Path) -> None:
    whole = read_picture(_saved(tmp_path, Image.fromarray(COLOUR), "a.jpg")).frame
    progressive = _saved(tmp_path, Image.fromarray(COLOUR), "b.jpg", progressive=True)
    np.testing.assert_allclose(read_picture(progressive).frame.astype(int), whole, atol=2)
