"""`std-rt train`: run a training recipe, or show what it would cost. Needs torch."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from std_rt.core.machine import require

__all__ = ["train"]

# Stage of a recipe -> its function. Each is imported when it runs: the stages of std-tiny need no Accelerate
# and no DINOv2.
_STAGES = {
    "autoencoder": ("std_rt.training.tiny.autoencoder_stage", "train_autoencoder"),
    "stylist": ("std_rt.training.tiny.stylist", "train_stylist"),
    "motion": ("std_rt.training.tiny.motion_stage", "train_motion"),
    "distil": ("std_rt.training.distil.loop", "train_distil"),
}


def train(
    recipe: Annotated[Path, Argument(metavar="RECIPE.toml")],
    output: Annotated[
        str | None, Option("--output", "-o", metavar="FOLDER", help="The run's folder.")
    ] = None,
    max_steps: Annotated[int | None, Option(metavar="N", help="Optimizer steps.")] = None,
    seed: Annotated[int | None, Option(metavar="N", help="Random seed.")] = None,
    overrides: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override a recipe value; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the recipe, parameters, memory and time; train nothing.")
    ] = False,
) -> None:
    """Run a training recipe; an interrupted run continues where it stopped.

    Needs the extra \\[train]: see std-rt doctor.

    std-rt train training/std_tiny.toml --set method=tcd --output runs/tcd --seed 1
    """
    require("std-rt train", "train", "msgspec", "torch", "diffusers", "safetensors", "accelerate", "peft")
    from std_rt.training.run.recipe import as_dict, load_recipe

    flags = {"output": output, "steps": max_steps, "seed": seed}
    given = {name: value for name, value in flags.items() if value is not None}
    resolved = load_recipe(recipe, tuple(overrides or ()), given)  # a wrong one, before torch is loaded
    if dry_run:
        typer.echo(json.dumps(as_dict(resolved), indent=2))
        if resolved.stage != "distil":
            return  # only the cost of a distillation can be estimated
        from std_rt.training.run.cost import describe_run

        for line in describe_run(resolved):
            typer.echo(line)
        return
    module, function = _STAGES[resolved.stage]
    stage = getattr(import_module(module), function)
    try:
        typer.echo(stage(resolved))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # the terminal may be gone
                typer.echo(f"stopped; {_what_is_kept(Path(resolved.output))}", err=True)
        raise


def _what_is_kept(folder: Path) -> str:
    from std_rt.training.run.training_run import newest_checkpoint

    newest = newest_checkpoint(folder)
    if newest is None:
        return "there is no checkpoint yet, so the same command starts over"
    return f"{folder} has all up to step {int(newest.name)}; the same command goes on from there"
