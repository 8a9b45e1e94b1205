"""Whatever is wrong, `std-rt stylize` prints one line, exits 2 and leaves no file behind."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
from support.cli_support import Cli, files_in, picture
from support.media_samples import SAMPLE_RATE, ClipSpec, make_clip

from std_rt.core.bundle import MANIFEST, manifest_digest


def test_a_missing_file(stylize: Cli, tmp_path: Path) -> None:
    assert "nowhere.jpg does not exist" in stylize(tmp_path / "nowhere.jpg").error


def test_an_empty_folder(stylize: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no picture or clip" in stylize(tmp_path / "empty").error


def test_zero_bytes(stylize: Cli, tmp_path: Path) -> None:
    (tmp_path / "zero.png").touch()
    assert "zero.png is empty" in stylize(tmp_path / "zero.png").error


def test_zero_bytes_among_others(stylize: Cli, tmp_path: Path) -> None:
    """They fail as damaged files do; the others are made."""
    inputs = [tmp_path / name for name in ("zero.png", "zero.mp4", "good.png")]
    for path in inputs[:2]:
        path.touch()
    picture(inputs[2], 64, 64)
    result = stylize(*inputs, "-o", tmp_path / "out")
    assert result.code == 2
    assert files_in(tmp_path / "out") == {"good_styled.png"}
    assert result.err.count("is empty (zero bytes)") == 2
    assert "2 of 3 inputs failed" in result.err


def test_text_named_png(stylize: Cli, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture at all\n" * 50, encoding="utf-8")
    assert "text.png" in stylize(tmp_path / "text.png").error
    assert files_in(tmp_path) == {"text.png", "art"}


def test_a_truncated_jpeg(stylize: Cli, tmp_path: Path) -> None:
    whole = picture(tmp_path / "cut.jpg", 200, 200)
    whole.write_bytes(whole.read_bytes()[:2500])
    assert "cut.jpg" in stylize(whole).error
    assert files_in(tmp_path) == {"cut.jpg", "art"}


def test_a_truncated_mp4(stylize: Cli, tmp_path: Path) -> None:
    """The index of a plain MP4 is at its end, so half of one is nothing."""
    whole = make_clip(tmp_path / "cut.mp4")
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "cut.mp4" in stylize(whole).error
    assert files_in(tmp_path) == {"cut.mp4", "art"}


def test_thirty_thousand_pixels_a_side(stylize: Cli, tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(90_001))
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "huge.png").write_bytes(whole)
    assert "huge.png" in stylize(tmp_path / "huge.png").error


def test_sound_without_pictures(stylize: Cli, tmp_path: Path) -> None:
    import av
    import numpy as np

    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=SAMPLE_RATE)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    assert "sound.mp4" in stylize(tmp_path / "sound.mp4").error


def test_an_output_that_cannot_be_written(stylize: Cli, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in stylize(photo, "-o", tmp_path / "file" / "out.png").error


def test_an_output_of_another_kind(stylize: Cli, photo: Path, tmp_path: Path) -> None:
    assert "cannot become out.mp4" in stylize(photo, "-o", tmp_path / "out.mp4").error


def test_an_output_that_exists(stylize: Cli, photo: Path) -> None:
    target = photo.with_name("photo_styled.png")
    target.write_bytes(b"precious")
    assert "--overwrite" in stylize(photo).error
    assert target.read_bytes() == b"precious"


def test_the_input_as_its_own_output(stylize: Cli, photo: Path) -> None:
    before = photo.read_bytes()
    assert "input itself" in stylize(photo, "-o", photo, "--overwrite").error
    assert photo.read_bytes() == before


def test_a_style_that_is_missing_or_a_folder_or_a_text(
    cli: Cli, bundle: Path, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("nothing", encoding="utf-8")
    (tmp_path / "clip.mp4").write_bytes(b"anything")
    for style, words in (
        ("none.png", "does not exist"),
        ("folder", "is a folder; name a file in it"),
        ("text.png", "text.png"),
        ("clip.mp4", "is a clip; a style is a picture or a style file"),
    ):
        assert words in cli("stylize", photo, "--style", tmp_path / style, "-b", bundle).error


@pytest.mark.parametrize("weight", ["0", "-0.5", "-1e3"])
def test_a_style_weight_that_is_not_positive(
    cli: Cli, bundle: Path, photo: Path, art: Path, weight: str
) -> None:
    error = cli("stylize", photo, "--style", f"{art}:{weight}", "-b", bundle).error
    assert "must be above 0" in error


def test_a_style_strength_out_of_range(stylize: Cli, photo: Path) -> None:
    assert "style strength must be in 0..2" in stylize(photo, "--style-strength", 9).error


def test_a_bundle_that_nobody_knows(cli: Cli, photo: Path, art: Path) -> None:
    error = cli("stylize", photo, "--style", art, "--bundle", "std-tinny").error
    assert "did you mean 'std-tiny'?" in error


def test_a_bundle_with_one_byte_flipped(cli: Cli, own_bundle: Path, photo: Path, art: Path) -> None:
    for name in ("unet.onnx", "vae_decoder.safetensors", "conditioning.npz"):
        path = own_bundle / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        error = cli("stylize", photo, "--style", art, "--bundle", own_bundle).error
        assert f"{name} has changed" in error
        data[-1] ^= 1
        path.write_bytes(data)


def _edit(bundle: Path, **changes: object) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8")) | changes
    manifest["manifest_sha256"] = manifest_digest(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def test_a_bundle_from_the_future(cli: Cli, own_bundle: Path, photo: Path, art: Path) -> None:
    _edit(own_bundle, schema=99)
    error = cli("stylize", photo, "--style", art, "--bundle", own_bundle).error
    assert "upgrade std-rt" in error


def test_a_bundle_without_a_unet(cli: Cli, own_bundle: Path, photo: Path, art: Path) -> None:
    graphs = json.loads((own_bundle / MANIFEST).read_text(encoding="utf-8"))["graphs"]
    _edit(own_bundle, graphs={name: graph for name, graph in graphs.items() if name != "unet"})
    assert "no graph 'unet'" in cli("stylize", photo, "--style", art, "--bundle", own_bundle).error


def test_a_bundle_with_a_file_missing(cli: Cli, own_bundle: Path, photo: Path, art: Path) -> None:
    (own_bundle / "unet.safetensors").unlink()
    assert "unet.safetensors is missing" in cli("stylize", photo, "-s", art, "-b", own_bundle).error


def test_a_backend_that_is_not_installed(stylize: Cli, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from std_rt.engines import registry as base

    missing = base.BACKENDS["onnxruntime"]._replace(package="no_such_module")
    monkeypatch.setitem(base.BACKENDS, "onnxruntime", missing)
    assert "pip install -e '.[onnx]'" in stylize(photo, "--backend", "onnxruntime").error


def test_a_backend_that_nobody_knows(stylize: Cli, photo: Path) -> None:
    assert "unknown backend 'cudda'" in stylize(photo, "--backend", "cudda").error


def test_steps_that_the_bundle_does_not_allow(stylize: Cli, photo: Path) -> None:
    assert "one of 1, 2, 4" in stylize(photo, "--steps", 3).error


@pytest.mark.parametrize(
    ("size", "words"), [("9999", "16 to 512 px"), ("8", "16 to 512 px"), ("600x64", "16 to 512 px")]
)
def test_a_size_that_the_bundle_cannot_do(stylize: Cli, photo: Path, size: str, words: str) -> None:
    assert words in stylize(photo, "--size", size).error


@pytest.mark.parametrize("size", ["0", "12x", "big", "-4", "1.5", "64x0"])
def test_a_size_that_is_none(stylize: Cli, photo: Path, size: str) -> None:
    result = stylize(photo, "--size", size)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_a_failing_clip_leaves_nothing(stylize: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from std_rt import Stylizer
    from std_rt.core.errors import BackendError

    clip = make_clip(tmp_path / "clip.mp4", ClipSpec())

    def broken(*_: object, **__: object) -> object:
        raise BackendError("the engine gave up")

    monkeypatch.setattr(Stylizer, "submit_many", broken)
    result = stylize(clip)
    assert result.code == 2
    assert result.err.splitlines()[-1] == "error: the engine gave up"
    assert files_in(tmp_path) == {"clip.mp4", "art"}


@pytest.mark.parametrize(
    "flag", [("--size", 256), ("--steps", 2), ("--backend", "cpu"), ("--precision", "fp32")]
)
def test_a_bench_table_refuses_flags_it_would_ignore(cli: Cli, flag: tuple[object, ...]) -> None:
    result = cli("bench", "--table", *flag)
    assert result.code == 2
    assert "--table measures" in result.err


@pytest.mark.parametrize("mask", [False, True])
def test_overwrite_does_not_destroy_the_style_or_the_mask(
    stylize: Cli, photo: Path, tmp_path: Path, mask: bool
) -> None:
    extra = picture(tmp_path / "extra.png", 64, 64)
    before = extra.read_bytes()
    given = ("--mask", extra) if mask else ("-s", extra)
    error = stylize(photo, *given, "-o", extra, "--overwrite").error
    assert error.endswith("extra.png is the style or the mask itself; give another name with -o")
    assert extra.read_bytes() == before


def test_a_missing_style_comes_before_a_word_on_outputs(stylize: Cli, photo: Path) -> None:
    picture(photo.with_name("photo_styled.png"), 8, 8)
    assert "none.png does not exist" in stylize(photo, "-s", photo.with_name("none.png")).error


def test_of_several_pictures_the_one_that_a_mask_does_not_fit_is_named(stylize: Cli, tmp_path: Path) -> None:
    for name, width in (("wide", 96), ("square", 48)):
        picture(tmp_path / "in" / f"{name}.png", width, 48)
    mask = picture(tmp_path / "mask.png", 48, 48)
    result = stylize(tmp_path / "in", "--mask", mask, "-o", tmp_path / "out")
    assert result.code == 2
    assert "wide.png: the mask is 48x48 px and the picture 96x48" in result.err
    assert files_in(tmp_path / "out") == {"square_styled.png"}
