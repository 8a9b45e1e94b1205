"""Who may import whom, read from the source: the runtime stays free of torch, and parts stay apart."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import std_rt

ROOT = Path(std_rt.__file__).parent

# Package -> what it may import besides itself. Two modules are rows of their own, for training to use.
MEASURES = "evaluation.measures"
DENOISE = "pipeline.denoise"
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    MEASURES: set(),
    DENOISE: {"core"},
    "engines": {"core"},
    "media": {"core"},
    "pipeline": {DENOISE, "engines", "media", "core"},
    "streaming": {"pipeline", "engines", "media", "core", MEASURES},
    "live": {"streaming", "pipeline", "engines", "media", "core", MEASURES},
    "serve": {"live", "streaming", "pipeline", "engines", "media", "core", MEASURES},
    "bulk": {"streaming", "pipeline", "engines", "media", "core", MEASURES},
    "models": {"core"},
    "examples": set(),
    "export": {"models", "pipeline", "engines", "core", "examples"},
    "training": {"models", "core", DENOISE, MEASURES},
    "evaluation": {
        *("models", "training", "export", "live", "streaming", "pipeline", "engines", "media", "core"),
        *("examples", DENOISE, MEASURES),
    },
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
    "pyarrow",
    "ray",
}
MAY_BE_HEAVY = {"bulk", "export", "models", "training"}
HEAVY_MODULES = {
    *(
        f"evaluation.{name}"
        for name in ("diffusers_baseline", "inpaint", "students", "scorers", "candidates")
    ),
    *("engines.baked_inputs", "engines.onnxruntime.cuda_graph"),  # imported where an extra brings onnx
}


def _modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if "bundles" not in path.relative_to(ROOT).parts[:-1])


def _part(dotted: str) -> str:
    """The row of ALLOWED that a dotted name under std_rt belongs to."""
    return next(
        (row for row in (MEASURES, DENOISE) if f"{dotted}.".startswith(f"{row}.")), dotted.split(".")[0]
    )


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in the file, by statement or by string."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"std_rt(\.[a-z_]\w*)+", str(node.value)):
            yield str(node.value)


def test_packages_import_downwards_only() -> None:
    wrong = []
    for path in _modules():
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        part = _part(dotted)
        if part in ("cli", "__main__", "__init__"):
            continue  # the command line may import everything
        assert part in ALLOWED, f"say in ALLOWED what the new package {part} may import"
        named = {name.removeprefix("std_rt.") for name in _imports(path) if name.startswith("std_rt.")}
        parts = {_part(name) for name in named if (ROOT / name.split(".")[0]).is_dir()}
        wrong += [f"{dotted} imports {other}" for other in sorted(parts - ALLOWED[part] - {part})]
    assert not wrong


def test_an_import_by_string_is_seen(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text('HOME = {"Autoencoder": "std_rt.training.tiny"}')
    assert "std_rt.training.tiny" in set(_imports(tmp_path / "module.py"))


def test_the_runtime_imports_nothing_that_only_training_and_export_install() -> None:
    wrong = []
    for path in _modules():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in MAY_BE_HEAVY or ".".join(parts) in HEAVY_MODULES:
            continue
        heavy = {name.split(".")[0] for name in _imports(path)} & HEAVY
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in heavy]
    assert not wrong


def _loaded_after(code: str) -> set[str]:
    """Top-level modules that a new interpreter has loaded after running ``code``."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in list(sys.modules)}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_or_the_command_line_loads_nothing_heavy() -> None:
    loaded = _loaded_after("import std_rt, std_rt.cli.app")
    assert not loaded & (HEAVY | {"numpy", "cv2", "av", "PIL", "openvino", "onnxruntime", "platformdirs"})


def test_stylizing_loads_no_torch() -> None:
    modules = (
        "pipeline.stylizer, evaluation.bench, cli.doctor, cli.demo, cli.stylize, cli.bundles, "
        "media.video.transcode, engines.openvino.engine"
    )
    loaded = _loaded_after("\n".join(f"import std_rt.{name.strip()}" for name in modules.split(",")))
    assert not loaded & HEAVY
    assert "openvino" in loaded


def test_every_public_name_is_there() -> None:
    for name in std_rt.__all__:
        assert getattr(std_rt, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = std_rt.no_such_name
