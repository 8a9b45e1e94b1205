"""The terminal as commands use it: tables, notes, and progress of engine builds."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from std_rt.core.files import reason
from std_rt.core.machine import quoted

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "builds_shown",
    "counting",
    "note",
    "print_table",
    "program",
    "progress_lines",
    "say",
    "working",
]

_LINE_EVERY_S = 30.0
_WIDE = 200  # characters of a table of numbers in a file or a pipe, which has no edge to wrap at


def note(console: Console, line: str) -> None:
    """Print a line in grey, exactly as it is."""
    console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def program() -> str:
    """What to type for this program: its name where a shell finds it, else how it was started."""
    if shutil.which("std-rt"):
        return "std-rt"
    started = sys.argv[0]
    return f"{quoted(sys.executable)} -m std_rt" if started.endswith(".py") else quoted(started)


def say(line: str, bars: Progress | None = None) -> None:
    """Print a line of results. A stdout that takes no more (``| head``) ends the lines, not the work.

    ``bars`` on stderr leave the screen meanwhile: they would share its row.
    """
    bars = None if bars is None or bars.disable else bars
    if bars is not None:
        bars.stop()
    try:
        typer.echo(line)
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        note(Console(stderr=True), f"note: stdout takes no more lines ({reason(error)}); the work goes on")
    finally:
        if bars is not None:
            bars.start()


def progress_lines(
    console: Console, *, every_s: float = _LINE_EVERY_S, now: Callable[[], float] = time.monotonic
) -> Callable[[str, int, int | None], None]:
    """A function (what, done, total) for logs: it prints a line now and then, and nothing on a terminal,
    which has a bar."""
    begun_s = last_s = now()

    def show(what: str, done: int, total: int | None) -> None:
        nonlocal last_s
        if console.is_terminal or now() - last_s < every_s:
            return
        last_s = now()
        spent_s = last_s - begun_s
        of, left = "", ""
        if total is not None and done:
            of = f" of {total}"
            left = f", {_duration(spent_s / done * max(total - done, 0))} left"
        note(console, f"{what}: {done}{of} after {_duration(spent_s)}{left}")

    return show


@contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show ``what`` is being done; yields a function (what, done, total). In a log, a line now and then."""
    lines: dict[str, Callable[[str, int, int | None], None]] = {}
    with console.status(what) as status:

        def told(now: str, done: int, total: int) -> None:
            status.update(f"{now}: {done} of {total}")
            lines.setdefault(now, progress_lines(console))(now, done, total)

        yield told


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@contextmanager
def working(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Show ``what`` is being done; yields a function that changes it. In a log, each change is a line."""
    if not console.is_terminal:
        note(console, what)
        yield lambda line: note(console, line)
        return
    spinner = "dots" if console.encoding.startswith("utf") else "line"
    with console.status(what, spinner=spinner) as status:
        yield lambda line: status.update(line)


def print_table(rows: Iterable[Sequence[str]], titles: Sequence[str] = (), *, numeric: bool = False) -> None:
    """Print rows of rich markup to stdout; long cells fold. Without ``titles`` the first column is bold.

    ``numeric``: all columns but the first hold numbers, aligned right and not folded.
    """
    from rich.table import Table

    cells = list(rows)
    table = Table(box=None, pad_edge=False, show_header=bool(titles))
    for index, title in enumerate(titles or [""] * max(map(len, cells), default=0)):
        is_number = numeric and index > 0
        table.add_column(
            title,
            overflow="fold",
            style="" if titles or index else "bold",
            justify="right" if is_number else "left",
            no_wrap=is_number,
        )
    for row in cells:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # whoever reads it there looks for whole words
        console.width = _WIDE
    console.print(table)


@contextmanager
def builds_shown(console: Console, backend: str) -> Iterator[None]:
    """Report TensorRT build progress in 10 % steps while the block runs (a first build takes minutes)."""
    if backend not in ("tensorrt", "rtx"):
        yield
        return
    from std_rt.engines.tensorrt.engine_builder import progress_to

    shown: dict[str, int] = {}

    def show(graph: str, share: float) -> None:
        tenths = int(share * 10)
        if tenths > shown.get(graph, -1):
            shown[graph] = tenths
            note(console, f"building the engine of {graph}: {10 * tenths} %")

    with progress_to(show):
        yield
