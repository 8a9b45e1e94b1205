"""`std-rt bulk` without Ray: what it needs, flags that do not fit, and what a terminal shows."""

from __future__ import annotations

import importlib.util
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
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


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs the extra bulk")
def test_a_terminal_shows_what_is_done_and_where_the_time_goes() -> None:
    from std_rt.bulk.job import Report
    from std_rt.cli.bulk import _shown

    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    report = Report(8, engines=1, done=4, failed=2, read_s=1.0, engine_s=7.0, write_s=2.0, wall_s=2.0)
    with _shown(console, 8) as show:
        show(report)
        report.parts, report.all_parts = 3, 5
        show(report)
    assert "6/8" in screen.getvalue()
    assert "2.0/s, read 10%, engine 70%, write 20%, 3 of 5 segments, 2 failed" in screen.getvalue()
