"""Who may import whom, read from the source: the runtime stays free of torch, and parts stay apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import std_rt

ROOT = Path(std_rt.__file__).parent

# Part of std_rt -> parts it may import. Everyone may import `errors` and the package itself.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"stylizer"},
    "errors": set(),
    "schedule": set(),
    "samplers": {"schedule"},
    "digest": set(),
    "model_card": set(),
    "external_data": set(),
    "machine": set(),
    "bundle": {"schedule", "external_data", "digest"},
    "engines": {"external_data", "digest"},
    "prompt": set(),
    "text": {"prompt", "bundle", "engines"},
    "lanes": set(),
    "media": {"lanes"},
    "examples": set(),
    "conditioning": {"frame_program"},
    "frame_program": {"schedule", "engines"},
    "stream_program": {"schedule", "engines", "frame_program"},
    "state": set(),
    "guidance": {"bundle", "frame_program"},
    "levels": {"conditioning", "engines", "frame_program", "schedule", "stream_program"},
    "opening": {"bundle", "engines", "frame_program", "levels", "stream_program"},
    "stream_batch": {"conditioning", "engines", "levels", "state"},
    "stylizer": {
        "conditioning",
        "engines",
        "bundle",
        "media",
        "frame_program",
        "guidance",
        "levels",
        "opening",
        "schedule",
        "state",
        "stream_batch",
        "text",
    },
    "bench": {"stylizer", "schedule", "conditioning", "engines", "bundle", "media", "machine", "baseline"},
    "bench_table": {"bench", "bundle", "engines", "machine", "stylizer", "baseline"},
    "baseline": {"export", "stylizer", "schedule", "conditioning", "bundle"},
    "doctor": {"bundle", "engines", "machine", "media"},
    "demo": {"examples", "media", "stylizer", "stream"},
    "evaluate": {"media", "conditioning", "stylizer", "measures"},
    "measures": set(),
    "style_file": {"conditioning", "bundle", "media"},
    "stream": {
        "stylizer",
        "engines",  # Mark
        "conditioning",
        "frame_program",
        "bundle",
        "media",
        "measures",
        "machine",
        "style_file",
        "lanes",
    },
    "live": {
        "stylizer",
        "conditioning",
        "bundle",
        "media",
        "measures",
        "machine",
        "style_file",
        "stream",
        "lanes",
    },
    "live_show": {"live", "media", "stream"},
    "bench_live": {"stylizer", "bundle", "media", "machine", "stream", "live", "examples", "bench"},
    "export": {
        "engines",
        "bundle",
        "schedule",
        "samplers",
        "external_data",
        "digest",
        "machine",
        "model_card",
        "prompt",
        "text",
        "stylizer",  # int8 is judged by pictures
        "examples",
    },
    "training": {"schedule", "digest", "model_card"},
}
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "onnx",
    "onnxscript",
    "accelerate",
    "psutil",
}
MAY_BE_HEAVY = {"export", "training", "baseline"}


def _modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if "bundles" not in path.parts)


def _part(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", _modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_its_part_may(path: Path) -> None:
    part = _part(path)
    if part.startswith("cli") or part == "__main__":
        return  # the command line may import everything
    assert part in ALLOWED, f"say in ALLOWED what the new part {part} may import"
    named = {name.split(".")[1] for name in _imports(path) if name.startswith("std_rt.")}
    parts = {name for name in named if (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()}
    assert parts <= ALLOWED[part] | {part, "errors"}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_runtime_imports_nothing_that_only_training_and_export_install(path: Path) -> None:
    if _part(path) in MAY_BE_HEAVY:
        return
    assert not {name.split(".")[0] for name in _imports(path)} & HEAVY


def _loaded_after(code: str) -> set[str]:
    """Top-level modules that a new interpreter has loaded after running ``code``."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_or_the_command_line_loads_nothing_heavy() -> None:
    loaded = _loaded_after("import std_rt, std_rt.cli")
    assert not loaded & (HEAVY | {"numpy", "cv2", "av", "PIL", "openvino", "onnxruntime", "platformdirs"})


def test_stylizing_loads_no_torch() -> None:
    modules = "stylizer, bench, doctor, demo, cli_stylize, cli_bundles, media.video, engines.openvino"
    loaded = _loaded_after("\n".join(f"import std_rt.{name.strip()}" for name in modules.split(",")))
    assert not loaded & HEAVY
    assert "openvino" in loaded


def test_every_public_name_is_there() -> None:
    for name in std_rt.__all__:
        assert getattr(std_rt, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = std_rt.no_such_name
