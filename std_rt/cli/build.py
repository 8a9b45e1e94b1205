"""`std-rt export` and `std-rt train`: they need torch, which the runtime does not install."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from std_rt.core.errors import UsageError
from std_rt.core.machine import require

if TYPE_CHECKING:
    from std_rt.core.bundle import Bundle

__all__ = ["run_export", "run_train", "unpack"]


def run_export(
    source: str | Path | None,
    output: Path | None,
    *,
    lora: tuple[str, ...] = (),
    ip_adapter: str | Path | None = None,
    image_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    config: str | None = None,
    eta: float | None = None,
    profile: str = "",
    size: int | tuple[int, int] | None = None,
    calibrate: Path | None = None,
    yes: bool = True,
    **options: Any,
) -> None:
    """Export ``source`` (see `resolve_sources`) to the bundle ``output`` and say what came out."""
    require(
        "std-rt export",
        "export",
        *("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors", "huggingface_hub"),
    )
    from std_rt.core.bundle import check_target
    from std_rt.export.options import check_choices
    from std_rt.export.sources.resolve import resolve_sources

    console = Console(stderr=True)
    overwrite = bool(options.get("overwrite"))
    output = output or Path("engines") / _bundle_name(source, profile, eta)
    # Before gigabytes are fetched.
    check_target(output, overwrite)
    check_choices(options)
    pictures = _calibration(options, calibrate)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    sources = resolve_sources(
        _name(source),
        loras=lora,
        ip_adapter=_name(ip_adapter),
        image_encoder=_name(image_encoder),
        vae=_name(vae),
        eta=eta,
        profile=profile,
        config=config,
        say=say,
        confirm=lambda summary: yes or not console.is_terminal or typer.confirm("fetch it?", default=True),
    )
    plan: dict[str, Any] = {
        **options,
        "lora": sources.lora,
        "ip_adapter": sources.ip_adapter,
        "image_encoder": sources.image_encoder,
        "vae": sources.vae,
        "eta": sources.eta,
        "profile": sources.profile,
        "origins": sources.origins,
        "size": (size, size) if isinstance(size, int) else size,
        "remark": lambda line: say(f"note: {line}"),
    }
    with console.status("exporting") as status:
        bundle = _export(sources.folder, output, plan, pictures, lambda note: status.update(note))
    typer.echo(f"{bundle.path} ({bundle.name}, {bundle.total_bytes / 2**20:.1f} MB)")
    for graph, parity in bundle.manifest["parity"].items():
        typer.echo(f"  {graph}: {parity['psnr_db']:.1f} dB against {parity['against']} ({parity['runtime']})")


def _calibration(options: dict[str, Any], folder: Path | None) -> list[Any]:
    """The user's pictures that int8 is calibrated on; none where rendered ones are taken."""
    if options.get("precision") == "int8":
        require("--precision int8", "int8", "nncf")
    elif folder is not None:
        raise UsageError("--calibrate goes with --precision int8; give both or neither")
    if folder is None:
        return []
    from std_rt.media.image import read_picture
    from std_rt.media.sources import expand_inputs, is_video

    pictures = [read_picture(path).frame for path in expand_inputs([folder]) if not is_video(path)]
    if not pictures:
        raise UsageError(
            f"--calibrate {folder} holds no picture; give a folder of pictures like those to come"
        )
    return pictures


def _export(
    folder: Path, output: Path, plan: dict[str, Any], pictures: list[Any], progress: Callable[[str], None]
) -> Bundle:
    """The bundle itself; int8 is made from a whole fp32 bundle, which is dropped afterwards."""
    from std_rt.export import export_pipeline

    if plan.get("precision") != "int8":
        return export_pipeline(folder, output, progress=progress, **plan)
    from std_rt.export.quantize import quantize_bundle

    overwrite, name = plan.pop("overwrite", False), plan.pop("name", "") or output.resolve().name
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        exact = export_pipeline(folder, Path(scratch) / "exact", progress=progress, name=name, **plan)
        return quantize_bundle(exact, output, pictures, progress=progress, overwrite=overwrite, name=name)


def _bundle_name(source: str | Path | None, profile: str, eta: float | None) -> str:
    """``sdxl-std-0.75`` for the published recipe, else the last part of the source's name and the profile."""
    if source is None:
        return f"sdxl-{profile or f'std-{0.75 if eta is None else eta:g}'}"
    text = str(source)
    path = Path(text)
    # A folder by its own name, a hub id without its revision, a file without its suffix.
    base = path.resolve().name if path.is_dir() else re.split(r"[/:\\]", text.partition("@")[0])[-1]
    base = base.removesuffix(".safetensors") or "bundle"
    return f"{base}-{profile}" if profile else base


def _name(given: str | Path | None) -> str | None:
    """A path or a hub id as text; the slash of a hub id is a slash on every system."""
    return given.as_posix() if isinstance(given, Path) else given


def run_train(recipe: Path, overrides: tuple[str, ...], given: dict[str, Any], *, dry_run: bool) -> None:
    """Run a recipe, or print it resolved. Raises RecipeError on a wrong one, before torch is loaded.

    ``given`` are top-level values with flags of their own; None leaves the recipe's.
    """
    require("std-rt train", "train", "msgspec")
    from std_rt.training.run.recipe import as_dict, load_recipe

    resolved = load_recipe(recipe, overrides, {k: v for k, v in given.items() if v is not None})
    if dry_run:
        typer.echo(json.dumps(as_dict(resolved), indent=2))
        _describe(resolved)
        return
    require("std-rt train", "train", "torch", "diffusers", "safetensors", "accelerate", "peft")
    from std_rt.training.stages import run_recipe

    typer.echo(run_recipe(resolved))


def _describe(resolved: Any) -> None:
    """What a distillation would cost, where its base is at hand."""
    if resolved.stage != "distil":
        return
    require("std-rt train --dry-run", "train", "torch", "diffusers", "safetensors", "accelerate", "peft")
    from std_rt.training.run.estimate import describe_run

    for line in describe_run(resolved):
        typer.echo(line)


def unpack(source: str | None, output: Path) -> None:
    """Write a bundle's weights as a diffusers folder. Raises BundleError or UsageError."""
    require("std-rt bundles unpack", "export", "torch", "diffusers", "safetensors")
    from std_rt.core.bundle import load_bundle
    from std_rt.core.schedule import NoiseSchedule
    from std_rt.export import load_torch_components
    from std_rt.models.style_encoder import StyleEncoder
    from std_rt.training.tiny.pipeline import TinyPipeline, save_tiny

    if output.exists():
        raise UsageError(f"{output} exists; choose another -o")
    bundle = load_bundle(source)
    parts = load_torch_components(bundle)
    if not isinstance(parts["style_encoder"], StyleEncoder):
        raise UsageError(f"{bundle.name} was exported from a diffusers folder of its own; train on that")
    if "betas" not in bundle.manifest["schedule"]:
        raise UsageError(f"{bundle.name} does not say its noise schedule; export it again with this std-rt")
    noise = {"trained_betas": bundle.manifest["schedule"]["betas"], "prediction_type": bundle.prediction_type}
    schedule = NoiseSchedule.from_config(noise)
    save_tiny(TinyPipeline(parts["unet"], parts["style_encoder"], parts["vae"], schedule), output)  # type: ignore[arg-type]
    typer.echo(output)
