"""Pictures that need another program or an extra: called what they are, counted and named in folders."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.picture_samples import heic_head, write_tiff

from std_rt.core.errors import MediaError
from std_rt.media import picture_formats, read_picture, write_picture
from std_rt.media.sources import expand_inputs, media_kind, plan_outputs

GREY = np.full((8, 8, 3), 99, np.uint8)


def _bytes(name: str, data: bytes) -> tuple[str, bytes]:
    return name, data + bytes(300)


def _dng(folder: Path, name: str = "a.dng") -> Path:
    """A thumbnail that says that it is a DNG's."""
    return write_tiff(folder / name, GREY, tags={50706: (1, [1, 4, 0, 0])})


def _nef(folder: Path, name: str = "a.NEF") -> Path:
    """A thumbnail, and below it a picture of sensor data."""
    path = write_tiff(folder / name, GREY, tags={330: (4, [0])})
    end = path.stat().st_size
    write_tiff(path, GREY, tags={330: (4, [end])})
    with path.open("ab") as file:
        file.write(struct.pack("<HHHIII", 1, 262, 3, 1, 32803, 0))
    return path


@pytest.fixture
def no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if neither library of the extra were installed."""

    def missing() -> None:
        raise ImportError

    monkeypatch.setattr(picture_formats, "_load_heif", missing)
    monkeypatch.setattr(picture_formats, "_load_jxl", missing)


OTHERS = {
    "a raw file": [
        _bytes("a.RAF", b"FUJIFILMCCD-RAW 0201"),
        _bytes("a.orf", b"IIRO\x08\0\0\0"),
        _bytes("a.rw2", b"IIU\0\x18\0\0\0"),
        _bytes("a.cr2", b"II*\0\x10\0\0\0CR\x02\0"),
        ("a.CR3", heic_head(b"crx ", b"isom")),
    ],
    "HEIC": [("IMG_1.jpg", heic_head(b"heic", b"mif1", b"heic")), ("b.heic", heic_head(b"mif1", b"heic"))],
    "JPEG XL": [_bytes("a.jxl", b"\xff\x0a\xfa"), _bytes("b.png", b"\0\0\0\x0cJXL \r\n\x87\n")],
    "SVG": [_bytes("a.svg", b'<?xml version="1.0"?>\n<svg width="9">'), _bytes("b.png", b"<svg>")],
    "web page": [_bytes("a.jpg", b"\n<!DOCTYPE html><html>")],
    "PDF": [_bytes("a.pdf", b"%PDF-1.7"), _bytes("b.ai", b"%PDF-1.6")],
    "8 bits a channel": [_bytes("a.psd", b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 8, 8, 16, 3))],
    "OpenEXR": [_bytes("a.exr", b"\x76\x2f\x31\x01")],
    "GIMP": [_bytes("a.xcf", b"gimp xcf v011")],
    "git lfs pull": [_bytes("a.png", b"version https://git-lfs.github.com/spec/v1")],
}


@pytest.mark.usefixtures("no_extra")
@pytest.mark.parametrize(("says", "name", "data"), [(k, *v) for k, files in OTHERS.items() for v in files])
def test_a_picture_of_another_kind_is_called_what_it_is(
    tmp_path: Path, says: str, name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    for read in (read_picture, media_kind):
        with pytest.raises(MediaError) as caught:
            read(tmp_path / name)
        assert says in str(caught.value)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.dng", "a.tif"])
@pytest.mark.parametrize("make", [_dng, _nef])
def test_a_raw_file_is_not_read_as_its_thumbnail(tmp_path: Path, name: str, make: object) -> None:
    path = make(tmp_path, name)  # type: ignore[operator]
    with Image.open(path) as thumbnail:
        assert thumbnail.size == (8, 8)
    with pytest.raises(MediaError, match=r"raw file.*develop"):
        read_picture(path)
    with pytest.raises(MediaError, match=r"raw file.*develop"):
        plan_outputs([path], None)


@pytest.mark.parametrize("is_merged", [True, False])
def test_a_photoshop_file_of_layers_only_is_refused(tmp_path: Path, is_merged: bool) -> None:
    version = struct.pack(">IB", 1, is_merged) + bytes(9)
    resource = b"8BIM" + struct.pack(">HHI", 1057, 0, len(version)) + version
    head = b"8BPS" + struct.pack(">H6xHIIHHII", 1, 3, 8, 8, 8, 3, 0, len(resource)) + resource + bytes(6)
    (tmp_path / "a.psd").write_bytes(head + b"\xff" * 192)
    assert media_kind(tmp_path / "a.psd") == "picture"
    if is_merged:
        assert read_picture(tmp_path / "a.psd").frame.shape == (8, 8, 3)
    else:
        with pytest.raises(MediaError, match="Maximize compatibility"):
            read_picture(tmp_path / "a.psd")


def test_a_jpeg_with_the_name_of_a_raw_file_is_read(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.jpg", GREY)
    assert read_picture((tmp_path / "a.jpg").rename(tmp_path / "a.cr2")).frame.shape == (8, 8, 3)


def test_tiffs_of_programs_are_no_raw_files(tmp_path: Path) -> None:
    # A smaller copy below the picture, as in pyramids, and half floats, which are named as such.
    path = write_tiff(tmp_path / "a.tif", GREY, tags={330: (4, [8])})
    assert read_picture(path).frame.shape == (8, 8, 3)
    with pytest.raises(MediaError, match="16-bit floats"):
        read_picture(write_tiff(tmp_path / "b.tif", GREY.astype(np.float16)))


@pytest.mark.usefixtures("no_extra")
def test_a_folder_counts_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.jpg", GREY)
    for name in ("b.NEF", "c.NEF"):
        _nef(tmp_path, name)
    (tmp_path / "IMG_1.jpg").write_bytes(heic_head(b"heic"))
    (tmp_path / "logo.svg").write_text("<svg></svg>", encoding="utf-8")
    (tmp_path / "notes.txt").touch()
    lines: list[str] = []
    jobs = plan_outputs([tmp_path], tmp_path / "out", say=lines.append)
    assert [job.source.name for job in jobs] == ["a.jpg"]
    assert lines.pop() == f"{tmp_path}: left out 1 file (notes.txt), not named as a picture or clip"
    assert len(lines) == 3
    text = "\n".join(lines)
    assert "2 files (b.NEF, c.NEF), each a raw file" in text
    assert "1 file (IMG_1.jpg), a HEIC picture" in text
    assert "1 file (logo.svg), an SVG" in text


def test_a_folder_of_raw_files_only_says_so(tmp_path: Path) -> None:
    for number in range(12):
        _nef(tmp_path, f"{number:02}.NEF")
    with pytest.raises(MediaError, match=r"12 files \(00.NEF, .*07.NEF and 4 more\).*develop"):
        expand_inputs([tmp_path])


def _photo(path: Path, **options: object) -> Path:
    picture = Image.new("RGB", (64, 32), (180, 60, 90))
    picture.paste((20, 200, 40), (0, 0, 32, 32))
    picture.save(path, **options)
    return path


def test_heic_is_read_where_its_library_is(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112], exif[0x8298] = 6, "me"
    path = _photo(tmp_path / "a.heic", exif=exif.tobytes(), quality=100)
    for name in ("a.heic", "b.jpg"):
        picture = read_picture(path.rename(tmp_path / name))
        path = tmp_path / name
        assert picture.frame.shape == (64, 32, 3)  # upright, once
        np.testing.assert_allclose(picture.frame[8, 16], (20, 200, 40), atol=6)
        assert b"me\0" in picture.exif
        assert media_kind(path) == "picture"
    assert expand_inputs([tmp_path]) == [tmp_path / "b.jpg"]


def test_a_huge_jpeg_xl_is_refused_undecoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_formats, "_load_jxl", lambda: None)
    height, width = ((side - 1) << 2 | 3 for side in (30_000, 40_000))  # 30 bits each
    header = height << 1 | width << 36
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a" + header.to_bytes(16, "little"))
    with pytest.raises(MediaError, match=r"40000 x 30000 px \(1,200 megapixels\)"):
        read_picture(tmp_path / "a.jxl")


@pytest.mark.parametrize("size", [(8, 8), (256, 64), (64, 32), (300, 200), (7, 701), (1920, 1080), (9000, 1)])
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_a_jpeg_xl_is_that_of_its_reader(
    tmp_path: Path, size: tuple[int, int], container: bool
) -> None:
    pytest.importorskip("pillow_jxl")
    Image.new("L", size).save(tmp_path / "a.jxl", use_container=container, effort=1)
    assert picture_formats.jxl_size(tmp_path / "a.jxl") == size


def test_jpeg_xl_is_read_where_its_library_is(tmp_path: Path) -> None:
    pytest.importorskip("pillow_jxl")
    exif = Image.Exif()
    exif[0x0112], exif[0x8298] = 6, "me"
    picture = read_picture(_photo(tmp_path / "a.jxl", exif=exif.tobytes(), lossless=True))
    # What its Exif says of the orientation does not count (ISO/IEC 18181-2): its pixels are upright.
    assert picture.frame.shape == (32, 64, 3)
    np.testing.assert_allclose(picture.frame[8, 16], (20, 200, 40), atol=2)
    assert b"me\0" in picture.exif
