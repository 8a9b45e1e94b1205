"""`std-rt styles save | show`: style files; and the parsing of ``--style`` for live sessions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from typer import Argument, Option

from std_rt.cli.options import (
    BackendOption,
    BundleOption,
    DeviceOption,
    OverwriteOption,
    StrokeSizeOption,
    check_stroke_option,
    parse_style,
    split_number,
    use_device,
)
from std_rt.cli.terminal import print_table
from std_rt.core.errors import UsageError

if TYPE_CHECKING:
    from std_rt.pipeline.style_file import StyleFile

__all__ = ["expand_styles", "styles_app"]

styles_app = typer.Typer(
    help="Save a style or blend to a small style file, and inspect style files.", no_args_is_help=True
)


@styles_app.command("save")
def save(
    styles: Annotated[
        list[str],
        Argument(metavar="PICTURE[:WEIGHT]...", help="Pictures or style files; several are blended."),
    ],
    output: Annotated[Path, Option("--output", "-o", metavar="NAME.safetensors", help="The style file.")],
    name: Annotated[str | None, Option(help="The style's name; default: the file's.")] = None,
    stroke_size: StrokeSizeOption = None,
    bundle: BundleOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Encode a picture, or a blend of several, into a style file.

    std-rt styles save art.png -o art.safetensors

    std-rt styles save ink.png:0.7 waves.png:0.3 -o mine.safetensors --name "ink and waves"
    """
    from std_rt.core.files import check_input
    from std_rt.pipeline.style_file import blend_files, check_style_output, read_style, save_style
    from std_rt.pipeline.stylizer import Stylizer

    pairs = [parse_style(text) for text in styles]
    check_stroke_option(stroke_size)
    use_device(device)
    check_style_output(output, overwrite)
    for path, _ in pairs:
        check_input(path)
    with Stylizer.load(bundle, backend=backend) as stylizer:
        encode = stylizer.encode_style
        parts = [
            (read_style(path, stylizer.bundle, encode, stroke_size=stroke_size), weight)
            for path, weight in pairs
        ]
    style = blend_files(parts, name or output.stem)
    save_style(output, style, overwrite)
    size = f"{output.stat().st_size / 1000:.1f} kB"
    typer.echo(f"{output} ({size}): style '{style.name}' for {style.bundle}, from {_sources(style)}")


@styles_app.command("show")
def show(file: Annotated[Path, Argument(metavar="FILE.safetensors")]) -> None:
    """Show what is in a style file and which bundles here can use it."""
    from std_rt.pipeline.style_file import load_style

    print_table((key, escape(value)) for key, value in _facts(file, load_style(file, None)))


def _facts(path: Path, style: StyleFile) -> Iterator[tuple[str, str]]:
    from std_rt.core.bundle import Bundle, list_bundles
    from std_rt.pipeline.style_file import style_encoder_id

    _, tokens, dim = style.style.tokens.shape
    height, width = style.thumbnail.shape[:2]
    pooled = "" if style.style.text_embeds is None else f", {style.style.text_embeds.shape[1]} pooled"
    fitting = [
        item.name
        for item in list_bundles()
        if isinstance(item, Bundle) and style_encoder_id(item) == style.encoder
    ]
    yield "name", style.name
    yield "file", str(path)
    yield "size", f"{path.stat().st_size / 1000:.1f} kB"
    yield "style", f"{tokens} tokens of {dim} numbers{pooled}"
    yield "thumbnail", f"{width} x {height} px"
    yield "from", _sources(style)
    yield "stroke size", "several" if style.stroke_size is None else f"{style.stroke_size:g}"
    yield "made with", f"bundle {style.bundle}"
    yield "style encoder", style.encoder
    none = "no bundle here; export the bundle that it was made with, or save the style again"
    yield "works with", ", ".join(fitting) or none


def _sources(style: StyleFile) -> str:
    if len(style.sources) == 1:
        return style.sources[0][0]
    return " + ".join(f"{name} {100 * share:.0f} %" for name, share in style.sources) or "unknown"


def expand_styles(texts: list[str]) -> list[tuple[Path, float | None]]:
    """``--style`` of a live session: files with an optional ``:WEIGHT`` (0 or more), or folders.

    A folder stands for the pictures and style files in it, by name. Each file appears once, where it was
    named first, with the weight given anywhere. Raises MediaError for a file that is missing or a folder
    without styles; UsageError for a weight out of range, on a folder or given twice, or if all are 0.
    """
    found: dict[Path, tuple[Path, float | None]] = {}
    for text in texts:
        head, weight = split_number(text)
        for path in _files(Path(head), weight):
            key = path.resolve()
            first, known = found.get(key, (path, None))
            if known is not None and weight is not None:
                raise UsageError(f"style {path} has two weights, {known:g} and {weight:g}; give one")
            found[key] = (first, known if weight is None else weight)
    weights = [weight for _, weight in found.values() if weight is not None]
    if weights and not any(weights):
        raise UsageError("all style weights are 0; give at least one style a weight above 0")
    return list(found.values())


def _files(path: Path, weight: float | None) -> list[Path]:
    """A folder's styles, or the file itself."""
    from std_rt.core.files import check_input
    from std_rt.pipeline.style_file import style_paths

    if weight is not None and not 0 <= weight < math.inf:
        raise UsageError(f"the weight of style {path} must be 0 or more, got {weight:g}")
    if not path.is_dir():
        check_input(path)
        return [path]
    if weight is not None:
        raise UsageError(
            f"{path} is a folder and cannot have a weight; give its files weights, as {path}/art.png:0.7"
        )
    return style_paths(path)
