"""`std-rt stylize`: what it writes, where, and that flags reach the model."""

from __future__ import annotations

import signal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from support.cli_support import Cli, files_in, picture
from support.handmade import write_handmade
from support.media_samples import ClipSpec, frame_times, make_clip, sound_packets

from std_rt import Stylizer
from std_rt.core.bundle import Bundle
from std_rt.media import probe, read_picture
from std_rt.media.chroma import keep_colours


def test_a_picture_is_written_beside_its_input(stylize: Cli, photo: Path) -> None:
    result = stylize(photo)
    assert result.code == 0
    written = photo.with_name("photo_styled.png")
    assert str(written) in result.out
    assert read_picture(written).frame.shape == (40, 60, 3)
    assert files_in(photo.parent) == {"photo.png", "photo_styled.png", "art"}


def test_the_picture_is_that_of_the_python_api(
    stylize: Cli, handmade: Bundle, photo: Path, art: Path
) -> None:
    flags = ("--steps", 2, "--style-strength", 0.5, "--stroke-size", 0.8, "--keep-colors")
    stylize(photo, "-o", photo.with_name("a.png"), "--seed", 4, *flags)
    with Stylizer.load(handmade, steps=2) as stylizer:
        stylizer.set_style(art, 0.5, stroke_size=0.8, keep_colours=True)
        expected = stylizer.stylize(read_picture(photo).frame, seed=4)
    np.testing.assert_array_equal(read_picture(photo.with_name("a.png")).frame, expected)


@pytest.mark.parametrize(
    "flag",
    [("--seed", 1), ("--style-strength", 0.2), ("--steps", 1), ("--keep-colours",)],
)
def test_each_flag_changes_the_picture(stylize: Cli, photo: Path, flag: tuple[object, ...]) -> None:
    stylize(photo, "-o", photo.with_name("a.png"))
    stylize(photo, "-o", photo.with_name("b.png"), *flag)
    a, b = (read_picture(photo.with_name(name)).frame for name in ("a.png", "b.png"))
    assert (a != b).any()


def test_kept_colours_leave_alpha_alone(stylize: Cli, tmp_path: Path) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)
    rgba[:, :30, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "cut.png")
    stylize(tmp_path / "cut.png", "-o", tmp_path / "plain.png")
    stylize(tmp_path / "cut.png", "-o", tmp_path / "kept.png", "--keep-colours")
    plain, kept = (read_picture(tmp_path / f"{name}.png") for name in ("plain", "kept"))
    assert kept.alpha is not None
    np.testing.assert_array_equal(kept.alpha, rgba[..., 3])
    opaque = keep_colours(rgba[..., :3], plain.frame)[:, :30]
    np.testing.assert_array_equal(kept.frame[:, :30], opaque)


def test_both_backends_write_the_same_picture(stylize: Cli, photo: Path) -> None:
    pytest.importorskip("onnxruntime")
    for backend in ("openvino", "onnxruntime"):
        stylize(photo, "-o", photo.with_name(f"{backend}.png"), "--backend", backend, "--precision", "fp32")
    a, b = (read_picture(photo.with_name(f"{name}.png")).frame for name in ("openvino", "onnxruntime"))
    assert np.abs(a.astype(int) - b).max() <= 1


def test_the_backend_and_its_reason_are_printed(stylize: Cli, photo: Path) -> None:
    assert "handmade, 4 steps, openvino (" in stylize(photo).err


def test_styles_blend_by_weight(cli: Cli, bundle: Path, photo: Path, tmp_path: Path) -> None:
    styles = [picture(tmp_path / "art" / f"{seed}.png", 32, 32, seed) for seed in (1, 2)]
    Image.new("RGB", (32, 32), "white").save(styles[0])
    Image.new("RGB", (32, 32), "black").save(styles[1])

    def run(name: str, *weighted: str) -> np.ndarray:
        flags = [part for style in weighted for part in ("--style", style)]
        assert cli("stylize", photo, *flags, "-b", bundle, "-o", tmp_path / name).code == 0
        return read_picture(tmp_path / name).frame

    mostly = run("mostly.png", f"{styles[0]}:0.9", f"{styles[1]}:0.1")
    same = run("same.png", f"{styles[0]}:9", f"{styles[1]}:1")
    other = run("other.png", f"{styles[0]}:0.1", f"{styles[1]}:0.9")
    np.testing.assert_array_equal(mostly, same)
    assert (mostly != other).any()


def test_a_style_may_have_a_colon_and_a_number_in_its_name(cli: Cli, bundle: Path, photo: Path) -> None:
    odd = photo.with_name("art:0.5")
    Image.new("RGB", (32, 32), "white").save(odd, "png")
    assert cli("stylize", photo, "-s", odd, "-b", bundle).code == 0


@pytest.mark.parametrize(("size", "result"), [("32", (24, 36)), ("64x64", (40, 60)), ("48x32", (32, 48))])
def test_size_decides_the_working_size(stylize: Cli, photo: Path, size: str, result: tuple[int, int]) -> None:
    stylize(photo, "--size", size, "-o", photo.with_name("a.png"))
    height, width = read_picture(photo.with_name("a.png")).frame.shape[:2]
    assert abs(height - result[0]) <= 8
    assert abs(width / height - 1.5) < 0.1


def test_a_folder_and_files_go_to_an_output_folder(stylize: Cli, tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg"):
        picture(tmp_path / "in" / name, 40, 60)
    single = picture(tmp_path / "c.png", 60, 40)
    result = stylize(tmp_path / "in", single, "-o", tmp_path / "out")
    assert result.code == 0
    assert files_in(tmp_path / "out") == {"a_styled.jpg", "b_styled.png", "c_styled.png"}


def test_alpha_is_kept(stylize: Cli, tmp_path: Path) -> None:
    alpha = Image.linear_gradient("L").resize((200, 100))
    source = Image.new("RGB", (200, 100), "green")
    source.putalpha(alpha)
    source.save(tmp_path / "a.png")
    assert stylize(tmp_path / "a.png").code == 0
    result = Image.open(tmp_path / "a_styled.png")
    assert result.mode == "RGBA"
    assert result.size[0] < 200
    found = np.asarray(result)[..., 3].astype(int)
    assert np.abs(found - np.asarray(alpha.resize(result.size))).max() < 24


def test_a_format_without_alpha_is_told(stylize: Cli, tmp_path: Path) -> None:
    Image.new("RGBA", (40, 40), (200, 40, 20, 90)).save(tmp_path / "a.png")
    line = "its transparency cannot be stored as .jpg: it is laid over white"
    assert f"note: a.png: {line}" in stylize(tmp_path / "a.png", "-o", tmp_path / "a.jpg").err
    assert "note: a.png: its" not in stylize(tmp_path / "a.png", "-o", tmp_path / "b.png").err


def test_an_input_that_fails_late_does_not_stop_the_others(stylize: Cli, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(tmp_path / "in" / name, 200, 200)
    broken = tmp_path / "in" / "b.jpg"
    broken.write_bytes(broken.read_bytes()[:2000])
    result = stylize(tmp_path / "in", "-o", tmp_path / "out")
    assert result.code == 2
    assert files_in(tmp_path / "out") == {"a_styled.jpg", "c_styled.jpg"}
    assert "b.jpg" in result.err
    assert "1 of 3 inputs failed" in result.err


def test_a_clip_keeps_its_frames_times_and_sound(stylize: Cli, tmp_path: Path) -> None:
    uneven = ClipSpec(pts=(0, 512, 1024, 2560, 2816, 5120), audio="aac")
    clip = make_clip(tmp_path / "clip.mp4", uneven)
    result = stylize(clip)
    assert result.code == 0
    styled = tmp_path / "clip_styled.mp4"
    assert "6 frames" in result.out
    assert frame_times(styled) == frame_times(clip)
    assert sound_packets(styled) == sound_packets(clip)


def test_a_clip_has_one_noise(stylize: Cli, tmp_path: Path) -> None:
    still = ClipSpec(picture=lambda index: np.full((48, 64, 3), 120, np.uint8), options={"crf": "0"})
    clip = make_clip(tmp_path / "clip.mkv", still)
    assert stylize(clip).code == 0
    with av.open(str(tmp_path / "clip_styled.mkv")) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert max(np.abs(frame - frames[0]).mean() for frame in frames) < 2


ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("kind", ENDING)
def test_a_signal_leaves_a_playable_clip(
    stylize: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    clip = make_clip(tmp_path / "clip.mp4", ClipSpec(pts=tuple(range(0, 60 * 512, 512))))
    calls = 0
    submit_many = Stylizer.submit_many

    def counted(self: Stylizer, *arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:  # of 15, and what waits between the threads is some ten frames
            signal.raise_signal(kind)
        return submit_many(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Stylizer, "submit_many", counted)
    before = signal.getsignal(kind)
    result = stylize(clip)
    assert result.code == 130
    assert "stopped early" in result.out
    assert 1 <= len(frame_times(tmp_path / "clip_styled.mp4")) < 30
    assert files_in(tmp_path) == {"clip.mp4", "clip_styled.mp4", "art"}
    assert signal.getsignal(kind) is before


def test_ctrl_c_between_pictures_leaves_no_partial(
    stylize: Cli, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stylizer, "stylize", interrupted)
    result = stylize(photo)
    assert result.code == 130
    assert files_in(tmp_path) == {"photo.png", "art"}


@pytest.mark.parametrize("kind", ENDING)
def test_a_signal_while_a_picture_is_written_leaves_no_partial(
    stylize: Cli, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    def ended(self: Image.Image, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        signal.raise_signal(kind)

    monkeypatch.setattr(Image.Image, "save", ended)
    before = signal.getsignal(kind)
    assert stylize(photo).code == 130
    assert files_in(tmp_path) == {"photo.png", "art"}
    assert signal.getsignal(kind) is before


def test_a_signal_that_is_ignored_stays_ignored(
    stylize: Cli, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no such signal on Windows")
    stylized = Stylizer.stylize

    def hung_up(self: Stylizer, *arguments: object, **options: object) -> object:
        signal.raise_signal(signal.SIGHUP)
        return stylized(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Stylizer, "stylize", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert stylize(photo).code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_losses_of_a_clip_are_told_and_sound_follows_its_flag(stylize: Cli, tmp_path: Path) -> None:
    spec = ClipSpec(codec="mpeg4", options={}, audio="adpcm_ms", time_base=Fraction(1, 25), pts=range(6))
    clip = make_clip(tmp_path / "clip.avi", spec)
    result = stylize(clip)
    assert result.code == 0
    assert result.err.count("note: clip.avi: its adpcm_ms sound is converted to AAC") == 1
    assert len(sound_packets(tmp_path / "clip_styled.mp4")) > 3
    assert stylize(clip, "--sound", "copy", "-o", tmp_path / "x.mkv").code == 2
    assert stylize(clip, "--sound", "drop", "--overwrite").code == 0
    with av.open(str(tmp_path / "clip_styled.mp4")) as container:
        assert not container.streams.audio
    result = stylize(clip, "--sound", "loud")
    assert result.code == 2
    assert "--sound must be one of auto, copy, convert, drop, got 'loud'" in result.err


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.avif"])
def test_an_animation_becomes_a_clip(stylize: Cli, tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (33, 21), (80 * i, 90, 200)) for i in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, loop=0)
    assert stylize(tmp_path / name).code == 0
    assert len(frame_times(tmp_path / "a_styled.mp4")) == 3


def test_one_pixel_is_enough(stylize: Cli, tmp_path: Path) -> None:
    assert stylize(picture(tmp_path / "dot.png", 1, 1)).code == 0
    assert read_picture(tmp_path / "dot_styled.png").frame.shape == (1, 1, 3)


def test_odd_sizes_stay_odd(stylize: Cli, tmp_path: Path) -> None:
    assert stylize(picture(tmp_path / "odd.png", 37, 51)).code == 0
    assert read_picture(tmp_path / "odd_styled.png").frame.shape == (51, 37, 3)


def test_a_rotated_clip_comes_out_upright(stylize: Cli, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", ClipSpec(rotate=(90, False, False)))
    assert stylize(clip).code == 0
    info = probe(tmp_path / "clip_styled.mp4")
    assert (info.width, info.height, info.rotation) == (48, 64, 0)


def test_a_truncated_clip_is_done_as_far_as_it_goes(stylize: Cli, tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "clip.mkv", ClipSpec(pts=tuple(range(0, 60 * 512, 512))))
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    result = stylize(whole)
    assert result.code == 0
    assert "truncated" in result.err
    assert 0 < len(frame_times(tmp_path / "clip_styled.mkv")) < 60


def test_overwrite_replaces(stylize: Cli, photo: Path) -> None:
    target = photo.with_name("photo_styled.png")
    target.write_bytes(b"old")
    assert stylize(photo, "--overwrite").code == 0
    assert read_picture(target).frame.shape == (40, 60, 3)


def test_a_mask_keeps_what_is_black_in_pictures_and_clips(stylize: Cli, photo: Path) -> None:
    mask = photo.with_name("mask.png")
    values = np.zeros((20, 30), np.uint8)  # half the size of the picture
    values[:, :15] = 255
    Image.fromarray(values).save(mask)
    make_clip(photo.with_name("clip.mp4"), ClipSpec(width=60, height=40))
    assert stylize(photo, photo.with_name("clip.mp4"), "--mask", mask).code == 0
    before, after = (read_picture(photo.with_name(name)).frame for name in ("photo.png", "photo_styled.png"))
    np.testing.assert_array_equal(after[:, 31:], before[:, 31:])
    assert (after[:, :29] != before[:, :29]).mean() > 0.5
    info = probe(photo.with_name("clip_styled.mp4"))
    assert (info.width, info.height) == (60, 40)


def test_what_is_painted_under_a_mask_is_said_to_have_the_models_size(stylize: Cli, photo: Path) -> None:
    mask = photo.with_name("half.png")
    Image.fromarray(np.repeat([[0] * 30 + [255] * 30], 40, 0).astype(np.uint8)).save(mask)
    said = stylize(photo, "--mask", mask, "--size", "32").err
    assert "photo.png is 60x40; the model works at 40x24: --size sets that" in said
    assert "--upscale" not in said
    clip = make_clip(photo.with_name("clip.mp4"), ClipSpec(width=60, height=40))
    assert "clip.mp4 is 60x40; the model works at 40x24:" in stylize(clip, "--mask", mask, "--size", "32").err


def test_stopping_among_several_inputs_says_where(
    stylize: Cli, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, paint, calls = picture(photo.with_name("b.png"), 60, 40), Stylizer.stylize, []

    def second_is_stopped(self: Stylizer, *given: object, **named: object) -> object:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return paint(self, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Stylizer, "stylize", second_is_stopped)
    result = stylize(photo, other, "-o", photo.with_name("out"))
    assert result.code == 130
    assert "stopped at input 2 of 2; --skip-existing keeps the results that are there" in result.err
    assert files_in(photo.with_name("out")) == {"photo_styled.png"}


def test_guidance_that_a_bundle_was_not_made_for_is_told(cli: Cli, art: Path, photo: Path) -> None:
    bundle = write_handmade(photo.with_name("bundles") / "mine", negative=0.5).path
    asked = ("stylize", photo, "--style", art, "--bundle", bundle, "--overwrite")
    said = [cli(*asked, *more).err for more in ((), ("--guidance", 3))]
    assert ["was made for pictures without guidance" in line for line in said] == [False, True]


@pytest.mark.parametrize("name", ["photo.png", "clip.mp4"])
def test_a_mask_of_another_aspect_is_one_line_and_nothing_is_written(
    stylize: Cli, photo: Path, name: str
) -> None:
    mask = picture(photo.with_name("mask.png"), 40, 40)
    make_clip(photo.with_name("clip.mp4"), ClipSpec(width=60, height=40))
    before = files_in(photo.parent)
    result = stylize(photo.with_name(name), "--mask", mask)
    assert result.code == 2
    assert "the mask is 40x40 px and the picture 60x40; crop the mask" in result.err
    assert files_in(photo.parent) == before


# Pictures as people have them


def _hidden(path: Path, hidden: int) -> Path:
    """A ring on a transparent ground, whose hidden pixels have the level ``hidden``."""
    y, x = np.mgrid[:48, :48] - 24
    alpha = np.where(np.abs(np.hypot(x, y) - 14) < 5, 255, 0).astype(np.uint8)
    colours = np.full((48, 48, 3), hidden, np.uint8)
    colours[alpha > 0] = (200, 40, 20)
    Image.fromarray(np.dstack([colours, alpha])).save(path)
    return path


def test_hidden_pixels_change_neither_input_nor_style(
    cli: Cli, bundle: Path, photo: Path, tmp_path: Path
) -> None:
    plain = Image.open(_hidden(tmp_path / "a.png", 0))
    on_white = Image.new("RGBA", plain.size, "white")
    on_white.alpha_composite(plain)
    on_white.convert("RGB").save(tmp_path / "white.png")

    def run(source: Path, style: Path, name: str) -> np.ndarray:
        result = cli("stylize", source, "-s", style, "-b", bundle, "-o", tmp_path / name)
        assert result.code == 0
        return np.asarray(Image.open(tmp_path / name))

    black, red = _hidden(tmp_path / "black.png", 0), _hidden(tmp_path / "red.png", 250)
    np.testing.assert_array_equal(run(photo, black, "1.png"), run(photo, tmp_path / "white.png", "2.png"))
    np.testing.assert_array_equal(run(photo, red, "3.png"), np.asarray(Image.open(tmp_path / "1.png")))
    np.testing.assert_array_equal(run(black, red, "4.png"), run(red, red, "5.png"))


def test_a_folder_says_what_it_leaves_out_and_does_the_rest(stylize: Cli, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.jpg", 40, 40)
    for name in ("b.RAF", "c.RAF"):
        (tmp_path / "in" / name).write_bytes(b"FUJIFILMCCD-RAW 0201" + bytes(200))
    result = stylize(tmp_path / "in", "-o", tmp_path / "out")
    assert result.code == 0
    assert files_in(tmp_path / "out") == {"a_styled.jpg"}
    assert "left out 2 files (b.RAF, c.RAF), each a raw file" in result.err


def test_a_raw_file_is_refused_as_input_and_as_style(
    cli: Cli, stylize: Cli, bundle: Path, photo: Path
) -> None:
    raw = photo.with_name("a.RAF")
    raw.write_bytes(b"FUJIFILMCCD-RAW 0201" + bytes(200))
    assert "a raw file of a camera; develop it first" in stylize(raw).error
    assert "a raw file of a camera; develop it first" in cli("stylize", photo, "-s", raw, "-b", bundle).error
    assert files_in(photo.parent) == {"photo.png", "a.RAF", "art"}


def test_a_result_keeps_who_made_the_picture(stylize: Cli, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x8298], exif[0x0112] = "me", 6
    Image.linear_gradient("L").resize((60, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert stylize(tmp_path / "a.jpg").code == 0
    with Image.open(tmp_path / "a_styled.jpg") as written:
        assert written.size == (40, 60)
        assert dict(written.getexif()) == {0x8298: "me"}
    result = stylize(tmp_path / "a.jpg", "-o", tmp_path / "a.bmp")
    assert "note: a.jpg: its EXIF (date, author, ...) cannot be stored as .bmp" in result.err


def test_notes_on_a_picture_and_a_style_are_shown(cli: Cli, bundle: Path, photo: Path) -> None:
    pages = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for name in ("pages.tif", "style.tif"):
        pages[0].save(photo.with_name(name), save_all=True, append_images=pages[1:])
    result = cli("stylize", photo.with_name("pages.tif"), "-s", photo.with_name("style.tif"), "-b", bundle)
    assert result.code == 0
    for name in ("pages.tif", "style.tif"):
        assert f"note: {name}: only the first of its 2 pictures was used" in result.err
