"""Buckets and crops in known numbers; and pictures, clips, shards and captions as people keep them."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from support.media_samples import ClipSpec, make_clip, moving_bar

from std_rt.core.errors import RecipeError
from std_rt.training.data.buckets import bucket_sizes, nearest_bucket, place
from std_rt.training.data.pictures import (
    BrokenFileError,
    Entry,
    Index,
    draw_frame,
    index_pictures,
    read_frame,
)
from std_rt.training.run.recipe import PicturesConfig

RNG = np.random.default_rng(0)


def corners(h: int = 24, w: int = 40) -> np.ndarray:
    """A picture whose four quarters tell every way it can be turned: red, green / blue, white."""
    frame = np.zeros((h, w, 3), np.uint8)
    frame[: h // 2, : w // 2, 0] = 255
    frame[: h // 2, w // 2 :, 1] = 255
    frame[h // 2 :, : w // 2, 2] = 255
    frame[h // 2 :, w // 2 :] = 255
    return frame


def read(entry: Entry, rng: np.random.Generator) -> np.ndarray:
    """The picture, or a random frame of the clip."""
    return read_frame(entry, draw_frame(entry, rng))


def index(folder: Path, **settings: Any) -> Index:
    return index_pictures(PicturesConfig(str(folder), **settings))


def write(path: Path, frame: np.ndarray | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(corners() if frame is None else frame).save(path, **options)
    return path


# --- buckets ----------------------------------------------------------------------------------------


def test_buckets_of_sdxl() -> None:
    """These are in the table of SDXL's paper, appendix I."""
    sizes = bucket_sizes(1024, 32)
    assert sizes[:6] == [(704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)]
    assert sizes[6:] == [(w, h) for h, w in reversed(sizes[:5])]


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 8), (512, 32), (256, 32), (96, 32), (200, 8)])
def test_buckets_divide_and_have_about_one_area(resolution: int, multiple: int) -> None:
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert len(sizes) == len(set(sizes)) >= 3
    for h, w in sizes:
        assert h % multiple == w % multiple == 0
        assert 0.85 <= h * w / resolution**2 <= 1
        assert 0.5 <= h / w <= 2


def test_resolution_must_divide() -> None:
    assert bucket_sizes(512, 32, by_aspect=False) == [(512, 512)]
    for wrong, right in ((500, 512), (10, 32)):
        with pytest.raises(RecipeError, match=f"set it to {right}"):
            bucket_sizes(wrong, 32)


def test_nearest_bucket_by_log_aspect() -> None:
    sizes = bucket_sizes(512, 32)
    assert nearest_bucket((1000, 1000), sizes) == (512, 512)
    assert nearest_bucket((1080, 1920), sizes) == (384, 672)
    assert nearest_bucket((1920, 1080), sizes) == (672, 384)
    assert nearest_bucket((100, 5000), sizes) == (352, 704)
    # A linear scale of w / h would get the first of these wrong, one of h / w the second.
    assert nearest_bucket((100, 145), [(1, 1), (1, 2)]) == (1, 2)
    assert nearest_bucket((145, 100), [(1, 1), (2, 1)]) == (2, 1)


def test_place_says_what_sdxl_is_told() -> None:
    """1000 x 1500 covers 480 x 544 at 480 x 720; 176 columns are over."""
    centred = place((1000, 1500), (480, 544))
    assert centred.resized == (480, 720)
    assert centred.time_ids == (1000, 1500, 0, 88, 480, 544)
    tall = place((1500, 1000), (544, 480))
    assert tall.time_ids == (1500, 1000, 88, 0, 544, 480)
    small = place((50, 60), (512, 512))
    assert (small.resized, small.time_ids) == ((512, 614), (50, 60, 0, 51, 512, 512))


def test_a_mirrored_crop_is_counted_from_the_other_side() -> None:
    frame = np.random.default_rng(1).integers(0, 255, (100, 150, 3), dtype=np.uint8)
    plain, mirrored = (place((100, 150), (48, 56), np.random.default_rng(5), flip) for flip in (False, True))
    room = plain.resized[1] - 56
    assert 0 < plain.left < room
    assert mirrored.left == room - plain.left
    assert np.array_equal(mirrored.apply(frame), plain.apply(frame)[:, ::-1])
    # left is where the crop starts in the picture as it is after mirroring.
    whole = cv2.resize(frame, plain.resized[::-1], interpolation=cv2.INTER_AREA)[:, ::-1]
    assert np.array_equal(mirrored.apply(frame), whole[:48, mirrored.left : mirrored.left + 56])


def test_random_crops_reach_both_ends() -> None:
    rng = np.random.default_rng(0)
    lefts = {place((64, 72), (64, 64), rng).left for _ in range(200)}
    assert lefts == set(range(9))
    assert place((64, 72), (64, 64), rng).apply(np.zeros((64, 72, 3), np.uint8)).shape == (64, 64, 3)


# --- pictures ---------------------------------------------------------------------------------------


def test_pictures_are_found_sorted_and_measured(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "a.webp", "b.bmp"):
        write(tmp_path / name)
    write(tmp_path / "._a.png")
    (tmp_path / "notes.md").write_text("no picture", encoding="utf-8")
    found = index(tmp_path, caption=" of all ")
    assert [e.name for e in found.entries] == ["a.webp", "b.bmp", "b/1.jpg", "b/2.PNG"]
    assert {(e.size, e.caption) for e in found.entries} == {((24, 40), "of all")}
    assert not found.broken
    assert np.array_equal(read(found.entries[3], RNG), corners())


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # What the camera wrote: the upright picture, turned so that ``orientation`` turns it back.
    stored = {
        1: lambda f: f, 2: np.fliplr, 3: lambda f: np.rot90(f, 2), 4: np.flipud,
        5: lambda f: f.swapaxes(0, 1), 6: np.rot90, 7: lambda f: np.rot90(f, 2).swapaxes(0, 1),
        8: lambda f: np.rot90(f, -1),
    }[orientation](corners())  # fmt: skip
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    write(tmp_path / f"turned.{suffix}", np.ascontiguousarray(stored), exif=exif, **lossless)
    (entry,) = index(tmp_path).entries
    assert entry.size == (24, 40)
    assert np.abs(read(entry, RNG).astype(int) - corners()).max() < 12


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    deep = (grey.astype(np.uint16) * 257).view(np.uint16)
    write(tmp_path / "grey.png", grey)
    write(tmp_path / "deep.png", deep)
    write(tmp_path / "deep.tif", deep)
    write(tmp_path / "float.tif", grey.astype(np.float32) / 255)
    for entry in index(tmp_path).entries:
        assert np.abs(read(entry, RNG).astype(int) - grey[..., None]).max() <= 1, entry.name


def test_transparency_lies_over_white_and_ink_is_ink(tmp_path: Path) -> None:
    clear = np.dstack([corners(), np.zeros((24, 40), np.uint8)])
    write(tmp_path / "clear.png", clear)
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.new("CMYK", (6, 4), (255, 0, 0, 0)).save(tmp_path / "ink.jpg")
    clear_one, ink, palette_one = (read(e, RNG) for e in index(tmp_path).entries)
    assert (clear_one == 255).all()
    assert (palette_one == 255).all()
    assert ink[..., 0].max() < 60 < 150 < ink[..., 1:].min()


def _cut(path: Path, share: float = 0.5) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_broken_files_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("I am no picture", encoding="utf-8")
    for i in range(6):
        (tmp_path / f"zero{i}.jpg").touch()
    with caplog.at_level(logging.WARNING):
        found = index(tmp_path)
    assert [e.name for e in found.entries] == ["good.png"]
    assert list(found.broken) == ["text.png", *(f"zero{i}.jpg" for i in range(6))]
    (message,) = caplog.messages
    assert "7 (text.png: not a picture; zero0.jpg: " in message
    assert "zero3.jpg" in message
    assert "zero4.jpg" not in message


def test_a_cut_off_picture_breaks_when_it_is_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    _cut(write(tmp_path / "cut.jpg", noise))
    _cut(write(tmp_path / "cut.png", noise))
    write(tmp_path / "gone.png")
    entries = index(tmp_path).entries
    (tmp_path / "gone.png").unlink()
    assert len(entries) == 3
    for entry in entries:
        with pytest.raises(BrokenFileError) as caught:
            read(entry, RNG)
        assert str(tmp_path) not in str(caught.value)


def test_nothing_usable_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no usable pictures, clips or \*\.tar shards.*pictures\.folder"):
        index(tmp_path)
    (tmp_path / "a.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"broken: 1 \(a\.png: not a picture\)"):
        index(tmp_path)
    with pytest.raises(RecipeError, match="no usable videos"):
        index(tmp_path, kind="videos")
    with pytest.raises(RecipeError, match="does not exist; set it"):
        index(tmp_path / "none")


# --- captions ---------------------------------------------------------------------------------------


def _captions(found: Index) -> dict[str, str]:
    return {e.name: e.caption for e in found.entries}


def test_captions_of_imagefolder_and_sidecars(tmp_path: Path) -> None:
    for name in ("train/x/0.png", "train/1.png", "other/2.png", "other/3.png", "train/4.png"):
        write(tmp_path / name)
    rows = [
        {"file_name": "x/0.png", "text": "nought ü"},
        {"file_name": "1.png", "text": "one"},
        {"file_name": "lost.png", "text": "lost"},
        {"file_name": "4.png", "text": 4},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows] + ["", "{half"]
    (tmp_path / "train/metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "train/1.txt").write_text("not this one", encoding="utf-8")
    (tmp_path / "other/2.txt").write_text("\ufefftwo ü\n", encoding="utf-8")
    found = index(tmp_path, caption="any")
    assert _captions(found) == {
        "other/2.png": "two ü", "other/3.png": "any", "train/1.png": "one", "train/4.png": "any",
        "train/x/0.png": "nought ü",
    }  # fmt: skip
    assert list(found.broken) == [f"train/metadata.jsonl:{n}" for n in (3, 4, 6)]
    assert found.broken["train/metadata.jsonl:3"] == "no file lost.png"


def test_a_caption_that_is_no_text_leaves_its_picture_out(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    write(tmp_path / "b.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    found = index(tmp_path)
    assert _captions(found) == {"b.png": ""}
    assert list(found.broken) == ["a.png"]


def test_a_wrong_caption_key_names_the_right_one(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "p"}\n', encoding="utf-8")
    with pytest.raises(RecipeError, match=r"caption_key = 'text' but file_name, prompt; set it"):
        index(tmp_path)
    assert _captions(index(tmp_path, caption_key="prompt")) == {"a.png": "p"}
    assert _captions(index(tmp_path, caption_key="")) == {"a.png": ""}


# --- shards -----------------------------------------------------------------------------------------


def _png(frame: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "PNG")
    return stream.getvalue()


def make_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


MEMBERS = {
    "a/0.txt": b"nought",
    "a/0.png": _png(corners()),
    "a/1.JPG": _png(corners(16, 16)),
    "a/1.json": b'{"text": "one"}',
    "a/2.png": b"I am no picture",
    "a/2.txt": b"two",
    "a/3.png": _png(corners(8, 8)),
    "a/4.cls": b"7",
    "a/5.png": b"",
}


def test_shards(tmp_path: Path) -> None:
    make_shard(tmp_path / "s-0.tar", MEMBERS)
    found = index(tmp_path, caption="any")
    assert _captions(found) == {
        "s-0.tar:a/0.png": "nought", "s-0.tar:a/1.JPG": "one", "s-0.tar:a/3.png": "any"
    }  # fmt: skip
    assert [e.size for e in found.entries] == [(24, 40), (16, 16), (8, 8)]
    assert found.broken == {"s-0.tar:a/2.png": "not a picture", "s-0.tar:a/5.png": "empty"}
    assert np.array_equal(read(found.entries[0], RNG), corners())
    assert np.array_equal(read(found.entries[1], RNG), corners(16, 16))


def test_shards_that_are_cut_off_or_no_tar(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    _cut(make_shard(tmp_path / "cut.tar", {f"{i}.png": _png(noise) for i in range(4)}))
    make_shard(tmp_path / "packed.tar", MEMBERS, "w:gz")
    (tmp_path / "text.tar").write_text("I am no shard" * 100, encoding="utf-8")
    found = index(tmp_path, kind="webdataset")
    assert {e.name for e in found.entries} <= {"cut.tar:0.png", "cut.tar:1.png"}
    assert found.entries
    for entry in found.entries:
        assert np.array_equal(read(entry, RNG), noise)
    assert {"cut.tar", "packed.tar", "text.tar"} <= found.broken.keys()


# --- clips ------------------------------------------------------------------------------------------


def test_clips_give_the_frame_that_is_asked_for(tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mp4", ClipSpec(options={"crf": "1", "g": "5", "bf": "2", "preset": "ultrafast"}))
    (tmp_path / "a.txt").write_text("a bar", encoding="utf-8")
    (entry,) = index(tmp_path).entries
    assert (entry.size, entry.frames, entry.caption) == ((48, 64), 12, "a bar")
    for i in (7, 0, 11, 4, 5):
        errors = [np.abs(read_frame(entry, i).astype(int) - moving_bar(j)).mean() for j in range(12)]
        assert int(np.argmin(errors)) == i
    assert len({read(entry, np.random.default_rng(s)).tobytes() for s in range(30)}) > 6
    first, again = (read(entry, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_clips_are_upright(tmp_path: Path, degrees: int) -> None:
    def turned(_: int) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(corners(48, 64), -degrees // 90))

    h, w = turned(0).shape[:2]
    make_clip(tmp_path / "a.mp4", ClipSpec(width=w, height=h, rotate=(degrees, False, False), picture=turned))
    (entry,) = index(tmp_path).entries
    assert entry.size == (48, 64)
    middle = read(entry, RNG)[12::24, 16::32].astype(int)
    assert np.abs(middle - corners(48, 64)[12::24, 16::32]).max() < 40


def test_broken_clips(tmp_path: Path) -> None:
    make_clip(tmp_path / "good.mkv")
    _cut(make_clip(tmp_path / "cut.mp4"))
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.webm").write_text("I am no clip", encoding="utf-8")
    found = index(tmp_path)
    assert [(e.name, e.frames) for e in found.entries] == [("good.mkv", 12)]
    assert sorted(found.broken) == ["cut.mp4", "text.webm", "zero.mp4"]
    late = replace(found.entries[0], frames=40)  # as a duration that is too long would have it
    assert np.array_equal(read_frame(late, 39), read_frame(late, 11))


def test_kinds_and_single_files(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    make_clip(tmp_path / "b.mp4")
    make_shard(tmp_path / "c.tar", MEMBERS)

    def names(**settings: Any) -> list[str]:
        return sorted({e.name.split(":")[0] for e in index(tmp_path, **settings).entries})

    assert names() == ["a.png", "b.mp4", "c.tar"]
    assert names(kind="pictures") == ["a.png"]
    assert names(kind="videos") == ["b.mp4"]
    assert names(kind="webdataset") == ["c.tar"]
    (single,) = index(tmp_path / "a.png").entries
    assert isinstance(single, Entry)
    assert single.name == "a.png"
