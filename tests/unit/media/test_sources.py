"""From arguments to jobs: what is a picture, what a clip, and where results go."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.media_samples import ClipSpec, make_clip

from std_rt.core.errors import MediaError
from std_rt.media import write_picture
from std_rt.media.sources import expand_inputs, is_video, media_kind, output_path, plan_outputs

GREY = np.full((8, 8, 3), 99, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.png, a.jpg, clip.mp4, animated.gif, still.gif and things that are none of it."""
    write_picture(tmp_path / "b.png", GREY)
    write_picture(tmp_path / "a.jpg", GREY)
    write_picture(tmp_path / "still.gif", GREY)
    _animate(tmp_path / "animated.gif")
    make_clip(tmp_path / "clip.mp4", ClipSpec(pts=(0, 512)))
    (tmp_path / "notes.txt").write_text("text", encoding="utf-8")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "inner.png").mkdir()
    return tmp_path


def _animate(path: Path) -> Path:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def test_folder_gives_its_media_by_name(folder: Path) -> None:
    names = [path.name for path in expand_inputs([folder])]
    assert names == ["a.jpg", "animated.gif", "b.png", "clip.mp4", "still.gif"]


def test_results_of_an_earlier_run_are_left_out(folder: Path) -> None:
    write_picture(folder / "a_styled.jpg", GREY)
    write_picture(folder / "own_styled.jpg", GREY)
    names = [path.name for path in expand_inputs([folder])]
    assert "a_styled.jpg" not in names
    assert "own_styled.jpg" in names


def test_each_file_comes_once(folder: Path) -> None:
    assert len(expand_inputs([folder / "a.jpg", folder])) == 5


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="does not exist"):
        expand_inputs([tmp_path / "none.png"])
    with pytest.raises(MediaError, match="no picture or clip"):
        expand_inputs([tmp_path])
    with pytest.raises(MediaError, match=r"cannot be read|does not exist"):
        expand_inputs([tmp_path / ("x" * 300 + ".png")])


def test_content_decides_before_the_name(folder: Path) -> None:
    (folder / "clip.mp4").rename(folder / "clip.png")
    (folder / "a.jpg").rename(folder / "a.mp4")
    assert media_kind(folder / "clip.png") == "video"
    assert media_kind(folder / "a.mp4") == "picture"


def test_animation_is_a_clip_and_its_still_kin_is_not(folder: Path) -> None:
    _animate(folder / "animated.png")
    assert is_video(folder / "animated.gif")
    assert is_video(folder / "animated.png")
    assert media_kind(folder / "still.gif") == "picture"
    assert media_kind(folder / "b.png") == "picture"
    assert not is_video(folder / "still.gif")
    assert not is_video(folder / "missing.mp4")


def test_damaged_files_are_what_they_are_called(tmp_path: Path) -> None:
    for name in ("a.png", "a.mp4", "a.txt"):
        (tmp_path / name).write_text("text " * 100, encoding="utf-8")
    assert media_kind(tmp_path / "a.png") == "picture"
    assert media_kind(tmp_path / "a.mp4") == "video"
    with pytest.raises(MediaError, match="cannot be read as a picture or video"):
        media_kind(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "out", "video", "expected"),
    [
        ("a.jpg", None, False, "a_styled.jpg"),
        ("a.JPG", None, False, "a_styled.JPG"),
        ("a.psd", None, False, "a_styled.png"),
        ("a.jpg", "out", False, "out/a_styled.jpg"),
        ("a.jpg", "b.png", False, "b.png"),
        ("a.mp4", None, True, "a_styled.mp4"),
        ("a.mkv", "out", True, "out/a_styled.mkv"),
        ("a.mp4", "b.mov", True, "b.mov"),
    ],
)
def test_output_names(tmp_path: Path, name: str, out: str | None, video: bool, expected: str) -> None:
    found = output_path(tmp_path / name, tmp_path / out if out else None, many=False, is_video=video)
    assert found == tmp_path / expected


def test_animated_gif_becomes_mp4(folder: Path) -> None:
    assert output_path(folder / "animated.gif", None, many=False, is_video=True).name == "animated_styled.mp4"


@pytest.mark.parametrize(
    ("sound", "mode", "suffix"),
    [
        ("pcm_s16le", "auto", ".mkv"),  # MP4 takes it, players of MP4 do not
        ("pcm_s16le", "convert", ".mp4"),
        ("pcm_mulaw", "auto", ".mp4"),  # converted: Matroska does not take it either
        ("libmp3lame", "auto", ".mp4"),
    ],
)
def test_sound_decides_between_mp4_and_mkv(tmp_path: Path, sound: str, mode: str, suffix: str) -> None:
    path = make_clip(
        tmp_path / "a.avi",
        ClipSpec(codec="mpeg4", options={}, audio=sound, time_base=Fraction(1, 25), pts=(0, 1)),
    )
    assert output_path(path, None, many=False, is_video=True, sound=mode).suffix == suffix


@pytest.mark.parametrize(
    ("out", "video"), [("b.mp4", False), ("b.png", True), ("b.gif", True), ("b.xyz", False)]
)
def test_output_of_the_wrong_kind_is_refused(tmp_path: Path, out: str, video: bool) -> None:
    with pytest.raises(MediaError, match="cannot become"):
        output_path(tmp_path / "a.bin", tmp_path / out, many=False, is_video=video)


def test_plan_lists_jobs_and_makes_the_folder(folder: Path) -> None:
    jobs = plan_outputs([folder / "a.jpg", folder / "animated.gif"], folder / "new" / "out")
    assert [(j.sink.name, j.is_video) for j in jobs] == [
        ("a_styled.jpg", False),
        ("animated_styled.mp4", True),
    ]
    assert (folder / "new" / "out").is_dir()
    assert not list((folder / "new" / "out").iterdir())


def test_plan_refuses_one_name_for_many(folder: Path) -> None:
    with pytest.raises(MediaError, match="several inputs"):
        plan_outputs([folder], folder / "out.png")


def test_plan_refuses_two_results_of_one_name(folder: Path) -> None:
    make_clip(folder / "animated.mp4", ClipSpec(pts=(0, 512)))
    with pytest.raises(MediaError, match="both become"):
        plan_outputs([folder], None)


def test_plan_refuses_existing_results_unless_told(folder: Path) -> None:
    write_picture(folder / "a_styled.jpg", GREY)
    with pytest.raises(MediaError, match="--overwrite"):
        plan_outputs([folder / "a.jpg"], None)
    assert len(plan_outputs([folder / "a.jpg"], None, overwrite=True)) == 1


def test_plan_never_overwrites_an_input(folder: Path) -> None:
    with pytest.raises(MediaError, match="input itself"):
        plan_outputs([folder / "a.jpg"], folder / "a.jpg", overwrite=True)
    write_picture(folder / "a_styled.jpg", GREY)
    with pytest.raises(MediaError, match="one of the inputs"):
        plan_outputs([folder / "a.jpg", folder / "a_styled.jpg"], None, overwrite=True)
