"""`std-rt train` of a distillation: from a recipe to a picture, and what a wrong recipe is told."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cli_support import Cli, picture
from support.distil_runs import write_triplets
from support.pipelines import write_own_pipeline

from std_rt.training.distil.base import load_base
from std_rt.training.run.recipe import load_recipe

RECIPES = Path(__file__).parents[3] / "training"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature std-tiny, with a triplet in it."""
    folder = write_own_pipeline(tmp_path_factory.mktemp("base") / "base", levels=1, sees_content=True)
    write_triplets(folder / "triplets", 1)
    return folder


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    text = (
        f"stage = 'distil'\noutput = '{(tmp_path / 'run').as_posix()}'\nbase = '{base.as_posix()}'\n"
        "steps = 2\nbatch = 1\naccumulate = 1\nprecision = 'fp32'\neta = 0.2\n"
        "run_steps = [2, 4]\nwarmup = 0\n"
        "[lora]\nrank = 2\nalpha = 2\n[bank]\ncapacity = 2\n"
        f"[triplets]\nfolder = '{(base / 'triplets').as_posix()}'\nside = 8\n"
    )
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_from_recipe_to_picture(cli: Cli, recipe: Path, base: Path, tmp_path: Path) -> None:
    """The whole road: train a LoRA, export it with the schedule it carries, stylize with it."""
    done = cli("train", recipe, "--output", tmp_path / "mine", "--max-steps", "1", "--seed", "4")
    lora = tmp_path / "mine" / "lora.safetensors"
    assert (done.code, done.out.strip().splitlines()[-1]) == (0, str(lora))
    kept = json.loads((tmp_path / "mine" / "recipe.json").read_text(encoding="utf-8"))
    assert (kept["steps"], kept["seed"]) == (1, 4)
    assert not (tmp_path / "run").exists()
    bundle = tmp_path / "bundle"
    assert cli("export", base, "--lora", lora, "-o", bundle, "--size", "64").code == 0
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["schedule"]["tau"], set(manifest["schedule"]["steps"])) == (199, {"2", "4"})
    photo, art = picture(tmp_path / "photo.png", 64, 64), picture(tmp_path / "art.png", 64, 64, seed=1)
    styled = tmp_path / "styled.png"
    assert cli("stylize", photo, "--style", art, "--bundle", bundle, "-o", styled).code == 0
    assert styled.is_file()
    assert cli("bundles", "unpack", bundle, "-o", tmp_path / "again").code == 0
    before, after = load_base(base), load_base(tmp_path / "again")
    assert after.digest == before.digest
    assert np.allclose(after.schedule.alphas_cumprod, before.schedule.alphas_cumprod)
    assert after.schedule.prediction_type == "v_prediction"
    weights = before.unet.state_dict()
    assert all(torch.allclose(v, weights[n], atol=2e-2) for n, v in after.unet.state_dict().items())
    assert "exists" in cli("bundles", "unpack", bundle, "-o", tmp_path / "again").error


def test_a_dry_run_trains_nothing_and_counts(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    done = cli("train", recipe, "--dry-run", "--set", "lora.rank=3")
    assert done.code == 0
    assert '"rank": 3' in done.out
    assert "parameters in a LoRA of rank 3" in done.out
    assert "memory" in done.out
    assert not (tmp_path / "run").exists()
    assert "train that stage first" in cli("train", recipe, "--dry-run", "--set", "base=a/b/c").error
    sheet = ("--set", f"sheet.contents={tmp_path}", "--set")
    assert "does not exist" not in cli("train", recipe, "--dry-run", *sheet, f"sheet.styles={tmp_path}").out
    lost = cli("train", recipe, "--dry-run", *sheet, "sheet.styles=lost/art")
    assert lost.out.splitlines()[-1] == "sheet.styles = 'lost/art' does not exist yet"


def test_a_base_beside_others_is_not_sought_on_the_hub(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "does not exist; train that stage first" in cli("train", recipe, "--set", "base=runs/bas").error


def test_ctrl_c_says_what_is_kept(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    from std_rt.training.run.training_run import Run

    save, steps, kept = Run._write, [], tmp_path / "run"

    def stopped(run: Run, step: int) -> None:
        steps.append(step)
        if len(steps) == 1:
            raise KeyboardInterrupt
        save(run, step)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_write", stopped)
        flags = ("--set", "snapshot_every=1")
        first, second = cli("train", recipe, *flags), cli("train", recipe, *flags)
    assert (first.code, second.code) == (130, 130)
    assert "stopped; there is no checkpoint yet, so the same command starts over" in first.err
    assert f"stopped; {kept} has all up to step 1; the same command goes on from there" in second.err
    done = cli("train", recipe, *flags)
    assert done.code == 0
    assert f"{kept} is at step 1 of 2" in done.err


@pytest.mark.parametrize("eta", ["0.65", "0.75", "0.85", "0.95"])
@pytest.mark.parametrize("method", ["std", "tcd", "lcm", "pcm"])
def test_the_recipes_hold_for_every_eta_and_method(eta: str, method: str) -> None:
    assert load_recipe(RECIPES / "std_tiny.toml", (f"eta={eta}", f"method={method}")).method == method
    published = {"0.65": 679, "0.75": 779, "0.85": 879, "0.95": 979}[eta]
    both = (f"eta={eta}", f"tau={published}", f"method={method}")
    assert load_recipe(RECIPES / "std_sdxl_i2i.toml", both).tau == published


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "metod=tcd"], "did you mean method?"),
        (["--set", "method=lcmm"], "did you mean lcm?"),
        (["--set", "bank.capasity=3"], "did you mean bank.capacity?"),
        (["--set", "bank.capacity=1"], "at least twice the batch"),
        (["--set", "guidance=[3.0, 1.0]"], "range [low, high]"),
        (["--set", "tau=700"], "not on the grid"),
        (["--set", "run_steps=[40]"], "do not fit together"),
        (["--set", "precision=int8"], "one of auto, bf16, fp16, fp32"),
        (["--set", "pictures.folder=x"], "only one of them"),
        (["--set", "lora.rank=0"], "lora.rank = 0: expected int >= 1"),
        (["--set", "lora.targets=[1]"], "lora.targets[0] = 1: expected text, got int"),
        (["--set", "bank=3"], "bank = 3: expected a table ([bank])"),
        (["--set", "learning_rate=inf"], "learning_rate = inf: expected float <="),
        (["--set", "optimizer=adamw8bit"], "pip install bitsandbytes"),
        (["--set", "base=nowhere"], "does not exist; train that stage first"),
        (["--set", "triplets.folder=nowhere"], "no triplets in nowhere"),
        (["--set", "adversarial.weight=1", "--set", "adversarial.dino=nowhere"], "adversarial.dino=FOLDER"),
        (["--set", 'lora.targets=["to_x"]'], "fits no linear or conv layer"),
        (["--max-steps", "0"], "steps = 0: expected int >= 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    cli: Cli, recipe: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries over the network
    assert said in cli("train", recipe, *arguments).error


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_runs_with_what_the_extra_brings(path: Path) -> None:
    """bitsandbytes is not in it."""
    assert tomllib.loads(path.read_text(encoding="utf-8")).get("optimizer", "adamw") == "adamw"
