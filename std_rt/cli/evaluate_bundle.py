"""`std-rt evaluate` of a bundle: draw pairs, run them and the clips, print the scores. No torch."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.table import Table

from std_rt.cli.evaluate import Common, judge_with, write_table
from std_rt.core.files import check_output
from std_rt.evaluation.bundles import clip_frames, clips_among, draw_pairs, evaluate, measure_clip
from std_rt.pipeline.conditioning import square
from std_rt.pipeline.stylizer import Size, Stylizer

__all__ = ["run_bundle"]


def run_bundle(
    common: Common, bundle: str | None, size: int | Size | None, steps: int | None, backend: str
) -> None:
    """Write the sheet; print mean scores, a table for people and one JSON line for programs.

    ``size`` is a side or (H, W) in pixels; None: the bundle's.
    """
    for path in (common.sheet, common.table):
        if path is not None:
            check_output(path, overwrite=common.overwrite)
    judge = judge_with(common.scorers)
    loaded = Stylizer.load(bundle, backend=backend, size=size, steps=steps, precision=common.precision)
    with loaded as stylizer:
        side = max(stylizer.size if isinstance(stylizer.size, tuple) else (stylizer.size,))
        pairs = draw_pairs(common.contents, common.styles, common.pairs, side)
        with Console(stderr=True).status(f"{len(pairs)} pairs") as status:
            scores = evaluate(stylizer, pairs, common.sheet, judge=judge)
            clips = {}
            for i, path in enumerate(clips_among(common.contents, common.videos)):
                status.update(str(path))
                frames = [square(frame, side) for frame in clip_frames(path, common.frames)]
                clips[str(path)] = measure_clip(stylizer, frames, pairs[i % len(pairs)][1])
        described = {
            "bundle": stylizer.bundle.name,
            "digest": stylizer.bundle.digest,
            "steps": stylizer.steps,
        }
    _print("mean score", scores)
    if clips:
        _print("warping error", clips)
    typer.echo(f"sheet (content | style | std-rt | baselines): {common.sheet}")
    found = {"scores": scores, "warping": clips, "pairs": len(pairs), "size_px": side, **described}
    write_table(common.table, found)
    typer.echo(json.dumps(found))


def _print(title: str, rows: dict[str, dict[str, float]]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    for name in names:
        table.add_column(name, justify="right")
    for title_of_row, row in rows.items():
        table.add_row(title_of_row, *(f"{row[name]:.3f}" if name in row else "" for name in names))
    Console().print(table)
