"""What sizes, weights and LoRA arguments mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from std_rt.cli.options import parse_size, parse_style
from std_rt.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("512x384", (384, 512)), (" 64X32 ", (32, 64)), (None, None)]
)
def test_sizes(text: str | None, size: object) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "x64", "64x", "64x0", "-64", "1e3", "64 64", "9999999", "large"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("art.png", "art.png", 1.0),
        ("art.png:0.7", "art.png", 0.7),
        ("art.png:2", "art.png", 2.0),
        ("art.png:.5", "art.png", 0.5),
        ("art.png:1e-1", "art.png", 0.1),
        ("C:\\pictures\\art.png", "C:\\pictures\\art.png", 1.0),
        ("C:\\pictures\\art.png:0.7", "C:\\pictures\\art.png", 0.7),
        ("a:b.png", "a:b.png", 1.0),
        ("a:0.5:0.7", "a:0.5", 0.7),
        ("art.png:", "art.png:", 1.0),
        (":0.7", ":0.7", 1.0),
        ("art.png:nan", "art.png:nan", 1.0),
    ],
)
def test_styles(text: str, path: str, weight: float) -> None:
    assert parse_style(text) == (Path(path), weight)


def test_a_file_of_that_very_name_has_no_weight(tmp_path: Path) -> None:
    odd = tmp_path / "art:0.5"
    odd.touch()
    assert parse_style(str(odd)) == (odd, 1.0)
    assert parse_style(f"{odd}:2") == (odd, 2.0)


@pytest.mark.parametrize("weight", ["0", "-1", "0.0", "-0.5", "1e999"])
def test_weights_that_are_not_positive_numbers(weight: str) -> None:
    with pytest.raises(UsageError, match=r"weight of style art\.png must be above 0"):
        parse_style(f"art.png:{weight}")


@pytest.mark.parametrize("weight", ["70%", "0,7", "", "nan", "half"])
def test_what_is_no_number_after_a_file_is_named(tmp_path: Path, weight: str) -> None:
    art = tmp_path / "art.png"
    art.touch()
    with pytest.raises(UsageError, match=rf"{weight!r} after .*art\.png is not a weight; .*art\.png:0\.7"):
        parse_style(f"{art}:{weight}")
