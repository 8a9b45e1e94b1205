"""`std-rt bench --table`: frames per second by size, steps, backend and precision, in one run.

Each cell is the median of a few frames. int8 needs a bundle that has that form (`std-rt bundles int8`).
Columns that cannot run on this machine are omitted, and listed below the table with the reason.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import BackendError
from std_rt.core.machine import describe_machine, install_hint
from std_rt.engines import backends
from std_rt.evaluation.bench import Settings, Timing, diffusers_step, measure, stream_step
from std_rt.pipeline.stylizer import Stylizer

__all__ = ["COLUMNS", "SIZES", "STEPS", "Column", "columns_here", "run_table"]

SIZES = (256, 384, 512)  # px
STEPS = (1, 2, 4, 8)
_MOST_FRAMES, _WARMUP = 9, 2  # per cell


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


def run_table(settings: Settings) -> None:
    """Measure every combination that runs here; of ``settings``, ``bundle`` and ``frames`` apply."""
    typer.echo(str(describe_machine()))
    bundle = load_bundle(settings.bundle)
    columns, left_out = columns_here("int8" in bundle.forms)
    steps = [count for count in STEPS if count in bundle.steps_allowed]
    plan = [(size, count, column) for size in SIZES for count in steps for column in columns]
    console = Console(stderr=True)
    cells: list[dict[str, Any]] = []
    frames = min(settings.frames, _MOST_FRAMES)
    for size, count, column in track(
        plan, "timing", console=console, transient=True, disable=not console.is_terminal
    ):
        try:
            timing = _measure(bundle, size, count, column, frames)
        except BackendError as error:  # listed below the table
            left_out[str(column)] = str(error)
            continue
        cells.append({"size": size, "steps": count, **asdict(column), **timing.as_dict()})
    _print(bundle, cells, left_out)


def columns_here(has_int8: bool) -> tuple[list[Column], dict[str, str]]:
    """(columns that can be tried here, why each of the others cannot)."""
    reasons = {column: _obstacle(column, has_int8) for column in COLUMNS}
    left_out = {str(column): reason for column, reason in reasons.items() if reason}
    return [column for column, reason in reasons.items() if not reason], left_out


def _obstacle(column: Column, has_int8: bool) -> str:
    """Why a column cannot be measured here; empty if it can."""
    if column.backend == "torch":
        missing = [name for name in ("torch", "diffusers") if find_spec(name) is None]
        return f"{missing[0]} is not installed; run: {install_hint('export')}" if missing else ""
    info = next(info for info in backends() if info.name == column.backend)
    if not info.available:
        return f"not installed; run: {info.install}"
    if column.precision == "int8" and not has_int8:
        return "the bundle has no int8 form; see: std-rt bundles int8 --help"
    return ""


def _measure(bundle: Bundle, size_px: int, steps: int, column: Column, frames: int) -> Timing:
    size = (size_px, size_px)
    if column.backend == "torch":
        theirs = diffusers_step(bundle, steps, size, precision=column.precision)
        return measure({"": theirs}, frames, _WARMUP, silent=True)[""]
    with Stylizer.load(
        bundle, backend=column.backend, size=size, steps=steps, precision=column.precision
    ) as stylizer:
        return measure({"": stream_step(stylizer, size)}, frames, _WARMUP, silent=True)[""]


def _print(bundle: Bundle, cells: list[dict[str, Any]], left_out: dict[str, str]) -> None:
    found = {
        (cell["size"], cell["steps"], Column(cell["backend"], cell["precision"])): f"{cell['fps']:.1f}"
        for cell in cells
    }
    columns = list(dict.fromkeys(column for _, _, column in found))
    table = Table(title=f"{bundle.name}: frames per second, batch 1", box=None, pad_edge=False)
    table.add_column("px")
    for name in ("steps", *(f"{column.backend}\n{column.precision}" for column in columns)):
        table.add_column(name, justify="right")
    for size, steps in dict.fromkeys((size, steps) for size, steps, _ in found):
        rates = [found.get((size, steps, column), "-") for column in columns]
        table.add_row(str(size), str(steps), *rates)
    Console().print(table)
    for name, reason in left_out.items():
        typer.echo(f"left out: {name}: {reason}")
    result = {"bundle": bundle.name, "digest": bundle.digest, "machine": str(describe_machine())}
    typer.echo(json.dumps({**result, "table": cells, "left_out": left_out}))
