"""What `std-rt styles` does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from std_rt.core.bundle import Bundle, list_bundles
from std_rt.core.files import check_input
from std_rt.pipeline.style_file import (
    StyleFile,
    blend_files,
    check_style_output,
    load_style,
    read_style,
    save_style,
    style_encoder_id,
)
from std_rt.pipeline.stylizer import Stylizer

__all__ = ["save", "show"]


def save(
    pairs: list[tuple[Path, float]],
    output: Path,
    name: str | None,
    bundle: str | None,
    backend: str,
    *,
    overwrite: bool,
) -> None:
    """Write the blend of (path, weight) pairs to ``output``; places are checked before any work."""
    check_style_output(output, overwrite)
    for path, _ in pairs:
        check_input(path)
    with Stylizer.load(bundle, backend=backend) as stylizer:
        parts = [(read_style(path, stylizer.bundle, stylizer.encode_style), weight) for path, weight in pairs]
    style = blend_files(parts, name or output.stem)
    save_style(output, style, overwrite)
    size = f"{output.stat().st_size / 1000:.1f} kB"
    typer.echo(f"{output} ({size}): style '{style.name}' for {style.bundle}, from {_sources(style)}")


def show(path: Path) -> None:
    """What a person asks about a style file."""
    style = load_style(path, None)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in _facts(path, style):
        table.add_row(key, escape(value))
    Console().print(table)


def _facts(path: Path, style: StyleFile) -> Iterator[tuple[str, str]]:
    _, tokens, dim = style.style.tokens.shape
    height, width = style.thumbnail.shape[:2]
    fitting = [item.name for item in list_bundles() if isinstance(item, Bundle) and _fits(style, item)]
    yield "name", style.name
    yield "file", str(path)
    yield "size", f"{path.stat().st_size / 1000:.1f} kB"
    pooled = "" if style.style.text_embeds is None else f", {style.style.text_embeds.shape[1]} pooled"
    yield "style", f"{tokens} tokens of {dim} numbers{pooled}"
    yield "thumbnail", f"{width} x {height} px"
    yield "from", _sources(style)
    yield "made with", f"bundle {style.bundle}"
    yield "style encoder", style.encoder
    yield (
        "works with",
        ", ".join(fitting) or "no bundle here; export the one it was made with, or save it again",
    )


def _fits(style: StyleFile, bundle: Bundle) -> bool:
    return style.encoder == style_encoder_id(bundle)


def _sources(style: StyleFile) -> str:
    if len(style.sources) == 1:
        return style.sources[0][0]
    return " + ".join(f"{name} {100 * share:.0f} %" for name, share in style.sources) or "unknown"
