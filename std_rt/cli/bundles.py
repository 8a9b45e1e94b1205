"""`std-rt bundles list | info | verify | compare | unpack | int8 | fp8`: the models std-rt can find."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from typer import Option

from std_rt.cli.options import BundleArgument, DeviceOption, OverwriteOption, PrecisionOption, use_device
from std_rt.cli.terminal import print_table
from std_rt.core.errors import UsageError, counted
from std_rt.core.machine import require

if TYPE_CHECKING:
    from std_rt.core.bundle import Bundle
    from std_rt.export.layer_comparison import Side

__all__ = ["bundles_app"]

bundles_app = typer.Typer(
    help="List, describe, verify, compare, unpack and quantize bundles (exported models).",
    no_args_is_help=True,
)

QuantizedOption = Annotated[
    Path, Option("--output", "-o", metavar="FOLDER", help="The bundle to write, with both forms.")
]
CalibrateOption = Annotated[
    Path | None, Option(metavar="FOLDER", help="Pictures to calibrate on; default: example pictures.")
]
PairsOption = Annotated[
    int | None,
    Option(
        min=1,
        help="Pairs of picture and style to calibrate on; default: 18 (int8), 6 (fp8), or all pictures.",
    ),
]


@bundles_app.command("list")
def list_all() -> None:
    """List all bundles found, with the reason for any that cannot be opened."""
    from std_rt.core.bundle import list_bundles, search_paths

    found = list_bundles()
    if not found:
        places = ", ".join(str(path) for path in search_paths())
        typer.echo(f"no bundles; looked inside std-rt and in {places}")
        return
    print_table(map(_row, found), ("name", "size", "steps", "style", "MB", "where"))


def _row(item: Bundle | tuple[str, Exception]) -> tuple[str, ...]:
    if isinstance(item, tuple):
        return item[0], "", "", "", "", f"[red]{escape(str(item[1]))}[/]"
    height, width = item.size_default
    return (
        item.name,
        f"{width}x{height}",
        ", ".join(map(str, item.steps_allowed)),
        f"{item.style['tokens']} tokens",
        f"{item.total_bytes / 2**20:.1f}",
        escape(str(item.path)),
    )


@bundles_app.command("info")
def info(bundle: BundleArgument = None) -> None:
    """Describe a bundle: sizes, schedule, graphs, sources, parity."""
    from std_rt.core.bundle import load_bundle

    print_table((key, escape(value)) for key, value in _facts(load_bundle(bundle, verify=False)))


def _facts(bundle: Bundle) -> Iterator[tuple[str, str]]:
    manifest = bundle.manifest
    height, width = bundle.size_default
    low, high = bundle.size_range
    yield "name", bundle.name
    yield "folder", str(bundle.path)
    yield "digest", bundle.digest
    sides = f"{low} to {high} px per side, multiples of {bundle.size_multiple}"
    yield "size", f"{width}x{height} px by default, {sides}"
    yield "schedule", f"{bundle.prediction_type}, eta {bundle.eta:g}, tau {bundle.tau}"
    for steps in bundle.steps_allowed:
        default = " (default)" if steps == bundle.default_steps else ""
        yield counted(steps, "step"), ", ".join(str(c.timestep) for c in bundle.coefficients(steps)) + default
    yield "guidance", f"{bundle.guidance['mode']}, scale {bundle.guidance['scale']:g}"
    yield "style", f"{bundle.style['tokens']} tokens from {bundle.style_px} px"
    yield "text", str(manifest["text"]["mode"])
    if bundle.window is not None:
        yield "window", f"{bundle.window[0]} frames at once, {bundle.window[1]} shared with the window before"
    if bundle.unet_inputs:
        yield "unet sees", ", ".join(bundle.unet_inputs)
    for name in bundle.graph_names:
        precision = manifest.get("precision", {}).get(name, {})
        parity = manifest.get("parity", {}).get(name)
        megabytes = bundle.weights_path(name).stat().st_size / 2**20
        checked = f", {parity['psnr_db']:.1f} dB against {parity['against']}" if parity else ""
        yield f"graph {name}", f"{megabytes:.1f} MB, weights {precision.get('weights', '?')}{checked}"
    for form in bundle.forms[1:]:
        for name, row in bundle.quantized(form).items():
            near = f"{row['psnr_db']:.1f} dB (worst {row['worst_db']:.1f} dB)"
            yield f"{form} {name}", f"the same weights, pictures {near} against {bundle.forms[0]}"
    for source in manifest.get("sources", []):
        origin = f"{source['id']} ({source['licence']}) sha256 {source['sha256'][:16]}"
        yield f"source {source['role']}", origin
    yield "made with", ", ".join(f"{key} {value}" for key, value in manifest.get("created_with", {}).items())


@bundles_app.command("verify")
def verify(bundle: BundleArgument = None) -> None:
    """Check every file's hash; exits with 2 at the first file that changed since export."""
    from std_rt.core.bundle import load_bundle, verify_bundle

    found = load_bundle(bundle, verify=False)
    verify_bundle(found)
    count = len(found.manifest["files"])
    typer.echo(f"{found.name}: {count} files, {found.total_bytes / 2**20:.1f} MB, unchanged since export")


@bundles_app.command("compare")
def compare(
    bundle: BundleArgument = None,
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="Another bundle; default: the same.")
    ] = None,
    backend: Annotated[str, Option(help="The backend that is right, as in std-rt doctor.")] = "onnxruntime",
    against: Annotated[str, Option(metavar="BACKEND", help="The backend in doubt.")] = "openvino",
    graph: Annotated[list[str] | None, Option(help="Only this graph, such as unet; repeatable.")] = None,
    floor: Annotated[float, Option(metavar="DB", help="Below this PSNR a layer differs.")] = 60.0,
    precision: PrecisionOption = "fp32",
    device: DeviceOption = None,
) -> None:
    """Find the first layer that two backends, or two bundles, compute differently.

    std-rt bundles compare --backend onnxruntime --against openvino --precision auto

    std-rt bundles compare engines/a engines/b --graph unet --against onnxruntime

    On the bundle's own reference inputs. Exits with 1 if a layer differs. Needs the extra \\[onnx]: see
    std-rt doctor.
    """
    require("std-rt bundles compare", "onnx", "onnx")
    from std_rt.core.bundle import QUANTIZED, load_bundle

    if precision in QUANTIZED:
        raise UsageError(f"layers in {precision} are not compared; use --precision auto, fp32 or bf16")
    from std_rt.export.layer_comparison import first_difference

    use_device(device)
    one = load_bundle(bundle)
    second = one if other is None else load_bundle(other)
    names = graph or [name for name in one.graph_names if name in second.graph_names]
    for name in names:
        if name not in one.graph_names or name not in second.graph_names:
            known = ", ".join(one.graph_names)
            raise UsageError(f"there is no graph '{name}' in both; use --graph with one of {known}")
    reference, differs = one.reference(), False
    for name in names:
        start = f"{name}/in/"
        inputs = {key.removeprefix(start): value for key, value in reference.items() if key.startswith(start)}
        if not inputs:
            typer.echo(f"{name}: no reference inputs in {one.name}, left out")
            continue
        sides = (_side(one, name, backend, precision), _side(second, name, against, precision))
        found = first_difference(*sides, inputs, floor)
        differs |= found is not None
        typer.echo(
            f"{name}: {f'no layer below {floor:g} dB' if found is None else f'first differs in {found}'}"
        )
    if differs:
        raise typer.Exit(1)


def _side(bundle: Bundle, graph: str, backend: str, precision: str) -> Side:
    from std_rt.export.layer_comparison import Side

    compute = bundle.manifest.get("precision", {}).get(graph, {}).get("compute", "fp32")
    return Side(bundle.graph_path(graph), backend, precision, compute)


@bundles_app.command("unpack")
def unpack(
    output: Annotated[
        Path, Option("--output", "-o", metavar="FOLDER", help="The diffusers folder to write.")
    ],
    bundle: BundleArgument = None,
) -> None:
    """Turn std-tiny, or a bundle of its kind, back into a diffusers folder, to train on.

    Bundles exported from other diffusers folders do not hold everything that training needs.

    Needs the extra \\[export]: see std-rt doctor.
    """
    require("std-rt bundles unpack", "export", "torch", "diffusers", "safetensors")
    from std_rt.core.bundle import load_bundle
    from std_rt.core.schedule import NoiseSchedule
    from std_rt.export.restore import load_torch_components
    from std_rt.models.style_encoder import StyleEncoder
    from std_rt.training.tiny.tiny_pipeline import TinyPipeline, save_tiny

    if output.exists():
        raise UsageError(f"{output} exists; choose another folder with -o")
    found = load_bundle(bundle)
    parts = {} if found.window is not None else load_torch_components(found)
    if not isinstance(parts.get("style_encoder"), StyleEncoder):
        names = {source["role"]: source["id"] for source in found.manifest.get("sources", [])}
        kinds = {"pipeline": "the diffusers folder", "motion_adapter": "the motion adapter"}
        made_of = " and ".join(f"{what} {names[role]}" for role, what in kinds.items() if role in names)
        raise UsageError(
            f"{found.name} was exported from {made_of or 'a diffusers folder'} and does not hold everything "
            f"that training needs; train on {'these' if ' and ' in made_of else 'that'} instead"
        )
    if "betas" not in found.manifest["schedule"]:
        raise UsageError(
            f"{found.name} does not contain its noise schedule; export it again with this std-rt"
        )
    noise = {"trained_betas": found.manifest["schedule"]["betas"], "prediction_type": found.prediction_type}
    schedule = NoiseSchedule.from_config(noise)
    save_tiny(TinyPipeline(parts["unet"], parts["style_encoder"], parts["vae"], schedule), output)  # type: ignore[arg-type]
    typer.echo(output)


@bundles_app.command("int8")
def int8(
    output: QuantizedOption,
    bundle: BundleArgument = None,
    calibrate: CalibrateOption = None,
    pairs: PairsOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Add an int8 form to a bundle in fp32, for processors with VNNI. Needs: pip install '.\\[export,int8]'

    std-rt bundles int8 my-bundle -o engines/my-bundle-int8 --calibrate photos
    """
    require("std-rt bundles int8", "export,int8", "onnx", "onnxscript", "nncf")
    _quantize("int8", bundle, output, calibrate, pairs, overwrite)


@bundles_app.command("fp8")
def fp8(
    output: QuantizedOption,
    bundle: BundleArgument = None,
    calibrate: CalibrateOption = None,
    pairs: PairsOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Add an FP8 form to a bundle in fp16, for rtx and tensorrt on RTX 40 GPUs and newer.

    Needs: pip install '.\\[export,onnx]'

    std-rt bundles fp8 my-sdxl -o engines/my-sdxl-fp8 --calibrate photos
    """
    require("std-rt bundles fp8", "export,onnx", "onnx", "onnxscript", "onnxruntime")
    _quantize("fp8", bundle, output, calibrate, pairs, overwrite)


def _quantize(
    form: str,
    bundle: str | None,
    output: Path,
    calibrate: Path | None,
    pairs: int | None,
    overwrite: bool,
) -> None:
    from rich.console import Console

    from std_rt.cli.export import print_quantized, read_calibration
    from std_rt.core.bundle import check_target, load_bundle

    check_target(output, overwrite)
    pictures, found = read_calibration(calibrate), load_bundle(bundle)
    from std_rt.export.quantize import quantize_bundle

    with Console(stderr=True).status("quantizing") as status:
        made = quantize_bundle(
            found, output, pictures, status.update, overwrite=overwrite, form=form, pairs=pairs
        )
    typer.echo(f"{made.path} ({made.name}, {made.total_bytes / 2**20:.1f} MB)")
    print_quantized(made)
