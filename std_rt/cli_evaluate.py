"""`std-rt eval`: draw pairs, run them, print the scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from std_rt.evaluate import draw_pairs, evaluate
from std_rt.media.files import check_output
from std_rt.stylizer import Size, Stylizer

__all__ = ["Request", "run"]


@dataclass(frozen=True)
class Request:
    """The command as parsed; ``size`` is a side or (H, W) in pixels."""

    contents: Path
    styles: Path
    sheet: Path
    pairs: int
    bundle: str | None
    size: int | Size | None
    steps: int | None
    backend: str
    precision: str
    overwrite: bool


def run(request: Request) -> None:
    """Write the sheet; print mean scores, a table for people and one JSON line for programs."""
    check_output(request.sheet, overwrite=request.overwrite)
    loaded = Stylizer.load(
        request.bundle,
        backend=request.backend,
        size=request.size,
        steps=request.steps,
        precision=request.precision,
    )
    with loaded as stylizer:
        side = max(stylizer.size if isinstance(stylizer.size, tuple) else (stylizer.size,))
        pairs = draw_pairs(request.contents, request.styles, request.pairs, side)
        with Console(stderr=True).status(f"{len(pairs)} pairs"):
            scores = evaluate(stylizer, pairs, request.sheet)
        described = {
            "bundle": stylizer.bundle.name,
            "digest": stylizer.bundle.digest,
            "steps": stylizer.steps,
        }
    _print(scores)
    typer.echo(f"sheet (content | style | std-rt | baselines): {request.sheet}")
    typer.echo(json.dumps({"scores": scores, "pairs": len(pairs), "size_px": side, **described}))


def _print(scores: dict[str, dict[str, float]]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("mean score")
    for name in next(iter(scores.values())):
        table.add_column(name, justify="right")
    for method, values in scores.items():
        table.add_row(method, *(f"{value:.3f}" for value in values.values()))
    Console().print(table)
