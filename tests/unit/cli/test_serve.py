"""`std-rt serve`: what it says before it serves."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path

import pytest
from support.cli_support import Cli, picture

DOC = Path(__file__).parents[3] / "docs" / "serve.md"


def test_without_its_extra_it_says_what_to_install(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("std_rt.core.machine.find_spec", lambda name: None)
    error = cli("serve").error
    assert error.startswith("error: std-rt serve needs starlette, uvicorn, websockets, python_multipart; ")
    assert "[serve]" in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cert", "cert.pem"], "--cert and --key belong together; give both"),
        (["--cert", "no.pem", "--key", "no.pem"], "--cert no.pem and --key no.pem cannot be used"),
        (["--token", "short"], "--token needs at least 12 ASCII characters"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid is no address of this machine"),
        (["-s", "missing.png"], "missing.png"),
        (["--size", "100000"], "change the size"),
        (["--camera", "missing.mp4"], "missing.mp4 is neither a camera nor a file"),
    ],
)
def test_what_cannot_be_served_is_one_line(cli: Cli, flags: list[str], said: str) -> None:
    pytest.importorskip("starlette")
    assert said in cli("serve", "--no-open", "--port", "0", *flags).error


def test_a_port_that_is_taken_is_told_before_engines_open(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        art = str(picture(tmp_path / "art.png", 32, 32))
        error = cli("serve", "--no-open", "-s", art, "--port", port).error
    assert f"127.0.0.1 port {port} cannot be used" in error
    assert error.endswith("give another with --port, or --port 0 for any")


def test_a_window_needs_a_browser_that_has_them(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "std-rt serve opens the page in any browser" in cli("app").error


def test_the_documented_header_has_its_bytes() -> None:
    (layout,) = re.findall(r'struct\.pack\("([^"]+)"', DOC.read_text(encoding="utf-8"))
    assert struct.calcsize(layout) == 16
