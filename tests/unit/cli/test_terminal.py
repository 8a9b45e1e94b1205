"""Terminals and pipes as people have them: encodings, stdin and stdout, closed pipes, logs, second runs."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from support.cli_support import Cli, files_in, picture
from support.media_samples import ClipSpec, frame_times, make_clip

from std_rt.cli import terminal
from std_rt.cli.terminal import progress_lines, say, working
from std_rt.core import machine
from std_rt.core.machine import install_hint
from std_rt.media import probe, read_picture


def _stdout(monkeypatch: pytest.MonkeyPatch, raw: io.RawIOBase | io.BytesIO, encoding: str) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))  # type: ignore[arg-type]


def test_results_have_rows_of_their_own_beside_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars on stderr and results on stdout are on one screen; the bars leave it for each result."""
    screen = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen)
    with Progress(console=Console(file=screen, force_terminal=True), transient=True) as bars:
        bars.add_task("clip.mp4", total=2)
        bars.refresh()
        say("clip_styled.mp4 (640x360)", bars)
        bars.refresh()
    [row] = [row for row in screen.getvalue().splitlines() if "clip_styled" in row]
    erased = row.rpartition("\x1b[2K")
    assert erased[1:] == ("\x1b[2K", "clip_styled.mp4 (640x360)")
    assert screen.getvalue().count("clip.mp4") >= 2  # and come back


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_batch(
    stylize: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "日本", "z"):
        picture(tmp_path / "in" / f"{name}.png", 60, 40)
    shown = io.BytesIO()
    _stdout(monkeypatch, shown, "cp1252")
    assert stylize(tmp_path / "in", "-o", tmp_path / "out").code == 0
    assert files_in(tmp_path / "out") == {"a_styled.png", "日本_styled.png", "z_styled.png"}
    assert "\\u65e5\\u672c_styled.png" in shown.getvalue().decode("cp1252")


@pytest.mark.parametrize("command", [("bundles", "list"), ("bundles", "info")])
def test_tables_are_printed_in_any_encoding(
    cli: Cli, own_bundle: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    place = own_bundle.rename(own_bundle.with_name("日本"))
    monkeypatch.setenv("STD_RT_DATA", str(place.parent))
    shown = io.BytesIO()
    _stdout(monkeypatch, shown, "ascii")
    assert cli(*command, *([place] if command[1] == "info" else [])).code == 0
    assert shown.getvalue()


class _Gone(io.RawIOBase):
    """A pipe whose reader has gone."""

    def __init__(self, number: int) -> None:
        self._number = number

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def write(self, data: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_has_gone_ends_the_lines_and_not_the_work(
    stylize: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / "in" / f"{name}.png", 60, 40)
    with (tmp_path / "spare").open("wb") as spare:
        _stdout(monkeypatch, _Gone(spare.fileno()), "utf-8")
        result = stylize(tmp_path / "in", "-o", tmp_path / "out")
    assert result.code == 0
    assert len(files_in(tmp_path / "out")) == 3
    assert "stdout takes no more lines" in result.err


class _Pipes:
    """stdin with ``data`` in it, and a stdout that keeps bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
        self.out = io.BytesIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        _stdout(monkeypatch, self.out, "utf-8")


def test_a_picture_goes_from_stdin_to_stdout(
    stylize: Cli, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stylize(photo, "-o", tmp_path / "named.png")
    pipes = _Pipes(monkeypatch, photo.read_bytes())
    result = stylize("-", "-o", "-")
    assert result.code == 0
    assert pipes.out.getvalue() == (tmp_path / "named.png").read_bytes()
    assert "stdout (60x40" in result.err


def test_stdout_gets_the_format_of_the_input(
    stylize: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipes = _Pipes(monkeypatch, picture(tmp_path / "a.jpg", 60, 40).read_bytes())
    assert stylize("-", "-o", "-").code == 0
    with Image.open(io.BytesIO(pipes.out.getvalue())) as found:
        assert found.format == "JPEG"


def test_a_clip_on_stdin(stylize: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = make_clip(tmp_path / "clip.mkv", ClipSpec())
    _Pipes(monkeypatch, clip.read_bytes())
    assert stylize("-", "-o", tmp_path / "out.mp4").code == 0
    assert len(frame_times(tmp_path / "out.mp4")) == len(frame_times(clip))


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes are POSIX")
def test_a_pipe_is_read_like_the_file_behind_it(stylize: Cli, photo: Path, tmp_path: Path) -> None:
    """What ``<(...)`` gives: a picture and a style."""
    stylize(photo, "-o", tmp_path / "named.png")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(photo.read_bytes(),))
    writer.start()
    assert stylize(pipe, "-o", tmp_path / "piped.png").code == 0
    writer.join()
    assert (tmp_path / "piped.png").read_bytes() == (tmp_path / "named.png").read_bytes()


def test_streams_that_cannot_work_are_one_line(
    stylize: Cli, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "give -o FILE, or -o - for stdout" in stylize("-").error
    assert "- is given twice" in stylize("-", "-", "-o", tmp_path / "out").error
    assert "-o - takes one input, got 2" in stylize(photo, picture(tmp_path / "b.png", 9, 9), "-o", "-").error
    _Pipes(monkeypatch, b"")
    assert "error: stdin is empty (zero bytes)" in stylize("-", "-o", tmp_path / "x.png").error
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "stdin, which is a terminal" in stylize("-", "-o", tmp_path / "x.png").error
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "stdout, which is a terminal" in stylize(photo, "-o", "-").error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("https://example.org/a.png", "https://example.org/a.png is a web address"),
        ("file:///tmp/a.png", "give the path alone"),
        ("~/none.png", "the shell has not expanded ~"),
        ("none*.png", "no file matches none*.png"),
        ("/dev/null", "is a pipe or a device"),
        ("none.png", "none.png does not exist"),
        pytest.param(
            r"in\a.png",
            "on this system / separates folders",
            marks=pytest.mark.skipif(os.name == "nt", reason=""),
        ),
    ],
)
def test_what_is_no_file_is_named(cli: Cli, bundle: Path, photo: Path, name: str, words: str) -> None:
    assert words in cli("stylize", photo, "--style", name, "-b", bundle, "-o", "out.png").error
    assert words in cli("stylize", name, "--style", photo, "-b", bundle, "-o", "out.png").error


def test_a_tilde_is_no_folder(
    stylize: Cli, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--output=~/a.png``: shells expand it only at the beginning of a word."""
    monkeypatch.chdir(tmp_path)
    assert "write -o ~/a.png, with a space" in stylize(photo, "--output=~/a.png").error
    assert not (tmp_path / "~").exists()


def test_a_second_run_makes_what_is_missing(stylize: Cli, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / "in" / f"{name}.png", 60, 40)
    assert stylize(tmp_path / "in").code == 0
    (tmp_path / "in" / "b_styled.png").unlink()
    kept = tmp_path / "in" / "a_styled.png"
    kept.write_bytes(b"kept")
    error = stylize(tmp_path / "in").error
    assert "2 of 3 results exist already" in error
    assert "--skip-existing" in error
    # As the shell expands in/*.png: the results are among the inputs.
    everything = sorted((tmp_path / "in").glob("*.png"))
    result = stylize(*everything, "--skip-existing")
    assert result.code == 0
    assert "2 of 3 results exist already and stay" in result.err
    assert result.out.count("_styled.png") == 1
    assert kept.read_bytes() == b"kept"
    assert files_in(tmp_path / "in") == {f"{n}{m}.png" for n in "abc" for m in ("", "_styled")}
    assert stylize(*everything, "--skip-existing").out == ""
    assert "exclude each other" in stylize(tmp_path / "in", "--skip-existing", "--overwrite").error


def test_results_of_results_are_left_out_too(stylize: Cli, tmp_path: Path) -> None:
    for marks in ("", "_styled", "_styled_styled"):
        picture(tmp_path / f"a{marks}.png", 60, 40)
    assert stylize(*sorted(tmp_path.glob("a*.png")), "--skip-existing").code == 0
    assert files_in(tmp_path) == {"a.png", "a_styled.png", "a_styled_styled.png", "art"}


def test_skip_existing_never_takes_the_input_for_its_result(stylize: Cli, photo: Path) -> None:
    assert "input itself" in stylize(photo, "-o", photo, "--skip-existing").error


def test_a_clip_stopped_early_is_told_apart(stylize: Cli, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", ClipSpec(pts=tuple(range(0, 20 * 512, 512))))
    make_clip(tmp_path / "clip_styled.mp4", ClipSpec(pts=tuple(range(0, 5 * 512, 512))))
    result = stylize(clip, "--skip-existing")
    assert result.code == 0
    assert "clip_styled.mp4 has 5 of 20 frames; delete it to make it again" in result.err


def test_a_smaller_result_is_announced_once_with_the_flags(stylize: Cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "in" / f"{name}.png", 120, 80)
    err = stylize(tmp_path / "in").err
    assert err.count("--upscale brings results back") == 1
    assert "a.png is 120x80 and its result" in err
    assert "; the model works at " in err
    assert "--upscale brings" not in stylize(tmp_path / "in", "--overwrite", "--upscale").err
    assert read_picture(tmp_path / "in" / "a_styled.png").frame.shape == (80, 120, 3)


def test_clips_are_announced_and_upscaled_too(stylize: Cli, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", ClipSpec())
    assert "--upscale brings" in stylize(clip, "--size", 32).err
    assert stylize(clip, "--size", 32, "--upscale", "--overwrite").code == 0
    found, wanted = probe(tmp_path / "clip_styled.mp4"), probe(clip)
    assert (found.width, found.height, found.frames) == (wanted.width, wanted.height, wanted.frames)


def test_a_log_gets_a_line_now_and_then() -> None:
    text, time_s = io.StringIO(), 0.0
    show = progress_lines(Console(file=text, width=200), every_s=30, now=lambda: time_s)
    for done in range(100):
        time_s = float(done)
        show("clip.mp4, frames", done, 200)
    assert text.getvalue().splitlines() == [
        "clip.mp4, frames: 30 of 200 after 30 s, 3 min left",
        "clip.mp4, frames: 60 of 200 after 60 s, 2 min left",
        "clip.mp4, frames: 90 of 200 after 90 s, 2 min left",
    ]
    terminal = io.StringIO()
    show = progress_lines(Console(file=terminal, force_terminal=True), every_s=0, now=lambda: 9.0)
    show("frames", 1, 2)
    assert terminal.getvalue() == ""


def test_in_a_log_work_is_a_line_a_stage() -> None:
    text = io.StringIO()
    with working(Console(file=text), "exporting") as progress:
        progress("unet: tracing")
    assert text.getvalue().splitlines() == ["exporting", "unet: tracing"]


def test_colours_are_left_out_on_request(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "")
    result = cli("bundles", "list")
    assert "\x1b[3" not in result.out + result.err


def test_upscaling_follows_the_edges_of_the_input() -> None:
    """An edge that was painted where the picture has it is sharp again; Lanczos leaves it soft."""
    import cv2

    from std_rt.media import fit

    large = np.full((128, 128, 3), 60, np.uint8)
    large[:, 61:] = 200
    small = fit.resize(large, (32, 32))
    lanczos = cv2.resize(small, (128, 128), interpolation=cv2.INTER_LANCZOS4)
    errors = [np.abs(found.astype(int) - large).mean() for found in (fit.upscale(small, large), lanczos)]
    assert errors[0] < 0.5 * errors[1]
    flat = np.full((32, 32, 3), 90, np.uint8)  # the painting has no such edge, and gets none
    assert (fit.upscale(flat, large) == 90).all()
    assert fit.upscale(large, large) is large


@pytest.mark.parametrize("stem", ["x" * 246, "日" * 82])
def test_a_name_that_is_long_gets_a_result_all_the_same(stylize: Cli, tmp_path: Path, stem: str) -> None:
    """255 bytes are the limit; the input's own name is just within it."""
    picture(tmp_path / "in" / "a.png", 60, 40).rename(tmp_path / "in" / f"{stem}.png")
    assert stylize(tmp_path / "in").code == 0
    (result,) = files_in(tmp_path / "in") - {f"{stem}.png"}
    assert result.endswith("_styled.png")
    assert "1 of 1 results exist already" in stylize(tmp_path / "in", "--skip-existing").err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have Unicode names only")
def test_names_that_are_no_text(stylize: Cli, tmp_path: Path) -> None:
    """Of an older Linux, in Latin-1: a picture and a clip."""
    (tmp_path / "in").mkdir()
    for path, name in (
        (picture(tmp_path / "a.png", 60, 40), b"\xe9.png"),
        (make_clip(tmp_path / "c.mp4"), b"\xe8.mp4"),
    ):
        path.rename(tmp_path / "in" / os.fsdecode(name))
    result = stylize(tmp_path / "in", "-o", tmp_path / "out")
    assert result.code == 0
    assert "\\udce9_styled.png" in result.out
    assert {os.fsencode(name) for name in files_in(tmp_path / "out")} == {
        b"\xe9_styled.png",
        b"\xe8_styled.mp4",
    }


def test_a_current_folder_that_is_gone(
    stylize: Cli, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert stylize(photo).code == 0
    assert "pip install" in install_hint("cuda")


def test_what_to_type_is_what_was_typed_unless_the_shell_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.shutil, "which", lambda name: None)
    monkeypatch.setattr(terminal.sys, "argv", ["my env/bin/std-rt", "demo"])
    assert terminal.program() == "'my env/bin/std-rt'"
    monkeypatch.setattr(terminal.sys, "argv", ["/somewhere/std_rt/__main__.py", "demo"])
    monkeypatch.setattr(terminal.sys, "executable", "/usr/bin/python3")
    assert terminal.program() == "/usr/bin/python3 -m std_rt"
    monkeypatch.setattr(terminal.sys, "argv", ["C:\\venv\\Scripts\\std-rt.exe", "demo"])
    with monkeypatch.context() as windows:
        windows.setattr(machine.os, "name", "nt")
        shown = terminal.program()
    assert shown == "C:\\venv\\Scripts\\std-rt.exe"  # cmd.exe knows no single quotes
    monkeypatch.setattr(terminal.shutil, "which", lambda name: f"/bin/{name}")
    assert terminal.program() == "std-rt"
