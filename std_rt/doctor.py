"""`std-rt doctor`: what is here, what is missing, and the command that adds it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from std_rt import __version__
from std_rt.bundle import BUILT_IN, Bundle, list_bundles, search_paths
from std_rt.engines import BackendInfo, backends
from std_rt.engines.base import cache_root
from std_rt.machine import describe_machine

__all__ = ["conflicts", "folder_size_mb", "run"]

# Pairs that install the same Python module: whichever came last wins, and removing one breaks the other.
_RIVALS = (
    ("onnxruntime", "onnxruntime-gpu"),
    ("opencv-python-headless", "opencv-python"),
)

Row = tuple[str, str, str]  # mark, name, detail
_GOOD, _BAD, _NOTE = "[green]ok[/]", "[red]!![/]", "[dim]--[/]"


def run() -> int:
    """Print the report; 0 where `std-rt stylize` can work with the built-in model, else 1."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    found, known = backends(probe=True), list_bundles()
    for mark, name, detail in (*_system(), *_backends(found), *_conflicts(), *_cache(), *_bundles(known)):
        table.add_row(mark, name, escape(detail))
    Console().print(table)
    built_in = any(isinstance(item, Bundle) and item.name == BUILT_IN for item in known)
    return 0 if built_in and any(info.available for info in found) else 1


def conflicts() -> list[tuple[str, str]]:
    """Pairs of installed packages that overwrite each other."""
    installed = {str(found.metadata["Name"]).lower() for found in metadata.distributions()}
    return [pair for pair in _RIVALS if installed.issuperset(pair)]


def folder_size_mb(folder: Path) -> float:
    """Size of all files under a folder in MB (2**20 bytes)."""
    total = 0
    for parent, _, names in os.walk(folder):
        total += sum(path.stat().st_size for name in names if (path := Path(parent) / name).is_file())
    return total / 2**20


def _system() -> Iterator[Row]:
    yield _GOOD, "std-rt", __version__
    yield _GOOD, "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield _GOOD, "machine", str(describe_machine())


def _backends(found: list[BackendInfo]) -> Iterator[Row]:
    for info in found:
        if info.available:
            yield _GOOD, info.name, info.detail
        else:
            yield _NOTE, info.name, f"{info.detail}; to add it: {info.install}"
    if not any(info.available for info in found):
        yield _BAD, "backends", f"none is installed; run: {found[0].install}"


def _conflicts() -> Iterator[Row]:
    for keep, other in conflicts():
        mend = f"pip uninstall {keep} {other}, then install the one you want"
        yield _BAD, "packages", f"{keep} and {other} overwrite each other; run: {mend}"


def _cache() -> Iterator[Row]:
    root = cache_root()
    if root is None:
        detail = "no folder can be written, so every start compiles anew; set STD_RT_CACHE to one that can"
        yield _BAD, "cache", detail
    else:
        yield _GOOD, "cache", f"{root} ({folder_size_mb(root):.0f} MB; safe to delete)"


def _bundles(known: Sequence[Bundle | tuple[str, Exception]]) -> Iterator[Row]:
    for item in known:
        if isinstance(item, Bundle):
            yield _GOOD, "bundle", f"{item.name} ({item.total_bytes / 2**20:.1f} MB) in {item.path}"
        else:
            yield _BAD, "bundle", f"{item[0]}: {item[1]}"
    names = {item.name if isinstance(item, Bundle) else item[0] for item in known}
    if BUILT_IN not in names:
        yield _BAD, "bundle", f"{BUILT_IN} is missing; run: pip install --force-reinstall --no-deps std-rt"
    yield _NOTE, "bundles", f"also looked in {', '.join(str(path) for path in search_paths())}"
