"""`std-rt doctor`: what is installed, what is missing, and how to add it."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from std_rt import __version__
from std_rt.cli.terminal import print_table
from std_rt.core.errors import BackendError
from std_rt.core.machine import (
    available_memory_gb,
    describe_machine,
    fastest_arithmetic,
    free_disk_gb,
    install_hint,
)

if TYPE_CHECKING:
    from std_rt.core.bundle import Bundle
    from std_rt.engines import BackendInfo

__all__ = ["doctor"]

# Pairs that install the same Python module: whichever came last wins, and removing one breaks the other.
_RIVALS = (
    ("onnxruntime", "onnxruntime-gpu"),
    ("onnxruntime", "onnxruntime-directml"),
    ("onnxruntime-gpu", "onnxruntime-directml"),
    ("opencv-python-headless", "opencv-python"),
)
# Extra, what needs it, packages that tell whether it is there. (Backends and cameras have rows of their own.)
_EXTRAS = (
    ("export", "std-rt export and bundles unpack", ("torch", "diffusers", "onnxscript")),
    ("train", "std-rt train and evaluate --teacher", ("torch", "diffusers", "accelerate", "peft")),
    ("int8", "export --precision int8", ("nncf",)),
    ("text", "--prompt", ("tokenizers",)),
    ("serve", "std-rt serve", ("starlette", "uvicorn", "websockets", "python_multipart")),
    ("webrtc", "the camera of std-rt serve by WebRTC", ("aiortc",)),
    ("bulk", "std-rt bulk", ("ray",)),
    ("photos", "HEIC and JPEG XL", ("pillow_heif", "pillow_jxl")),
)
_LITTLE_MEMORY_GB, _LITTLE_DISK_GB = 2.0, 1.0  # less than the built-in model needs with some room to spare

Row = tuple[str, str, str]  # mark, name, detail
_GOOD, _BAD, _NOTE = "[green]ok[/]", "[red]!![/]", "[dim]--[/]"


def doctor(
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu", help="Test every GPU backend with the built-in model: two minutes, one JSON line."
        ),
    ] = False,
) -> None:
    """Show what is installed and how to add what is missing.

    Exits with 1 if `std-rt stylize` cannot run, or with --gpu if a GPU backend that is installed fails.
    """
    if gpu:
        raise typer.Exit(_test_gpus())
    from std_rt.core.bundle import BUILT_IN, Bundle, list_bundles
    from std_rt.engines import backends

    found, known = backends(probe=True), list_bundles()
    rows = [
        *_system(),
        *_gpus(),
        *_backends(found),
        *_packages(),
        *_extras(),
        *_cache(),
        *_bundles(known),
        *_cameras(),
    ]
    print_table((mark, f"[bold]{name}[/]", escape(detail)) for mark, name, detail in rows)
    built_in = any(isinstance(item, Bundle) and item.name == BUILT_IN for item in known)
    raise typer.Exit(0 if built_in and any(info.available for info in found) else 1)


def _test_gpus() -> int:
    """Print the table and the JSON line of the self-test; 1 if a backend fails."""
    from rich.console import Console

    from std_rt.evaluation.gpu_check import check_gpu

    console = Console(stderr=True)
    with console.status("looking for a GPU") as status:
        found = check_gpu(status.update)
    typer.echo(f"{'; '.join(found['gpus'])}; the driver supports CUDA {found['cuda']}")
    titles = ("", "backend", "opens s", "ms", "p95", "differs", "one graph", "MB", "TFLOP/s", "")
    keys = (
        "open_s",
        "frame_ms",
        "p95_ms",
        "difference",
        "one_graph",
        "memory_mb",
        "matrix_tflops",
        "problem",
    )
    rows, failed = [], 0
    for name, result in found["backends"].items():
        cells = (escape(str(result.get(key, "-"))) for key in keys)
        missing = result["problem"].startswith("not installed")
        failed += bool(result["problem"]) and not missing
        rows.append((_NOTE if missing else _BAD if result["problem"] else _GOOD, name, *cells))
    print_table(rows, titles)
    typer.echo(json.dumps(found))
    return int(failed > 0)


def _system() -> Iterator[Row]:
    from std_rt.core.files import cache_root

    yield _GOOD, "std-rt", __version__
    yield _GOOD, "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield _GOOD, "machine", str(describe_machine())
    memory, disk = available_memory_gb(), free_disk_gb(cache_root() or Path.cwd())
    if memory is not None:
        mark = _GOOD if memory >= _LITTLE_MEMORY_GB else _BAD
        yield mark, "memory", f"{memory:.1f} GB free (exporting SDXL takes about 15)"
    yield _GOOD if disk >= _LITTLE_DISK_GB else _BAD, "disk", f"{disk:.1f} GB free on the disk of the cache"


def _gpus() -> Iterator[Row]:
    from std_rt.engines.gpu.probe import probe
    from std_rt.engines.registry import BACKENDS, GPU_BACKENDS

    found = probe()
    if found.problem is not None:
        # A broken driver matters only to someone who installed a backend for it.
        wanted = any(find_spec(BACKENDS[name].package) for name in GPU_BACKENDS if name != "cuda")
        broken = "no NVIDIA driver" not in found.problem
        yield _BAD if wanted and broken else _NOTE, "gpu", found.problem
        return
    for index, gpu in enumerate(found.gpus):
        usable = [name for name, known in GPU_BACKENDS.items() if not known or gpu.sm in known]
        others = ", ".join(name for name in GPU_BACKENDS if name not in usable)
        known_to = f"for {', '.join(usable)}" + (f" (not {others})" if others else "")
        name = f"cuda:{index}" if len(found.gpus) > 1 else "gpu"
        yield _GOOD, name, f"{gpu}; {known_to}; the driver supports CUDA {found.cuda}"


def _backends(found: Sequence[BackendInfo]) -> Iterator[Row]:
    for info in found:
        add = "" if info.available or info.problem else f"; to add it: {info.install}"
        yield _GOOD if info.available else _NOTE, info.name, f"{info.detail}{add}"
    if not any(info.available for info in found):
        yield _BAD, "backends", f"none is installed; run: {found[0].install}"


def _packages() -> Iterator[Row]:
    """Libraries that onnxruntime-gpu lacks, and packages that overwrite each other."""
    from importlib import metadata

    from std_rt.engines.gpu.libraries import missing_libraries

    missing = missing_libraries()
    if missing:
        lacks = ", ".join(missing)
        yield _BAD, "cuda", f"onnxruntime-gpu does not find {lacks}; run: {install_hint('cuda')}"
    installed = {str(found.metadata["Name"]).lower() for found in metadata.distributions()}
    for first, second in _RIVALS:
        if {first, second} <= installed:
            fix = f"pip uninstall {first} {second}, then install the one you want"
            yield _BAD, "packages", f"{first} and {second} overwrite each other; run: {fix}"


def _extras() -> Iterator[Row]:
    """Commands that need more packages than the runtime, and how to add them."""
    for extra, what, modules in _EXTRAS:
        missing = [name for name in modules if find_spec(name) is None]
        if missing:
            yield _NOTE, extra, f"for {what}: not installed; to add it: {install_hint(extra)}"


def _cache() -> Iterator[Row]:
    """The cache, and the engines compiled for this machine, if any."""
    from std_rt.core.files import cache_root
    from std_rt.engines.cache import EngineCache

    root = cache_root()
    if root is None:
        problem = "no writable folder, so every start compiles again"
        yield _BAD, "cache", f"{problem}; set STD_RT_CACHE to a folder"
        return
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    yield _GOOD, "cache", f"{root} ({size / 2**20:.0f} MB; safe to delete)"
    if not (root / "engines" / "manifest.json").is_file():
        return  # opening the store would create one
    try:
        cache = EngineCache.open()
        entries = [] if cache is None else cache.entries()
    except BackendError as error:
        yield _BAD, "engines", str(error)
        return
    megabytes = sum(entry.size for entry in entries) / 2**20
    products = ", ".join(sorted({f"{entry.key.product} {entry.key.version}" for entry in entries}))
    found = f"{len(entries)} compiled ({megabytes:.0f} MB)" + (f" for {products}" if products else "")
    yield _GOOD, "engines", f"{found}; check: std-rt engines verify"


def _bundles(known: Sequence[Bundle | tuple[str, Exception]]) -> Iterator[Row]:
    from std_rt.core.bundle import BUILT_IN, search_paths

    for item in known:
        if isinstance(item, tuple):
            yield _BAD, "bundle", f"{item[0]}: {item[1]}"
        else:
            yield _GOOD, "bundle", f"{item.name} ({item.total_bytes / 2**20:.1f} MB) in {item.path}"
            if item.name == BUILT_IN:
                yield from _precision(item)
    if BUILT_IN not in [item[0] if isinstance(item, tuple) else item.name for item in known]:
        yield _BAD, "bundle", f"{BUILT_IN} is missing; run: {install_hint()} --force-reinstall --no-deps"
    yield _NOTE, "bundles", f"also looked in {', '.join(str(path) for path in search_paths())}"


def _precision(bundle: Bundle) -> Iterator[Row]:
    """What ``--precision auto`` is for a bundle here, and why."""
    from std_rt.engines.registry import choose_backend, choose_form

    try:
        backend, _ = choose_backend()
        form, why = choose_form(backend, "auto", bundle.forms)
    except BackendError:
        return  # listed as a backend that is missing
    in_bf16 = form == "fp32" and fastest_arithmetic(describe_machine())[0] == "bf16"
    yield _GOOD, "precision", f"{'bf16' if in_bf16 and backend == 'openvino' else form}: {why}"


def _cameras() -> Iterator[Row]:
    from std_rt.media.camera.device import list_cameras

    found = list_cameras()
    none = "none found" if sys.platform == "linux" else "not listed here; `std-rt live` tries the first one"
    yield _GOOD if found else _NOTE, "cameras", ", ".join(found) or none
    if find_spec("pyvirtualcam") is None:
        add = f"to add it: {install_hint('live')}"
        yield _NOTE, "virtual camera", f"pyvirtualcam is not installed; {add}"
    else:
        yield _GOOD, "virtual camera", "pyvirtualcam is installed"
