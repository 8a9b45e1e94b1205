"""Export recipes: TOML files with the flags of the command, checked as flags are."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import typer

pytest.importorskip("torch")

from typer.testing import CliRunner

from std_rt.cli.app import app
from std_rt.core.bundle import load_bundle
from std_rt.core.errors import ExportError
from std_rt.export import export_options as options_module
from std_rt.export.build import export_pipeline
from std_rt.export.export_options import load_recipe
from std_rt.export.profiles import PROFILES

RECIPES = sorted((Path(__file__).parents[3] / "export").glob("*.toml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_read(path: Path) -> None:
    found = load_recipe(path)
    assert found == tomllib.loads(path.read_text(encoding="utf-8"))
    assert {"source", "eta", "steps", "output"} <= found.keys()


def test_there_is_one_for_sdxl_and_one_for_the_built_in_model() -> None:
    assert [path.stem for path in RECIPES] == ["sdxl_std_0.75", "std_tiny"]
    sdxl = load_recipe(RECIPES[0])
    repo, file = PROFILES[sdxl["profile"]].file.split(": ")
    assert sdxl["lora"] == [f"{repo}:{file}"]


def test_every_option_of_the_command_has_a_key() -> None:
    """But for those that are about one run: ``--yes`` and ``--overwrite``."""
    command = typer.main.get_command(app).commands["export"]  # type: ignore[attr-defined]
    names = {next((o for o in p.opts if o.startswith("--")), f"--{p.name}") for p in command.params}
    flags = {name.removeprefix("--").replace("-", "_") for name in names} - {"yes", "overwrite", "help"}
    assert set(options_module._Recipe.__struct_fields__) == flags


def test_only_what_the_file_states_is_returned(tmp_path: Path) -> None:
    text = 'source = "a/b"\nlora = ["x.safetensors:0.5", "y.safetensors"]\nsteps = [4, 2]\nsize = "768x512"'
    assert load_recipe(write(tmp_path, text)) == {
        "source": "a/b",
        "lora": ["x.safetensors:0.5", "y.safetensors"],
        "steps": [4, 2],
        "size": "768x512",
    }
    assert load_recipe(write(tmp_path, "eta = 1\nsize = 256")) == {"eta": 1, "size": 256}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidence = 2", r"has an unknown key guidence; did you mean guidance\?"),
        ("ip-adapter = 'plus'", r"has an unknown key ip-adapter; did you mean ip_adapter\?"),
        ("[nonsense]", "has an unknown key nonsense$"),
        ("eta = 'high'", "Expected `float`, got `str`, in `eta`"),
        ("steps = 4", "Expected `array`, got `int`, in `steps`"),
        ("lora = [1]", r"Expected `str`, got `int`, in `lora\[0\]`"),
        ("precision = 'fp4'", "--precision must be one of auto, fp32, fp16, bf16, int8, fp8, got 'fp4'"),
        ("guidance = 80", r"--guidance must be in 1\.\.50"),
        ("schedule = 'ddpm'", "--schedule must be one of auto, std"),
        ("eta = ", "cannot be read"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ExportError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"recipe {path}")
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"recipe .*none\.toml cannot be read: .*No such file"):
        load_recipe(tmp_path / "none.toml")


def test_the_built_in_recipe_has_the_built_in_schedule() -> None:
    """A bundle's steps and size are its recipe's."""
    recipe, bundle = load_recipe(RECIPES[1]), load_bundle(None)
    assert bundle.name == recipe["name"]
    assert bundle.manifest["schedule"]["default_steps"] == recipe["steps"][0]
    assert sorted(map(int, bundle.manifest["schedule"]["steps"])) == sorted(recipe["steps"])
    assert bundle.manifest["schedule"]["eta"] == recipe["eta"]
    assert bundle.manifest["size"]["default"] == [recipe["size"]] * 2


@pytest.mark.long
def test_the_built_in_bundle_is_made_again(tmp_path: Path) -> None:
    """From what `std-rt bundles unpack` gives back: float graphs and weights, byte for byte."""
    built_in = load_bundle(None)
    asked = ["bundles", "unpack", built_in.name, "-o", str(tmp_path / "pipeline")]
    assert CliRunner().invoke(app, asked).exit_code == 0
    recipe = load_recipe(RECIPES[1]) | {"source": tmp_path / "pipeline", "output": tmp_path / "out"}
    made = export_pipeline(**recipe | {"size": (recipe["size"],) * 2, "steps": tuple(recipe["steps"])})
    digests = [
        {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()}
        for bundle in (made, built_in)
    ]
    for files in digests:
        for name in {"reference.npz"} | {name for name in files if ".int8." in name}:
            files.pop(name)
    assert digests[0] == digests[1]
    assert made.manifest["schedule"] == built_in.manifest["schedule"]
