"""Options that several commands share, with their parsing and checks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer import BadParameter, Option

from std_rt.core.errors import UsageError

__all__ = [
    "BackendOption",
    "BundleArgument",
    "BundleOption",
    "DeviceOption",
    "EngineFlags",
    "OverwriteOption",
    "PrecisionOption",
    "SizeOption",
    "StepsOption",
    "StrokeSizeOption",
    "StylizerFlags",
    "TemporalOption",
    "VaeOption",
    "check_stroke_option",
    "command_of",
    "parse_frame_size",
    "parse_size",
    "parse_style",
    "split_number",
    "use_device",
]

Size = tuple[int, int]  # (H, W) in pixels

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)

BundleArgument = Annotated[
    str | None, typer.Argument(metavar="NAME|FOLDER", help="Default: the built-in model.")
]
BundleOption = Annotated[
    str | None,
    Option("--bundle", "-b", metavar="NAME|FOLDER", help="The model; `std-rt bundles list` shows them."),
]
SizeOption = Annotated[
    str | None,
    Option(
        metavar="PX|WxH",
        help="Working size: 512 for the area of 512 x 512 px, or WIDTHxHEIGHT; the input's aspect stays.",
    ),
]
StepsOption = Annotated[
    int | None, Option(help="Denoising steps; a count the bundle supports (std-rt bundles info).")
]
StrokeSizeOption = Annotated[
    float | None,
    Option(
        metavar="0.5..2",
        help="Size of the style's strokes; 1: as in its picture. Default: a style file's own, else 1.",
    ),
]
BackendOption = Annotated[
    str, Option(help="auto, cpu, or a backend listed by `std-rt doctor`, e.g. openvino or rtx.")
]
DeviceOption = Annotated[
    str | None, Option(metavar="cuda:N", help="Which GPU, as `std-rt doctor` lists them. Default: the first.")
]
PrecisionOption = Annotated[
    str, Option(help="auto (what this processor is fastest at), fp32, bf16, int8; fp8 on GPUs.")
]
VaeOption = Annotated[
    str,
    Option(
        metavar="auto|full|tiny", help="The bundle's VAE, or its faster one. auto: the faster one in `live`."
    ),
]
TemporalOption = Annotated[
    str,
    Option(
        metavar="off|noise|full",
        help="Temporal smoothing: noise follows the motion; full also blends frames.",
    ),
]
OverwriteOption = Annotated[bool, Option("--overwrite", help="Replace files that exist.")]


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """Which model a command runs, and on what. Raises BadParameter for invalid values."""

    bundle: BundleOption = None
    size: SizeOption = None
    steps: StepsOption = None
    backend: BackendOption = "auto"
    device: DeviceOption = None
    precision: PrecisionOption = "auto"
    vae: VaeOption = "auto"
    temporal: TemporalOption = "off"

    def __post_init__(self) -> None:
        if self.vae not in ("auto", "full", "tiny"):
            raise BadParameter(f"--vae must be auto, full or tiny, got {self.vae!r}")
        use_device(self.device)
        parse_size(self.size)
        if self.temporal not in ("off", "noise", "full"):
            raise BadParameter(f"--temporal must be off, noise or full, got {self.temporal!r}")


@dataclass(frozen=True, kw_only=True)
class StylizerFlags(EngineFlags):
    """How a command stylizes. Raises UsageError for flags that do not fit together."""

    style_strength: Annotated[float, Option(help="0: painted in no style, 1: as trained, 2: stronger.")] = 1.0
    stroke_size: StrokeSizeOption = None
    keep_colours: Annotated[
        bool,
        Option(
            "--keep-colours", "--keep-colors", help="The input's colours with the result's light and dark."
        ),
    ] = False
    seed: Annotated[int, Option(min=0, help="Noise seed; the same seed gives the same noise.")] = 0
    prompt: Annotated[str | None, Option(help="For bundles exported with --prompts encoder.")] = None
    negative_prompt: Annotated[str | None, Option(help="What to avoid; needs --prompt and guidance.")] = None
    guidance: Annotated[
        float | None, Option(help="Guidance scale; 1 disables guidance. Default: the bundle's.")
    ] = None
    guidance_mode: Annotated[
        str | None, Option(help="full (twice the work) or residual (one more UNet call per frame).")
    ] = None
    build_in_background: Annotated[
        bool, Option("--build-in-background", help="Start on the CPU while GPU engines are being built.")
    ] = False
    overwrite: OverwriteOption = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stroke_option(self.stroke_size)
        if self.negative_prompt is not None and self.prompt is None:
            raise UsageError("--negative-prompt needs --prompt; give both")


def command_of(run: Callable[[Any], int | None]) -> Callable[..., None]:
    """The Typer command of ``run(request)``, whose options are the fields of the request, a dataclass.

    In --help the class's own fields come before those it inherits. What ``run`` returns is the exit code.
    """
    (argument,) = inspect.signature(run, eval_str=True).parameters.values()
    request = argument.annotation

    def command(**values: Any) -> None:
        raise typer.Exit(run(request(**values)) or 0)

    hints = get_type_hints(request, include_extras=True)
    names = dict.fromkeys([*request.__annotations__, *(field.name for field in fields(request))])
    signature = inspect.signature(request)
    parameters = [signature.parameters[name].replace(annotation=hints[name]) for name in names]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__, command.__doc__ = hints, run.__doc__
    return command


def parse_size(text: str | None) -> int | Size | None:
    """`core.arrays.parse_size`, None for None. Raises BadParameter."""
    if text is None:
        return None
    from std_rt.core import arrays

    try:
        return arrays.parse_size(text)
    except UsageError as error:
        raise BadParameter(str(error)) from None


def use_device(device: str | None) -> None:
    """``--device``: the GPU of this process. Raises UsageError as `choose_gpu` does."""
    if device is not None:
        from std_rt.engines.gpu.driver import choose_gpu

        choose_gpu(device)


def check_stroke_option(stroke_size: float | None) -> None:
    """Raise UsageError for a stroke size out of range."""
    if stroke_size is not None:
        from std_rt.pipeline.conditioning import check_stroke_size

        check_stroke_size(stroke_size)


def parse_frame_size(text: str | None) -> Size | None:
    """``640x480`` -> (480, 640); one number is the side of a square. Raises BadParameter."""
    size = parse_size(text)
    return (size, size) if isinstance(size, int) else size


def split_number(text: str) -> tuple[str, float | None]:
    """``name:0.7`` -> ("name", 0.7); ("name", None) without a number.

    Colons in file names and drive letters stay: only a number after the last colon counts, and only if no
    file has the whole text as its name. Raises UsageError if something else follows the name of a file.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or not head or Path(text).exists():
        return text, None
    if _NUMBER.fullmatch(tail):
        return head, float(tail)
    if Path(head).is_file():
        raise UsageError(f"{tail[:20]!r} after {head} is not a weight; use a number, such as {head}:0.7")
    return text, None


def parse_style(text: str) -> tuple[Path, float]:
    """``art.png`` or ``art.png:0.7`` -> (path, weight). Raises UsageError unless the weight is above 0."""
    head, weight = split_number(text)
    if weight is not None and not 0 < weight < float("inf"):
        raise UsageError(
            f"the weight of style {head} must be above 0, got {weight:g}; or leave that style out"
        )
    return Path(head), 1.0 if weight is None else weight
