"""`std-rt export`: a diffusers pipeline, with LoRAs and an IP-Adapter, becomes a bundle. Needs torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer import Argument, Option

from std_rt.cli.options import OverwriteOption, parse_frame_size
from std_rt.cli.terminal import note, working
from std_rt.core.errors import UsageError
from std_rt.core.machine import require

if TYPE_CHECKING:
    from std_rt.core.bundle import Bundle

__all__ = ["ExportRequest", "export"]

_MODULES = (
    *("torch", "diffusers", "transformers", "safetensors", "huggingface_hub"),
    *("onnx", "onnxscript", "msgspec"),
)
# Flags that export_pipeline takes as they are.
_OPTIONS = (
    *("tau", "schedule", "guidance", "guidance_mode", "precision", "weights"),
    *("prompt", "prompts", "style_layers", "name", "overwrite", "frames", "overlap"),
)


def _read_recipe(context: typer.Context, source: str | None) -> str | None:
    """``source`` itself, or that of a recipe, whose other values become the defaults of the flags."""
    if source is None or not source.endswith(".toml"):
        return source
    require("std-rt export", "export", *_MODULES)
    from std_rt.export.export_options import load_recipe

    context.default_map = load_recipe(Path(source))
    base: str | None = context.default_map.pop("source", None)
    return base


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What ``std-rt export`` was asked to do."""

    source: Annotated[
        str | None,
        Argument(
            metavar="BASE|RECIPE.toml",
            help="Hub id, diffusers folder, .safetensors checkpoint, or a recipe; default: SDXL with STD.",
            callback=_read_recipe,
            is_eager=True,
        ),
    ] = None
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FOLDER", help="The bundle; default: engines/NAME.")
    ] = None
    lora: Annotated[
        list[str] | None, Option(metavar="FILE|HUB[:SCALE]", help="LoRA to fuse in; repeatable.")
    ] = None
    ip_adapter: Annotated[
        str | None, Option(metavar="FILE|HUB", help="IP-Adapter file or hub id, or plus, base, base-bigg.")
    ] = None
    image_encoder: Annotated[
        str | None, Option(metavar="FOLDER|HUB", help="CLIP image encoder for the IP-Adapter.")
    ] = None
    vae: Annotated[str | None, Option(help="VAE: folder, hub id, fp16-fix or tiny.")] = None
    tiny_vae: Annotated[
        str | None, Option(help="A second, faster VAE, which `std-rt live` uses: folder, hub id or tiny.")
    ] = None
    motion_adapter: Annotated[
        str | None,
        Option(metavar="FOLDER|HUB", help="Video-to-video: a diffusers MotionAdapter for the UNet."),
    ] = None
    frames: Annotated[
        int | None, Option(help="Frames that a video UNet sees at once; default: 8, as trained.")
    ] = None
    overlap: Annotated[
        int | None, Option(help="Frames that two of its windows share, fewer than --frames; default: 2.")
    ] = None
    config: Annotated[str | None, Option(help="Pipeline whose configs a single-file checkpoint uses.")] = None
    profile: Annotated[str, Option(help="A published LoRA: std-0.75, tcd, lightning-4step, ...")] = ""
    eta: Annotated[
        float | None,
        Option(help="Where sampling starts (diffusers' strength). Default: the LoRA's, or 0.75."),
    ] = None
    tau: Annotated[int | None, Option(help="Start timestep; default: derived from --eta.")] = None
    steps: Annotated[list[int] | None, Option(help="Step count; repeatable, the first is the default.")] = (
        None
    )
    schedule: Annotated[
        str, Option(help="auto, diffusers (its img2img schedule), or a sampler: std, tcd, lcm, ...")
    ] = "auto"
    guidance: Annotated[
        float | None, Option(help="Guidance scale; 1 disables guidance. Default: the profile's, or 1.")
    ] = None
    guidance_mode: Annotated[
        str, Option(help="auto, none, full (twice the work) or residual (one more UNet call per frame).")
    ] = "auto"
    size: Annotated[
        str | None, Option(metavar="PX|WxH", help="Working size; default: 512, or 256 for a small model.")
    ] = None
    precision: Annotated[
        str,
        Option(help="auto, fp32, fp16, bf16, int8 (beside fp32) or fp8 (beside fp16): see docs/export.md."),
    ] = "auto"
    weights: Annotated[str, Option(help="Storage of weights in fp32 graphs: fp16 or fp32.")] = "fp16"
    calibrate: Annotated[
        Path | None, Option(metavar="FOLDER", help="Pictures to calibrate int8 or fp8 on.")
    ] = None
    prompt: Annotated[str, Option(help="The fixed prompt, if the pipeline has text encoders.")] = ""
    negative_prompt: Annotated[
        str | None, Option(help="What to avoid, with guidance; default: the model's own.")
    ] = None
    prompts: Annotated[str, Option(help="baked (one fixed prompt) or encoder (any prompt at run time).")] = (
        "baked"
    )
    style_layers: Annotated[str, Option(help="auto, all, published, or prefixes of layers.")] = "auto"
    name: Annotated[str, Option(help="The bundle's name; default: the folder's.")] = ""
    yes: Annotated[bool, Option("--yes", "-y", help="Download without asking.")] = False
    overwrite: OverwriteOption = False


def export(request: ExportRequest) -> None:
    """Turn a diffusers pipeline (and a LoRA) into a bundle. Needs the extra \\[export]: see std-rt doctor.

    std-rt export --eta 0.75 --steps 4

    std-rt export export/sdxl_std_0.75.toml --precision int8

    std-rt export my-sdxl.safetensors --lora tcd.safetensors --profile tcd --ip-adapter plus
    """
    parse_frame_size(request.size)
    require("std-rt export", "export", *_MODULES)
    from std_rt.core.bundle import QUANTIZED, check_target
    from std_rt.export.export_options import check_choices
    from std_rt.export.sources.resolve import resolve_sources

    console = Console(stderr=True)
    output = request.output or Path("engines") / _bundle_name(request)
    options: dict[str, Any] = {name: getattr(request, name) for name in _OPTIONS}
    # Before gigabytes are downloaded.
    check_target(output, request.overwrite)
    check_choices(options)
    if request.precision == "int8":
        require("--precision int8", "int8", "nncf")
    if request.precision == "fp8":
        require("--precision fp8", "onnx", "onnxruntime")
    if request.calibrate is not None and request.precision not in QUANTIZED:
        raise UsageError("--calibrate needs --precision int8 or fp8; give both or neither")
    pictures = read_calibration(request.calibrate)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def confirm(summary: str) -> bool:
        return request.yes or not console.is_terminal or typer.confirm("download it?", default=True)

    sources = resolve_sources(
        request.source,
        loras=tuple(request.lora or ()),
        ip_adapter=request.ip_adapter,
        image_encoder=request.image_encoder,
        vae=request.vae,
        tiny_vae=request.tiny_vae,
        motion_adapter=request.motion_adapter,
        eta=request.eta,
        profile=request.profile,
        config=request.config,
        say=say,
        confirm=confirm,
    )
    options |= {
        **vars(sources),
        "steps": tuple(request.steps or ()),
        "size": parse_frame_size(request.size),
        "negative": request.negative_prompt,
        "remark": lambda line: note(console, f"note: {line}"),
    }
    folder = options.pop("folder")
    with working(console, "exporting") as progress:
        bundle = _export(folder, output, options, pictures, progress)
    typer.echo(f"{bundle.path} ({bundle.name}, {bundle.total_bytes / 2**20:.1f} MB)")
    for graph, parity in bundle.manifest["parity"].items():
        typer.echo(f"  {graph}: {parity['psnr_db']:.1f} dB against {parity['against']} ({parity['runtime']})")
    print_quantized(bundle)


def _bundle_name(request: ExportRequest) -> str:
    """``sdxl-std-0.75`` for the published recipe, else the last part of the source's name and the profile."""
    source, profile = request.source, request.profile
    if source is None:
        return f"sdxl-{profile or f'std-{0.75 if request.eta is None else request.eta:g}'}"
    # A folder by its own name, a hub id (or its page) without its revision, a file without its suffix.
    path = Path(source)
    if source.startswith("https:"):
        from std_rt.export.sources.hub import parse_ref

        ref = parse_ref(source)
        source = source if ref is None else ref.path or ref.repo
    name = path.resolve().name if path.is_dir() else re.split(r"[/:\\]", source.partition("@")[0])[-1]
    name = name.removesuffix(".safetensors") or "bundle"
    return f"{name}-{profile}" if profile else name


def read_calibration(folder: Path | None) -> list[Any]:
    """The user's pictures to calibrate on; none if example pictures are used."""
    if folder is None:
        return []
    from std_rt.media.image import read_picture
    from std_rt.media.sources import expand_inputs, is_video

    pictures = [read_picture(path).frame for path in expand_inputs([folder]) if not is_video(path)]
    if not pictures:
        raise UsageError(
            f"--calibrate {folder} holds no pictures; give a folder of pictures like those you will stylize"
        )
    return pictures


def print_quantized(bundle: Bundle) -> None:
    """What is there in 8 bits, and how near its pictures come."""
    for form in bundle.forms[1:]:
        for graph, row in bundle.quantized(form).items():
            near = f"{row['psnr_db']:.1f} dB (worst {row['worst_db']:.1f} dB) against {bundle.forms[0]}"
            typer.echo(f"  {graph}, {form}: pictures {near}, with those above in {form} too")


def _export(
    folder: Path, output: Path, options: dict[str, Any], pictures: list[Any], progress: Callable[[str], None]
) -> Bundle:
    """Write the bundle, then add the form in 8 bits; one that does not pass is left out with a line."""
    from std_rt.core.bundle import QUANTIZED
    from std_rt.core.errors import ExportError
    from std_rt.export.build import export_pipeline

    bundle = export_pipeline(folder, output, progress=progress, **options)
    form = options["precision"]
    if form not in QUANTIZED:
        return bundle
    from std_rt.export.quantize import quantize_bundle

    try:
        return quantize_bundle(
            bundle, output, pictures, progress, overwrite=True, name=bundle.name, form=form
        )
    except ExportError as error:
        options["remark"](f"the bundle has no {form} form: {error}")
        return bundle
