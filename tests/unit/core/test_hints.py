"""Install hints: every extra that source and documentation name exists, and every command can be typed."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from std_rt.cli.doctor import _EXTRAS
from std_rt.core import machine
from std_rt.core.machine import install_hint, upgrade_hint
from std_rt.engines.registry import BACKENDS

ROOT = Path(__file__).parents[3]
EXTRAS = set(
    tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
)
_NAMED = (
    r"install_hint\(\"(\w+)\"\)",
    r"install_hint\('(\w+)'\)",
    r"require\([^()]*?, \"(\w+)\", \"",
    r"pip install[^\n]*?\[([\w,]+)\]",
    r"[Ee]xtra \\*\[(\w+)\]",
)


def _sources() -> list[Path]:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile"]
    return [*files, *(ROOT / "std_rt").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]


def test_every_extra_that_is_named_exists() -> None:
    found: dict[str, str] = {}
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        for pattern in _NAMED:
            for names in re.findall(pattern, text):
                found |= dict.fromkeys(names.split(","), path.name)
    assert len(found) >= 8, "the patterns find the hints"
    assert {"export", "train", "live", "text"} <= found.keys()
    known = EXTRAS | {"cudnn"}  # onnxruntime-gpu's own
    assert not {name: place for name, place in found.items() if name not in known}


def test_backends_and_doctor_name_extras_that_exist() -> None:
    hints = [backend.install for backend in BACKENDS.values()]
    named = {name for hint in hints for name in re.findall(r"\[(\w+)\]", hint)}
    assert named
    assert named | {extra for extra, _, _ in _EXTRAS} <= EXTRAS


def test_packages_that_a_hint_names_by_themselves_are_not_ours() -> None:
    """``pip install NAME`` in the source: packages of PyPI, each known."""
    known = {".", "bitsandbytes", "onnx", "tensorboard"}
    for path in _sources():
        for name in re.findall(r"pip install ([\w.][\w.-]*)", path.read_text(encoding="utf-8")):
            assert name in known, f"{path.name}: pip install {name}"


def _words(hint: str) -> list[str]:
    return shlex.split(hint)


def test_in_a_clone_the_hint_names_it_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert _words(install_hint("cuda")) == ["pip", "install", "-e", ".[cuda]"]
    assert install_hint() == "pip install -e ."
    assert upgrade_hint() == "git pull, then pip install -e ."
    monkeypatch.chdir(tmp_path)
    assert _words(install_hint("cuda")) == ["pip", "install", "-e", f"{ROOT}[cuda]"]


@pytest.mark.parametrize(
    ("noted", "place"),
    [
        (None, "std-rt"),
        ('{"url": "file:///w/std_rt.whl", "archive_info": {}}', "file:///w/std_rt.whl"),
        ('{"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": "0"}}', "git+https://x/y"),
    ],
)
def test_an_installed_package_is_named_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: str | None, place: str
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return noted

    monkeypatch.setattr(
        machine, "__file__", str(tmp_path / "site-packages" / "std_rt" / "core" / "machine.py")
    )
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed())
    assert _words(install_hint("cuda")) == ["pip", "install", "std-rt[cuda]"]
    assert _words(install_hint()) == ["pip", "install", place]
    assert "git pull" not in upgrade_hint()


def test_another_pythons_pip_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/somewhere/else/pip")
    monkeypatch.setattr(machine, "find_spec", lambda name: object())
    assert _words(install_hint("text"))[:4] == [sys.executable, "-m", "pip", "install"]
    monkeypatch.setattr(machine, "find_spec", lambda name: None)  # as `uv venv` makes them
    assert _words(install_hint("text"))[:5] == ["uv", "pip", "install", "--python", sys.executable]


def test_cmd_gets_double_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "name", "nt")
    assert machine.quoted(".[cuda]") == '".[cuda]"'
    assert machine.quoted(".") == "."
