"""`std-rt bulk` before Ray starts: what it needs, and flags that do not fit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.cli_support import Cli

from std_rt.core import machine


def test_without_its_extra_it_says_how_to_install_it(
    cli: Cli, photo: Path, art: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "ray" else find(name))
    line = cli("bulk", photo, "-s", art, "-o", photo.with_name("out")).error
    assert "std-rt bulk needs ray" in line
    assert "[bulk]" in line
    assert not photo.with_name("out").exists()


@pytest.mark.parametrize("flag", ["--overwrite", "--build-in-background"])
def test_flags_that_mean_nothing_here_are_refused(cli: Cli, photo: Path, art: Path, flag: str) -> None:
    assert f"bulk has no {flag}" in cli("bulk", photo, "-s", art, "-o", "out", flag).error


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs the extra bulk")
def test_a_folder_of_other_files_is_refused(cli: Cli, bundle: Path, photo: Path, art: Path) -> None:
    line = cli("bulk", photo, "-s", art, "-b", bundle, "-o", photo.parent).error
    assert "holds files that are not of std-rt bulk" in line


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs the extra bulk")
def test_what_cannot_be_done_is_said_before_ray_starts(
    cli: Cli, bundle: Path, photo: Path, art: Path
) -> None:
    out = photo.with_name("out")

    def line(*flags: object) -> str:
        return cli("bulk", photo, "-s", art, "-b", bundle, "-o", out, *flags).error

    assert "unknown backend 'nonesuch'" in line("--backend", "nonesuch")
    assert "has no 3-step schedule" in line("--steps", 3)
    assert "has no int8 form" in line("--precision", "int8")
    assert "strength must be in" in line("--style-strength", 9)
    assert "works at 16 to 512 px" in line("--size", 2000)
    assert "none.png does not exist" in line("-s", "none.png")
    assert not out.exists()
