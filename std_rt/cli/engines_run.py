"""What `std-rt engines` does: see `cli.engines` for its commands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from std_rt.cli.stylize import check_size
from std_rt.core.bundle import Bundle, list_bundles, load_bundle
from std_rt.core.errors import BackendError, UsageError
from std_rt.engines.cache import MEND, Dropped, EngineStore, Entry
from std_rt.engines.cuda.driver import cuda_device, driver_problem
from std_rt.engines.program import Program, Runner
from std_rt.engines.registry import BACKENDS, PRECISIONS, Engine, GraphSpec, open_engine
from std_rt.engines.tensorrt.build import RTX, TENSORRT, BuildOptions, Product, load_product
from std_rt.engines.tensorrt.maker import EngineMaker, launch_specs, same_engine
from std_rt.pipeline.openers import Openers
from std_rt.pipeline.stylizer import Stylizer

__all__ = ["Plan", "Wanted", "build", "collect", "plan", "show_list", "verify"]

_PRODUCTS = {"rtx": RTX, "tensorrt": TENSORRT}
_PLAN_S = 120.0


@dataclass(frozen=True)
class Wanted:
    """What to build; None and empty as `Stylizer.load` has them. ``frame`` (H, W) of the frames to come."""

    bundle: str | None = None
    backend: str = "rtx"
    size: int | tuple[int, int] | None = None
    frame: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_mode: str | None = None
    precision: str = "auto"
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a stylizer opens: the program of a frame, its graphs, and the style encoder."""

    program: Program
    specs: dict[str, GraphSpec]
    style: GraphSpec

    def engines(self, *, glue: bool) -> list[GraphSpec]:
        """One for every engine needed, the largest file first; ``glue``: with those between the graphs."""
        specs = launch_specs(self.program, self.specs) if glue else list(self.specs.values())
        unique = {same_engine(spec): spec for spec in [*specs, self.style]}
        return sorted(unique.values(), key=lambda spec: spec.path.stat().st_size, reverse=True)


def show_list() -> None:
    """One row an engine, and their sum."""
    store = _store()
    entries = sorted(store.entries(), key=lambda entry: (entry.key.bundle, entry.key.graph))
    if not entries:
        typer.echo(f"no engines in {store.folder}")
        return
    names = _bundle_names()
    table = Table(box=None, pad_edge=False)
    for title in ("bundle", "graph", "input", "product", "for", "MB", "built (UTC)"):
        table.add_column(title, overflow="fold")
    for entry in entries:
        table.add_row(*_row(entry, names))
    Console().print(table)
    total = sum(entry.size for entry in entries)
    typer.echo(f"{len(entries)} engines, {total / 2**20:.1f} MB in {store.folder}")


def build(wanted: Wanted) -> None:
    """Build, or say what is there already. Raises BackendError, BundleError or UsageError."""
    if wanted.backend not in (*_PRODUCTS, "openvino"):
        if wanted.backend in BACKENDS:
            raise UsageError(
                f"backend '{wanted.backend}' keeps no engines; use --backend rtx, tensorrt or openvino"
            )
        raise UsageError(f"there is no backend '{wanted.backend}'; use --backend rtx, tensorrt or openvino")
    if wanted.targets and wanted.backend != "rtx":
        raise UsageError("only rtx builds for GPUs that are not there; leave out --sm, or use --backend rtx")
    store = _store()
    ready = plan(wanted)
    if wanted.backend in _PRODUCTS:
        _build_ahead(wanted, ready, store)
    else:
        _open_once(wanted, ready)


def plan(wanted: Wanted) -> Plan:
    """Ask a stylizer what it would open, and open nothing."""
    if wanted.precision not in PRECISIONS:
        raise UsageError(f"--precision must be one of {', '.join(PRECISIONS)}, got {wanted.precision!r}")
    program: Future[tuple[Program, dict[str, GraphSpec]]] = Future()
    style: Future[GraphSpec] = Future()

    def open_graph(spec: GraphSpec) -> Engine:
        style.set_result(spec)
        return cast(Engine, _Nothing())

    def open_runner(asked: Program, specs: dict[str, GraphSpec]) -> Runner:
        program.set_result((asked, specs))
        return cast(Runner, _Nothing())

    bundle = load_bundle(wanted.bundle)
    with Stylizer(
        bundle,
        Openers(open_graph, open_graph, open_runner),
        size=wanted.size,
        steps=wanted.steps,
        guidance=wanted.guidance,
        guidance_mode=wanted.guidance_mode,
    ) as stylizer:
        check_size(stylizer, wanted.size)
        stylizer.prepare(*(wanted.frame or _square(wanted, bundle)))
        return Plan(*program.result(_PLAN_S), style.result(_PLAN_S))


def verify() -> None:
    """Print one line a problem; BackendError where there are any."""
    store = _store()
    problems = store.verify()
    for problem in problems:
        typer.echo(problem)
    count = len(store.entries())
    if problems:
        raise BackendError(
            f"{len(problems)} of {count} engines and files are not as built, in {store.folder}; run: {MEND}"
        )
    typer.echo(f"{count} engines in {store.folder}, all as built")


def collect(older_than_days: float | None, *, everything: bool, dry_run: bool) -> None:
    """Remove (or only name) what is of no use any more."""
    store = _store()
    dropped = store.gc(
        _bundles_there(store),
        versions=_versions(),
        drivers={} if driver_problem() else dict.fromkeys(_modules(), cuda_device().driver),
        older_than_days=older_than_days,
        everything=everything,
        dry_run=dry_run,
    )
    for item in dropped:
        typer.echo(f"{item.name}: {item.why} ({item.size / 2**20:.1f} MB)")
    typer.echo(_summary(dropped, store, dry_run))


class _Nothing:
    """Stands for what was not opened."""

    def close(self) -> None:
        """Nothing to free."""


def _build_ahead(wanted: Wanted, ready: Plan, store: EngineStore) -> None:
    product = _PRODUCTS[wanted.backend]
    trt = load_product(product)
    targets, driver = _where(wanted, product)
    with _Bars() as (report, done):
        maker = EngineMaker(
            trt,
            product,
            targets,
            driver=driver,
            options=BuildOptions(tf32=wanted.precision != "fp32"),
            store=store,
            progress=report,
        )
        for spec in ready.engines(glue=True):
            there, started = maker.find(spec), time.perf_counter()
            path = there or maker.ensure(spec)
            took = "was there" if there else f"built in {time.perf_counter() - started:.1f} s"
            done(spec.name, f"{'+'.join(targets)}, {path.stat().st_size / 2**20:.1f} MB, {took}")


def _open_once(wanted: Wanted, ready: Plan) -> None:
    """For backends that keep what they compile when a graph is opened."""
    with _Bars() as (report, done):
        for spec in ready.engines(glue=False):
            started = time.perf_counter()
            report(spec.name, 0.0)
            engine = open_engine(wanted.backend, spec, wanted.precision)
            engine.close()
            done(spec.name, f"{engine.precision}, opened in {time.perf_counter() - started:.1f} s")


def _where(wanted: Wanted, product: Product) -> tuple[tuple[str, ...], str]:
    """(targets, driver): those asked for, or the GPU here."""
    if wanted.targets:
        return wanted.targets, ""
    problem = driver_problem()
    if problem:
        way = (
            "name GPUs to build for, as --sm 89,120" if product.ahead else "build on the machine that has it"
        )
        raise BackendError(f"there is no GPU here to build for: {problem}; {way}")
    return (f"sm{cuda_device().gpu.sm}",), cuda_device().driver


class _Bars:
    """One bar an engine on a terminal, one line each when it is done."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        self._bars = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> tuple[Callable[[str, float], None], Callable[[str, str], None]]:
        self._bars.start()
        return self._report, self._done

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def _report(self, name: str, share: float) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=1.0)
        self._bars.update(self._tasks[name], completed=share)

    def _done(self, name: str, what: str) -> None:
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))
        typer.echo(f"{name}: {what}")


def _store() -> EngineStore:
    store = EngineStore.open()
    if store is None:
        raise BackendError(
            "there is no folder to keep engines in; set STD_RT_CACHE and STD_RT_DATA to folders"
        )
    return store


def _square(wanted: Wanted, bundle: Bundle) -> tuple[int, int]:
    """The frame that has the working size itself."""
    size = wanted.size or bundle.size_default
    return (size, size) if isinstance(size, int) else size


def _row(entry: Entry, names: dict[str, str]) -> tuple[str, ...]:
    key = entry.key
    shape = next(iter(key.shapes.values()), ())  # the first input's says the size
    return (
        names.get(key.bundle, Path(entry.origin).name if entry.origin else key.bundle[:8]),
        key.graph,
        "x".join(map(str, shape)),
        f"{key.product} {key.version.partition('-')[0]}",
        " ".join(part for part in (key.target.partition(" (")[0], key.driver) if part),
        f"{entry.size / 2**20:.1f}",
        entry.created[:16].replace("T", " "),
    )


def _bundle_names() -> dict[str, str]:
    return {bundle.digest: bundle.name for bundle in list_bundles() if isinstance(bundle, Bundle)}


def _bundles_there(store: EngineStore) -> set[str]:
    """Digests of all bundles in reach, and of those in folders that engines were built from."""
    there = set(_bundle_names())
    if _unreadable(store):
        return there
    for origin in {entry.origin for entry in store.entries() if entry.origin}:
        try:
            manifest = json.loads((Path(origin) / "manifest.json").read_text(encoding="utf-8"))
            there.add(str(manifest["manifest_sha256"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no bundle there any more
    return there


def _unreadable(store: EngineStore) -> bool:
    try:
        store.entries()
    except BackendError:
        return True
    return False


def _modules() -> Collection[str]:
    return [product.module for product in _PRODUCTS.values()]


def _versions() -> dict[str, str]:
    """Versions of the installed products; of one that is not, engines stay."""
    versions = {}
    for product in _PRODUCTS.values():
        if find_spec(product.module) is not None:
            versions[product.module] = str(load_product(product).__version__)
    if find_spec("openvino") is not None:
        versions["openvino"] = str(import_module("openvino").__version__)
    return versions


def _summary(dropped: list[Dropped], store: EngineStore, dry_run: bool) -> str:
    if not dropped:
        return f"nothing to remove in {store.folder}"
    freed = sum(item.size for item in dropped) / 2**20
    verb = "would be removed" if dry_run else "removed"
    return f"{len(dropped)} {verb}, {freed:.1f} MB"
