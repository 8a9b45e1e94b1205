"""`std-rt export`: flags and recipes reach the exporter, and a flag overrides the recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli_support import Cli

from std_rt.core.bundle import Bundle

Recipe = Callable[..., Path]


@pytest.fixture
def asked(handmade: Bundle, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the sources are resolved from, and what is exported: nothing is read or written."""
    pytest.importorskip("torch")
    from std_rt.export import build
    from std_rt.export.sources import resolve

    asked: dict[str, Any] = {}

    def found(base: str, *, loras: tuple[str, ...], eta: float, **_: object) -> resolve.Sources:
        asked.update(loras=loras)
        return resolve.Sources(Path(base), ((Path("a.safetensors"), 0.7),), eta=eta)

    def pretend(source: Path, output: Path, **options: object) -> Bundle:
        asked.update(options, source=source, output=output)
        return handmade

    monkeypatch.setattr("std_rt.cli.export.require", lambda *_: None)
    monkeypatch.setattr(resolve, "resolve_sources", found)
    monkeypatch.setattr(build, "export_pipeline", pretend)
    return asked


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """``recipe(eta=0.5, ...)`` is the path of a recipe with these values."""

    def write(**values: object) -> Path:
        monkeypatch.setattr("std_rt.export.export_options.load_recipe", lambda _: dict(values), raising=False)
        return tmp_path / "recipe.toml"

    return write


def test_what_the_flags_say_reaches_the_exporter(cli: Cli, tmp_path: Path, asked: dict[str, Any]) -> None:
    flags = ("--eta", 0.5, "--steps", 4, "--steps", 2, "--size", "96x64", "--lora", "a.safetensors:0.7")
    assert cli("export", tmp_path, "-o", tmp_path / "out", *flags, "--overwrite").code == 0
    assert (asked["source"], asked["output"]) == (tmp_path, tmp_path / "out")
    assert (asked["eta"], asked["steps"], asked["size"]) == (0.5, (4, 2), (64, 96))
    assert asked["loras"] == ("a.safetensors:0.7",)
    assert asked["lora"] == ((Path("a.safetensors"), 0.7),)
    assert asked["overwrite"] is True


def test_a_recipe_is_the_same_flags_in_a_file(
    cli: Cli, tmp_path: Path, asked: dict[str, Any], recipe: Recipe
) -> None:
    values = {"eta": 0.5, "steps": [4, 2], "size": "96x64", "lora": ["a.safetensors:0.7"], "overwrite": True}
    path = recipe(source=str(tmp_path), output=str(tmp_path / "out"), negative_prompt="blur", **values)
    assert cli("export", path).code == 0
    from_recipe = dict(asked)
    asked.clear()
    flags = ("--eta", 0.5, "--steps", 4, "--steps", 2, "--size", "96x64", "--lora", "a.safetensors:0.7")
    more = ("-o", tmp_path / "out", "--negative-prompt", "blur", "--overwrite")
    assert cli("export", tmp_path, *flags, *more).code == 0
    functions = ("remark", "progress")
    assert {k: v for k, v in from_recipe.items() if k not in functions} == {
        k: v for k, v in asked.items() if k not in functions
    }


def test_a_flag_overrides_the_recipe(cli: Cli, tmp_path: Path, asked: dict[str, Any], recipe: Recipe) -> None:
    path = recipe(source=str(tmp_path), eta=0.5, steps=[4, 2], size=64, prompts="encoder")
    assert cli("export", path, "-o", tmp_path / "out", "--steps", 8, "--size", 32).code == 0
    assert (asked["eta"], asked["steps"], asked["size"]) == (0.5, (8,), (32, 32))
    assert asked["prompts"] == "encoder"


def test_a_recipe_value_of_the_wrong_type_is_refused_like_a_flag(cli: Cli, recipe: Recipe) -> None:
    result = cli("export", recipe(eta="early"))
    assert result.code == 2
    assert "--eta" in result.err


def test_a_source_that_does_not_exist(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lora.safetensors").touch()
    error = cli("export", tmp_path / "run", "-o", tmp_path / "out").error
    assert "run has no model_index.json, so it is not a diffusers pipeline folder; export the base" in error
    error = cli("export", tmp_path / "nowhere", "-o", tmp_path / "out").error
    assert "nowhere" in error
    assert not (tmp_path / "out").exists()
