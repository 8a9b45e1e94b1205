"""`std-rt styles save | show`: style files; and what ``--style`` means where styles are many."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from std_rt.cli.options import BackendOption, BundleOption, OverwriteOption, parse_style, split_number
from std_rt.core.errors import UsageError

__all__ = ["expand_styles", "styles_app"]

styles_app = typer.Typer(
    help="Keep a style, or a blend of styles, in a small file that needs no picture.", no_args_is_help=True
)


@styles_app.command("save")
def styles_save(
    styles: Annotated[
        list[str],
        typer.Argument(metavar="PICTURE[:WEIGHT]...", help="Pictures or style files; several blend."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="NAME.safetensors", help="The style file.")
    ],
    name: Annotated[str | None, typer.Option("--name", help="Shown to people; default: the file's.")] = None,
    bundle: BundleOption = None,
    backend: BackendOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Encode a picture, or blend several, into a style file.

    std-rt styles save art.png -o art.safetensors

    std-rt styles save ink.png:0.7 waves.png:0.3 -o mine.safetensors --name "ink and waves"
    """
    pairs = [parse_style(text) for text in styles]
    from std_rt.cli.styles_run import save

    save(pairs, output, name, bundle, backend, overwrite=overwrite)


@styles_app.command("show")
def styles_show(file: Annotated[Path, typer.Argument(metavar="FILE.safetensors")]) -> None:
    """Say what is in a style file, and which bundles here can use it."""
    from std_rt.cli.styles_run import show

    show(file)


def expand_styles(texts: list[str]) -> list[tuple[Path, float | None]]:
    """``--style`` of a live session: files with an optional ``:WEIGHT`` (0 or more), or folders.

    A folder stands for the pictures and style files in it, by name. Each file comes once, in the order it
    was first named; a weight given beside its folder counts. Raises MediaError for a file that is missing or
    a folder without styles; UsageError for a weight out of range, on a folder or given twice, or all 0.
    """
    found: dict[Path, tuple[Path, float | None]] = {}
    for text in texts:
        head, weight = split_number(text)
        for path in _files(Path(head), weight):
            key = path.resolve()
            known = found.get(key, (path, None))
            if None not in (known[1], weight):
                raise UsageError(f"style {path} has two weights, {known[1]:g} and {weight:g}; give one")
            found[key] = (known[0], known[1] if weight is None else weight)
    weights = [weight for _, weight in found.values() if weight is not None]
    if weights and not any(weights):
        raise UsageError("all style weights are 0; give at least one style a weight above 0")
    return list(found.values())


def _files(path: Path, weight: float | None) -> list[Path]:
    """A folder's styles, or the file itself."""
    from std_rt.core.files import check_input
    from std_rt.pipeline.style_file import style_paths

    if weight is not None and not 0 <= weight < math.inf:
        raise UsageError(f"the weight of style {path} must be 0 or more and finite, got {weight:g}")
    if not path.is_dir():
        check_input(path)
        return [path]
    if weight is not None:
        raise UsageError(f"{path} is a folder and takes no weight; give its files one, as {path}/art.png:0.7")
    return style_paths(path)
