"""`std-rt bench --table`: frames a second by size, steps, backend and precision, in one run.

Each cell is the median of a few frames. int8 needs a bundle in int8 (`std-rt export ... --precision int8`):
the one named ``NAME-int8``, where there is one. What cannot run here is left out, and said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import BackendError, BundleError
from std_rt.core.machine import describe_machine, install_hint
from std_rt.engines import backends
from std_rt.evaluation.bench import STAGES, Settings, Timing, measure, sample_frame
from std_rt.pipeline.stylizer import Stylizer

__all__ = ["COLUMNS", "SIZES", "STEPS", "Cell", "Column", "columns_here", "run_table"]

SIZES = (256, 384, 512)  # px
STEPS = (1, 2, 4, 8)
_MOST_FRAMES, _WARMUP = 9, 2  # a cell


@dataclass(frozen=True)
class Column:
    """``backend`` torch is diffusers' own modules, eager (`std_rt.evaluation.diffusers_baseline`)."""

    backend: str
    precision: str

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"


COLUMNS = (
    Column("openvino", "fp32"),
    Column("openvino", "bf16"),
    Column("openvino", "int8"),
    Column("onnxruntime", "fp32"),
    Column("onnxruntime", "int8"),
    Column("torch", "fp32"),
    Column("torch", "bf16"),
)


@dataclass(frozen=True)
class Cell:
    """One measured combination; ``outside_engines`` is a share of the frame's time."""

    size_px: int
    steps: int
    column: Column
    timing: Timing

    def as_dict(self) -> dict[str, Any]:
        """Fields for the JSON line."""
        return {
            "size": self.size_px,
            "steps": self.steps,
            "backend": self.column.backend,
            "precision": self.column.precision,
            "fps": round(self.timing.fps, 2),
            "stages_ms": {stage: round(self.timing.median_ms[stage], 3) for stage in STAGES},
        }


def run_table(settings: Settings) -> None:
    """Measure every combination that runs here; of ``settings``, ``bundle`` and ``frames`` apply."""
    typer.echo(str(describe_machine()))
    bundle = load_bundle(settings.bundle)
    quantized = _quantized(bundle)
    columns, left_out = columns_here(quantized is not None)
    steps = [count for count in STEPS if count in bundle.steps_allowed]
    plan = [(size, count, column) for size in SIZES for count in steps for column in columns]
    console = Console(stderr=True)
    cells, frames = [], min(settings.frames, _MOST_FRAMES)
    for size, count, column in track(
        plan, "timing", console=console, transient=True, disable=not console.is_terminal
    ):
        used = quantized if column.precision == "int8" and quantized is not None else bundle
        try:
            cells.append(Cell(size, count, column, _measure(used, size, count, column, frames)))
        except BackendError as error:  # said below: a table of what runs is what was asked for
            left_out[str(column)] = str(error)
    _print(bundle, cells, left_out)


def columns_here(has_int8: bool) -> tuple[list[Column], dict[str, str]]:
    """(columns that can be tried here, why each of the others cannot)."""
    installed = {info.name: info for info in backends()}
    found, left_out = [], {}
    for column in COLUMNS:
        reason = _obstacle(column, installed, has_int8)
        if reason:
            left_out[str(column)] = reason
        else:
            found.append(column)
    return found, left_out


def _obstacle(column: Column, installed: dict[str, Any], has_int8: bool) -> str:
    from importlib.util import find_spec

    if column.backend == "torch":
        missing = [name for name in ("torch", "diffusers") if find_spec(name) is None]
        return f"{missing[0]} is not installed; run: {install_hint('export')}" if missing else ""
    info = installed[column.backend]
    if not info.available:
        return f"not installed; run: {info.install}"
    if column.precision == "int8" and not has_int8:
        return "there is no bundle in int8; see: std-rt export --help"
    return ""


def _quantized(bundle: Bundle) -> Bundle | None:
    """The bundle's int8 twin by name, made from this very bundle; None where there is none."""
    try:
        found = load_bundle(f"{bundle.name}-int8")
    except BundleError:
        return None
    made_from = found.manifest.get("quantized", {}).get("from", {}).get("digest")
    return found if made_from == bundle.digest else None


def _measure(bundle: Bundle, size_px: int, steps: int, column: Column, frames: int) -> Timing:
    frame = sample_frame(size_px, size_px)
    style = sample_frame(bundle.style_px, bundle.style_px, seed=1)
    if column.backend == "torch":
        from std_rt.evaluation.diffusers_baseline import DiffusersLoop

        loop = DiffusersLoop(bundle, steps, (size_px, size_px), precision=column.precision)
        loop.set_style(style)
        return measure(lambda mark: loop.step(frame, mark=mark), frames, _WARMUP, silent=True)
    precision = "auto" if column.precision == "int8" else column.precision
    with Stylizer.load(
        bundle, backend=column.backend, size=(size_px, size_px), steps=steps, precision=precision
    ) as stylizer:
        stylizer.set_style(style)
        state = stylizer.state(size_px, size_px)
        return measure(lambda mark: stylizer.step(frame, state, mark=mark), frames, _WARMUP, silent=True)


def _print(bundle: Bundle, cells: list[Cell], left_out: dict[str, str]) -> None:
    columns = [column for column in COLUMNS if any(cell.column == column for cell in cells)]
    table = Table(title=f"{bundle.name}: frames a second, batch 1", box=None, pad_edge=False)
    table.add_column("px")
    table.add_column("steps", justify="right")
    for column in columns:
        table.add_column(f"{column.backend}\n{column.precision}", justify="right")
    for row in _rows(cells, columns):
        table.add_row(*row)
    Console().print(table)
    for name, reason in left_out.items():
        typer.echo(f"left out: {name}: {reason}")
    result = {"bundle": bundle.name, "digest": bundle.digest, "machine": str(describe_machine())}
    typer.echo(json.dumps({**result, "table": [cell.as_dict() for cell in cells], "left_out": left_out}))


def _rows(cells: list[Cell], columns: list[Column]) -> Iterator[list[str]]:
    found = {(cell.size_px, cell.steps, cell.column): f"{cell.timing.fps:.1f}" for cell in cells}
    for size, steps in dict.fromkeys((cell.size_px, cell.steps) for cell in cells):
        yield [str(size), str(steps), *(found.get((size, steps, column), "-") for column in columns)]
