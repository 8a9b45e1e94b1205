"""`std-rt doctor`: what is here, what is missing, and the command that adds it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from std_rt import __version__
from std_rt.core.bundle import BUILT_IN, Bundle, list_bundles, search_paths
from std_rt.core.errors import BackendError
from std_rt.core.files import cache_root
from std_rt.core.machine import available_memory_gb, describe_machine, free_disk_gb
from std_rt.engines import BackendInfo, backends
from std_rt.engines.cache import EngineCache
from std_rt.engines.cuda.libraries import missing_libraries
from std_rt.engines.cuda.probe import Report, probe
from std_rt.engines.registry import BACKENDS, GPU_BACKENDS

__all__ = ["conflicts", "folder_size_mb", "run"]

# Pairs that install the same Python module: whichever came last wins, and removing one breaks the other.
_RIVALS = (
    ("onnxruntime", "onnxruntime-gpu"),
    ("onnxruntime", "onnxruntime-directml"),
    ("onnxruntime-gpu", "onnxruntime-directml"),
    ("opencv-python-headless", "opencv-python"),
)
_LITTLE_MEMORY_GB, _LITTLE_DISK_GB = 2.0, 1.0  # less than the built-in model wants to work in peace

Row = tuple[str, str, str]  # mark, name, detail
_GOOD, _BAD, _NOTE = "[green]ok[/]", "[red]!![/]", "[dim]--[/]"


def run() -> int:
    """Print the report; 0 where `std-rt stylize` can work with the built-in model, else 1."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    found, known = backends(probe=True), list_bundles()
    rows = (*_system(), *_gpus(), *_backends(found), *_libraries(), *_conflicts(), *_cache(), *_engines())
    for mark, name, detail in (*rows, *_bundles(known), *_cameras()):
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
    memory, disk = available_memory_gb(), free_disk_gb(cache_root() or Path.cwd())
    if memory is not None:
        mark = _GOOD if memory >= _LITTLE_MEMORY_GB else _BAD
        yield mark, "memory", f"{memory:.1f} GB free (an export of SDXL's size takes about 15)"
    yield _GOOD if disk >= _LITTLE_DISK_GB else _BAD, "disk", f"{disk:.1f} GB free where the cache is"


def _gpus() -> Iterator[Row]:
    found = probe()
    if found.problem is None:
        for gpu in found.gpus:
            yield _GOOD, "gpu", f"{gpu}; {_serves(gpu.sm)}; its driver serves CUDA {found.cuda}"
    else:
        # Worth a mark only to those who installed something that needs it.
        wanted = any(find_spec(BACKENDS[name].package) for name in GPU_BACKENDS if name != "cuda")
        yield _BAD if wanted and _is_broken(found) else _NOTE, "gpu", found.problem


def _serves(sm: int) -> str:
    """Which backends know a GPU of this compute capability."""
    takes = [name for name, known in GPU_BACKENDS.items() if not known or sm in known]
    lacks = [name for name in GPU_BACKENDS if name not in takes]
    return f"for {', '.join(takes)}" + (f" (not {', '.join(lacks)})" if lacks else "")


def _is_broken(found: Report) -> bool:
    """There is a driver, and it does not work: something to mend, not a machine without a GPU."""
    return found.problem is not None and "no NVIDIA driver" not in found.problem


def _libraries() -> Iterator[Row]:
    missing = missing_libraries()
    if missing:
        command = BACKENDS["cuda"].install
        yield _BAD, "cuda", f"onnxruntime-gpu does not find {', '.join(missing)}; run: {command}"


def _backends(found: list[BackendInfo]) -> Iterator[Row]:
    for info in found:
        if info.available:
            yield _GOOD, info.name, info.detail
        elif info.problem:
            yield _NOTE, info.name, info.detail
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


def _engines() -> Iterator[Row]:
    """What is compiled; not opened before there is any, because opening makes a secret and folders."""
    root = cache_root()
    if root is None or not (root / "engines" / "manifest.json").is_file():
        return
    try:
        cache = EngineCache.open()
        entries = [] if cache is None else cache.entries()
    except BackendError as error:
        yield _BAD, "engines", str(error)
        return
    size = sum(entry.size for entry in entries) / 2**20
    products = sorted({f"{entry.key.product} {entry.key.version}" for entry in entries})
    for_what = f" for {', '.join(products)}" if products else ""
    yield _GOOD, "engines", f"{len(entries)} compiled ({size:.0f} MB){for_what}; check: std-rt engines verify"


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


def _cameras() -> Iterator[Row]:
    from std_rt.media.camera.device import list_cameras

    found = list_cameras()
    none = (
        "none found"
        if sys.platform == "linux"
        else "not listed on this system; `std-rt live` tries the first"
    )
    yield _GOOD if found else _NOTE, "cameras", ", ".join(found) or none
    has = find_spec("pyvirtualcam") is not None
    missing = "pyvirtualcam not installed; to add it: pip install 'std-rt[live]'"
    yield _GOOD if has else _NOTE, "virtual camera", "pyvirtualcam is installed" if has else missing
