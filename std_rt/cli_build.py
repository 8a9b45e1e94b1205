"""`std-rt export` and `std-rt train`: they need torch, which the runtime does not install."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from std_rt.cli_options import split_number
from std_rt.machine import require

__all__ = ["parse_lora", "run_export", "run_train"]


def parse_lora(text: str) -> tuple[Path, float]:
    """``style.safetensors:0.8`` -> (path, scale); without a number the scale is 1."""
    head, scale = split_number(text)
    return Path(head), 1.0 if scale is None else scale


def run_export(source: Path, output: Path, *, lora: tuple[str, ...], **options: Any) -> None:
    """Export ``source`` to the bundle ``output`` and say what came out."""
    require(
        "std-rt export", "export", "torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors"
    )
    from std_rt.export import export_pipeline

    console = Console(stderr=True)
    with console.status("exporting") as status:
        loras = [parse_lora(text) for text in lora]
        bundle = export_pipeline(
            source, output, lora=loras, progress=lambda note: status.update(note), **options
        )
    typer.echo(f"{bundle.path} ({bundle.name}, {bundle.total_bytes / 2**20:.1f} MB)")
    for graph, parity in bundle.manifest["parity"].items():
        typer.echo(f"  {graph}: {parity['psnr_db']:.1f} dB against {parity['against']} ({parity['runtime']})")


def run_train(recipe: Path, overrides: tuple[str, ...], *, dry_run: bool) -> None:
    """Run a recipe, or print it resolved. Raises RecipeError on a wrong one, before torch is loaded."""
    from std_rt.training.recipe import as_dict, load_recipe

    resolved = load_recipe(recipe, overrides)
    if dry_run:
        typer.echo(json.dumps(as_dict(resolved), indent=2))
        return
    require("std-rt train", "train", "torch", "diffusers", "safetensors")
    from std_rt.training.run import run_recipe

    typer.echo(run_recipe(resolved))
