"""`std-rt styles`, style files given to `std-rt stylize`, and what ``--style`` means in a live session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.cli_support import Cli, files_in, picture

from std_rt.cli.styles import expand_styles
from std_rt.core.bundle import load_bundle
from std_rt.core.errors import MediaError, UsageError
from std_rt.media import read_picture, write_picture
from std_rt.pipeline.style_file import load_style
from std_rt.pipeline.stylizer import Stylizer


@pytest.fixture
def ink(tmp_path: Path) -> Path:
    """A darker style picture than ``art``."""
    path = tmp_path / "art" / "ink.png"
    from std_rt.media import write_picture

    path.parent.mkdir(exist_ok=True)
    write_picture(path, np.full((40, 30, 3), 20, np.uint8))
    return path


def test_save_keeps_what_the_stylizer_encodes(cli: Cli, bundle: Path, art: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.safetensors"
    result = cli("styles", "save", art, "-o", out, "--bundle", bundle)
    assert result.code == 0
    assert f"{out} (" in result.out
    assert "kB): style 'kept' for handmade, from art.png" in result.out
    with Stylizer.load(bundle) as stylizer:
        loaded = load_style(out, stylizer.bundle)
        np.testing.assert_array_equal(loaded.style.tokens, stylizer.encode_style(art).tokens)
    assert loaded.thumbnail.shape == (32, 32, 3)


def test_save_blends_pictures_and_style_files(
    cli: Cli, bundle: Path, art: Path, ink: Path, tmp_path: Path
) -> None:
    one, both = tmp_path / "one.safetensors", tmp_path / "both.safetensors"
    assert cli("styles", "save", ink, "-o", one, "-b", bundle, "--name", "my  ink").code == 0
    result = cli("styles", "save", f"{art}:3", f"{one}:1", "-o", both, "-b", bundle)
    assert "from art.png 75 % + ink.png 25 %" in result.out
    with Stylizer.load(bundle) as stylizer:
        parts = [stylizer.encode_style(path).tokens for path in (art, ink)]
        mixed = load_style(both, stylizer.bundle).style.tokens
    np.testing.assert_allclose(mixed, 0.75 * parts[0] + 0.25 * parts[1], rtol=1e-5)
    assert load_style(one, None).name == "my ink"


def test_save_stores_the_stroke_size_of_a_picture(
    cli: Cli, bundle: Path, art: Path, photo: Path, tmp_path: Path
) -> None:
    kept, size = tmp_path / "kept.safetensors", ("--stroke-size", 2)
    spot = np.zeros((3, 3, 3), np.uint8)  # its middle is in all four quarters, so this encoder's mean changes
    spot[1, 1] = 255
    write_picture(art, spot)
    assert cli("styles", "save", art, "-o", kept, "-b", bundle, *size).code == 0
    rows = [row.split() for row in cli("styles", "show", kept).out.splitlines()]
    assert ["stroke", "size", "2"] in rows
    for name, style, flags in (("a", art, size), ("b", kept, size), ("c", kept, ()), ("d", art, ())):
        assert (
            cli("stylize", photo, "-s", style, "-o", tmp_path / f"{name}.png", "-b", bundle, *flags).code == 0
        )
    a, b, c, d = (read_picture(tmp_path / f"{name}.png").frame for name in "abcd")
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
    assert (a != d).any()


def test_a_stroke_size_is_refused_where_the_picture_is_gone(
    cli: Cli, bundle: Path, art: Path, photo: Path, tmp_path: Path
) -> None:
    kept, out = tmp_path / "kept.safetensors", tmp_path / "out.safetensors"
    cli("styles", "save", art, "-o", kept, "-b", bundle)
    said = "kept.safetensors was saved at stroke size 1 without its picture, which stroke size 1.5 needs"
    size = ("--stroke-size", 1.5)
    assert said in cli("styles", "save", kept, "-o", out, "-b", bundle, *size).error
    assert said in cli("stylize", photo, "-s", kept, "-b", bundle, *size).error
    assert "must be in 0.5..2, got 3" in cli("styles", "save", art, "-o", out, "--stroke-size", 3).error
    assert "must be in 0.5..2, got 0" in cli("stylize", photo, "-s", art, "--stroke-size", 0).error
    assert files_in(tmp_path) == {"kept.safetensors", "photo.png", "art"}


def test_show_says_what_is_inside_and_who_can_use_it(
    cli: Cli, bundle: Path, art: Path, ink: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.safetensors"
    cli("styles", "save", f"{art}:0.7", f"{ink}:0.3", "-o", out, "-b", bundle, "--name", "[bold]x")
    shown = cli("styles", "show", out)
    assert shown.code == 0
    for text in ("[bold]x", "2 tokens of 4 numbers, 6 pooled", "32 x 32 px", "art.png 70 % + ink.png 30 %"):
        assert text in shown.out
    assert "no bundle here" in shown.out
    monkeypatch.setattr("std_rt.core.bundle.list_bundles", lambda: [("bad", None), load_bundle(bundle)])
    rows = cli("styles", "show", out).out.splitlines()
    assert next(row for row in rows if row.startswith("works with")).split()[2:] == ["handmade"]


def test_stylize_takes_a_style_file_for_its_picture(
    cli: Cli, bundle: Path, art: Path, ink: Path, photo: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.safetensors"
    cli("styles", "save", art, "-o", kept, "-b", bundle)
    for name, first in (("a", art), ("b", kept)):
        result = cli(
            "stylize",
            photo,
            "-s",
            f"{first}:0.6",
            "-s",
            f"{ink}:0.4",
            "-o",
            tmp_path / f"{name}.png",
            "-b",
            bundle,
        )
        assert result.code == 0, result.err
    drawn, stored = (read_picture(tmp_path / f"{name}.png").frame for name in "ab")
    np.testing.assert_array_equal(drawn, stored)


def test_stylize_refuses_a_style_file_of_another_encoder(
    cli: Cli, bundle: Path, art: Path, photo: Path
) -> None:
    kept = art.with_name("kept.safetensors")
    cli("styles", "save", art, "-o", kept, "-b", bundle)
    error = cli("stylize", photo, "-s", kept).error
    assert "was made for the style encoder of bundle 'handmade'" in error
    assert "--bundle std-tiny --overwrite" in error


def test_save_checks_places_before_any_work(cli: Cli, bundle: Path, art: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.touch()
    assert "exists already" in cli("styles", "save", art, "-o", taken, "-b", "nowhere").error
    assert (
        "ends in .safetensors" in cli("styles", "save", art, "-o", tmp_path / "a.png", "-b", "nowhere").error
    )
    assert (
        "no.png does not exist"
        in cli("styles", "save", tmp_path / "no.png", "-o", taken, "--overwrite").error
    )
    assert "must be above 0" in cli("styles", "save", f"{art}:0", "-o", tmp_path / "a.safetensors").error
    assert (
        "there is no bundle" in cli("styles", "save", art, "-o", tmp_path / "a.safetensors", "-b", "no").error
    )
    assert cli("styles", "save", art, "-o", taken, "-b", bundle, "--overwrite").code == 0
    assert files_in(tmp_path) == {"taken.safetensors", "art"}


def test_what_is_no_style_is_one_line(cli: Cli, bundle: Path, art: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.lora_A.weight": np.zeros((2, 2), np.float32)}, lora)
    assert "is a LoRA, not a style" in cli("styles", "show", lora).error
    out = tmp_path / "out.safetensors"
    assert "is a LoRA, not a style" in cli("styles", "save", lora, "-o", out, "-b", bundle).error
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    assert "text.png" in cli("styles", "save", tmp_path / "text.png", "-o", out, "-b", bundle).error
    assert "is not a .safetensors file" in cli("styles", "show", art).error
    assert "does not exist" in cli("styles", "show", tmp_path / "no.safetensors").error
    assert "is a folder" in cli("styles", "show", tmp_path).error
    assert files_in(tmp_path) == {"lora.safetensors", "text.png", "art"}


# --style of a live session


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """Three styles and what is none."""
    folder = tmp_path / "gallery"
    for name in ("b", "a"):
        picture(folder / f"{name}.png", 8, 8)
    (folder / "c.safetensors").write_bytes(b"opened later")
    (folder / ".d.png").touch()
    (folder / "notes.txt").touch()
    return folder


def test_files_with_and_without_weights_and_folders(gallery: Path, art: Path) -> None:
    assert expand_styles([f"{art}:0.7", str(gallery)]) == [
        (art, 0.7),
        (gallery / "a.png", None),
        (gallery / "b.png", None),
        (gallery / "c.safetensors", None),
    ]
    assert expand_styles([f"{gallery / 'c.safetensors'}:0", f"{art}:2"])[0] == (gallery / "c.safetensors", 0)


def test_a_file_comes_once_with_the_weight_it_was_given(
    gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [None, 0.5, None]
    monkeypatch.chdir(gallery.parent)
    for texts in ([str(gallery), "gallery/b.png:0.5"], [str(gallery), str(gallery / "b.png:.5"), "gallery"]):
        found = expand_styles(texts)
        assert [path.name for path, _ in found] == ["a.png", "b.png", "c.safetensors"]
        assert [weight for _, weight in found] == weights
    with pytest.raises(UsageError, match=r"has two weights, 0\.5 and 0\.2; give one"):
        expand_styles(["gallery/b.png:.5", f"{gallery / 'b.png'}:.2"])


def test_a_file_whose_name_ends_in_a_number_needs_no_weight(tmp_path: Path) -> None:
    if Path("a:1").drive:
        pytest.skip("no colon in names on Windows")
    odd = tmp_path / "art:2"
    odd.write_bytes(b"x")
    assert expand_styles([str(odd)]) == [(odd, None)]
    assert expand_styles([f"{odd}:0.5"]) == [(odd, 0.5)]


@pytest.mark.parametrize("weight", ["-1", "1e999"])
def test_weights_that_are_none_are_refused(art: Path, weight: str) -> None:
    with pytest.raises(UsageError, match="must be 0 or more"):
        expand_styles([f"{art}:{weight}"])


def test_other_refusals_are_one_line(gallery: Path, art: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        ([str(tmp_path / "no.png")], "does not exist"),
        ([str(tmp_path / "no.png:0.5")], "no.png does not exist"),
        ([str(tmp_path / "empty")], "contains no picture or style file"),
        ([f"{gallery}:0.5"], "is a folder and cannot have a weight"),
        ([f"{art}:0", f"{gallery / 'a.png'}:0"], "all style weights are 0"),
    ]
    for texts, said in cases:
        with pytest.raises((UsageError, MediaError), match=said) as caught:
            expand_styles(texts)
        assert "\n" not in str(caught.value)
