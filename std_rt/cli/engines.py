"""`std-rt engines list | build | verify | gc`: the engines compiled for this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from std_rt.cli.options import SizeOption, StepsOption, parse_size
from std_rt.cli.terminal import print_table, say
from std_rt.core.errors import BackendError, UsageError

if TYPE_CHECKING:
    from std_rt.engines import GraphSpec
    from std_rt.engines.cache import EngineCache, Entry
    from std_rt.engines.program import Program

__all__ = ["Plan", "engines_app", "plan"]

Size = int | tuple[int, int]
_DAY_S = 86400.0

engines_app = typer.Typer(
    help="List, build, verify and clean up the engines compiled on this machine.", no_args_is_help=True
)


@engines_app.command("list")
def engines_list() -> None:
    """List every engine of this machine: its bundle, graph, GPU and size."""
    cache = _cache()
    entries = sorted(cache.entries(), key=lambda entry: (entry.key.bundle, entry.key.graph))
    if not entries:
        typer.echo(f"no engines in {cache.folder}")
        return
    names = _bundle_names()
    titles = ("bundle", "graph", "input", "product", "for", "MB", "built (UTC)")
    print_table((_row(entry, names) for entry in entries), titles)
    total = sum(entry.size for entry in entries)
    typer.echo(f"{len(entries)} engines, {total / 2**20:.1f} MB in {cache.folder}")


@engines_app.command("build")
def engines_build(
    bundle: Annotated[str | None, typer.Argument(metavar="NAME|FOLDER")] = None,
    backend: Annotated[str, typer.Option("--backend", help="rtx, tensorrt or openvino.")] = "rtx",
    size: SizeOption = None,
    frame: Annotated[
        str | None,
        typer.Option("--frame", metavar="WxH", help="Frame size; default: the working size."),
    ] = None,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Guidance scale; 1 disables guidance. Default: the bundle's."),
    ] = None,
    guidance_mode: Annotated[
        str | None, typer.Option("--guidance-mode", help="none, full or residual.")
    ] = None,
    vae: Annotated[str, typer.Option("--vae", help="full, or tiny as `std-rt live` uses it.")] = "full",
    precision: Annotated[
        str, typer.Option("--precision", help="auto; on GPUs fp32 (no TF32) or fp8; on CPUs bf16 or int8.")
    ] = "auto",
    sm: Annotated[
        str,
        typer.Option("--sm", metavar="89,120", help="GPUs to build rtx engines for; default: the one here."),
    ] = "",
) -> None:
    """Build the engines a bundle needs at a size ahead of time, so that the first frame does not wait.

    std-rt engines build my-bundle --backend rtx --size 512 --sm 89,120
    """
    from std_rt.core.bundle import load_bundle
    from std_rt.engines.registry import BACKENDS, PRECISIONS, choose_form, in_form

    if backend not in ("rtx", "tensorrt", "openvino"):
        known = backend in BACKENDS
        why = f"backend '{backend}' keeps no engines" if known else f"there is no backend '{backend}'"
        raise UsageError(f"{why}; use --backend rtx, tensorrt or openvino")
    targets = _targets(sm)
    if targets and backend != "rtx":
        raise UsageError(
            "only rtx builds engines for GPUs in other machines; leave out --sm, or use --backend rtx"
        )
    if precision not in PRECISIONS:
        raise UsageError(f"--precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    opened = load_bundle(bundle)
    opened.check_precision(precision)
    choose_form(backend, precision, opened.forms)  # raises if the backend cannot run it
    cache = _cache()
    wanted = plan(bundle, parse_size(size), parse_size(frame), steps, guidance, guidance_mode, vae)
    if backend == "openvino":
        _open_once(wanted.engines(glue=False), precision)
    else:
        specs = [in_form(backend, spec, precision)[0] for spec in wanted.engines(glue=True)]
        _build_ahead(backend, specs, precision, targets, cache)


@engines_app.command("verify")
def engines_verify() -> None:
    """Hash every engine against this machine's list; exit 2 if one has changed."""
    from std_rt.engines.cache import CLEAN_UP

    cache = _cache()
    problems = cache.verify()
    for problem in problems:
        typer.echo(problem)
    count = len(cache.entries())
    if problems:
        raise BackendError(
            f"{len(problems)} of {count} engines and files are not as built, in {cache.folder}; "
            f"run: {CLEAN_UP}"
        )
    typer.echo(f"{count} engines in {cache.folder}, all as built")


@engines_app.command("gc")
def engines_gc(
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", metavar="DAYS", min=0, help="Also engines unused for this many days."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All engines.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be removed.")] = False,
) -> None:
    """Remove engines that can no longer be used.

    They were altered, or built for a missing bundle, another version or another driver.
    """
    from std_rt.engines.gpu.driver import cuda_device, driver_problem

    cache = _cache()
    bundles, versions = _bundle_digests(cache), _installed_versions()
    driver = "" if driver_problem() else cuda_device().driver

    def unused(entry: Entry) -> str:
        if everything:
            return "asked for"
        days = (time.time() - cache.path(entry.key).stat().st_mtime) / _DAY_S
        if older_than is not None and days > older_than:
            return f"not used for {days:.0f} days"
        return why_unused(entry, bundles, versions, driver)

    removed = cache.gc(unused, dry_run=dry_run)
    for item in removed:
        typer.echo(f"{item.name}: {item.why} ({item.size / 2**20:.1f} MB)")
    if removed:
        freed = sum(item.size for item in removed) / 2**20
        typer.echo(f"{len(removed)} {'would be removed' if dry_run else 'removed'}, {freed:.1f} MB")
    else:
        typer.echo(f"nothing to remove in {cache.folder}")


def why_unused(entry: Entry, bundles: Collection[str], versions: Mapping[str, str], driver: str) -> str:
    """Why nothing here can use an engine, or "".

    ``bundles``: digests of all bundles found. ``versions``: of the installed products (engines of a product
    that is not installed stay). ``driver``: the GPU's, or "".
    """
    key = entry.key
    if key.bundle and key.bundle not in bundles:
        return "its bundle is no longer there"
    if versions.get(key.product, key.version) != key.version:
        return f"for {key.product} {key.version}, installed is {versions[key.product]}"
    if driver and key.driver and key.driver != driver:
        return f"for driver {key.driver}, installed is {driver}"
    return ""


@dataclass(frozen=True)
class Plan:
    """What a stylizer opens: the program of a frame, its graphs, and the style encoder."""

    program: Program
    specs: dict[str, GraphSpec]
    style: GraphSpec

    def engines(self, *, glue: bool) -> list[GraphSpec]:
        """The graphs to build engines for, largest file first; ``glue``: with those between the model's."""
        from std_rt.engines.program import launch_specs

        specs = launch_specs(self.program, self.specs) if glue else list(self.specs.values())
        unique = {spec.identity: spec for spec in [*specs, self.style]}
        return sorted(unique.values(), key=lambda spec: spec.path.stat().st_size, reverse=True)


def plan(
    bundle: str | None,
    size: Size | None = None,
    frame: Size | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_mode: str | None = None,
    vae: str = "full",
) -> Plan:
    """What a stylizer would open for frames of a size; nothing is opened.

    ``frame`` is the frames' (H, W), default the working size; the rest as in `Stylizer.load`.
    """
    from std_rt.core.bundle import load_bundle
    from std_rt.pipeline.openers import Openers, graph_spec, program_for
    from std_rt.pipeline.runner_cache import RunnerKey
    from std_rt.pipeline.stylizer import Stylizer

    def refuse(*_: object) -> Any:
        raise AssertionError("a plan opens nothing")

    opened = load_bundle(bundle)
    with Stylizer(
        opened,
        Openers(refuse, refuse, refuse),
        size=size,
        steps=steps,
        guidance=guidance,
        guidance_mode=guidance_mode,
        vae=vae,
    ) as stylizer:
        coming = frame or size or opened.size_default
        key = RunnerKey(stylizer.quality(*((coming, coming) if isinstance(coming, int) else coming)))
        text = {name: value.shape[1:] for name, value in opened.conditioning().items()}
        style = graph_spec(opened, "style_encoder", {"style_image": (1, 3, *[opened.style_px] * 2)})
        return Plan(*program_for(opened, key, stylizer.guidance, text, vae), style)


def _targets(text: str) -> tuple[str, ...]:
    """``89,sm120`` -> ("sm89", "sm120"). Raises BadParameter on anything else."""
    names = [
        name.strip().lower().removeprefix("sm").replace(".", "") for name in text.split(",") if name.strip()
    ]
    if not all(name.isdecimal() for name in names):
        raise typer.BadParameter(f"{text!r} names no GPUs; use compute capabilities such as --sm 89,120")
    return tuple(dict.fromkeys(f"sm{name}" for name in names))


def _build_ahead(
    backend: str, specs: list[GraphSpec], precision: str, targets: tuple[str, ...], cache: EngineCache
) -> None:
    """For TensorRT and TensorRT-RTX; without targets, for the GPU here."""
    from std_rt.engines.gpu.driver import cuda_device, driver_problem
    from std_rt.engines.tensorrt.engine_builder import EngineBuilder
    from std_rt.engines.tensorrt.onnx_to_engine import PRODUCTS, load_product

    product = PRODUCTS[backend]
    trt = load_product(product)
    driver = ""
    if not targets:
        problem = driver_problem()
        if problem:
            ahead = "name the GPUs to build for, as in --sm 89,120"
            advice = ahead if product.ahead else "build on the machine that has it"
            raise BackendError(f"there is no GPU here to build for: {problem}; {advice}")
        targets, driver = (f"sm{cuda_device().gpu.sm}",), cuda_device().driver
    tf32 = precision != "fp32"
    with _bars() as (report, done):
        builder = EngineBuilder(trt, product, targets, driver=driver, tf32=tf32, cache=cache, progress=report)
        for spec in specs:
            started = time.perf_counter()
            found = builder.find(spec)
            path = found or builder.ensure(spec)
            took = "was there" if found else f"built in {time.perf_counter() - started:.1f} s"
            done(spec.name, f"{'+'.join(targets)}, {path.stat().st_size / 2**20:.1f} MB, {took}")


def _open_once(specs: list[GraphSpec], precision: str) -> None:
    """For OpenVINO, which keeps what it compiles when a graph is opened."""
    from std_rt.engines import open_engine

    with _bars() as (report, done):
        for spec in specs:
            started = time.perf_counter()
            report(spec.name, 0.0)
            engine = open_engine("openvino", spec, precision)
            engine.close()
            done(spec.name, f"{engine.precision}, opened in {time.perf_counter() - started:.1f} s")


@contextmanager
def _bars() -> Iterator[tuple[Callable[[str, float], None], Callable[[str, str], None]]]:
    """(report progress, report completion): one bar per engine on a terminal, one line when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    tasks: dict[str, Any] = {}
    console = Console(stderr=True)
    hidden = not console.is_interactive
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=hidden) as bars:

        def report(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=1.0)
            bars.update(tasks[name], completed=share)

        def done(name: str, what: str) -> None:
            if name in tasks:
                bars.remove_task(tasks.pop(name))
            say(f"{name}: {what}", bars)

        yield report, done


def _cache() -> EngineCache:
    from std_rt.engines.cache import EngineCache

    cache = EngineCache.open()
    if cache is None:
        raise BackendError(
            "there is no writable folder for engines; set STD_RT_CACHE and STD_RT_DATA to folders"
        )
    return cache


def _row(entry: Entry, names: Mapping[str, str]) -> tuple[str, ...]:
    from std_rt.core.bundle import QUANTIZED

    key = entry.key
    shape = next(iter(key.shapes.values()), ())  # the first input's shows the size
    return (
        names.get(key.bundle, Path(entry.origin).name if entry.origin else key.bundle[:8]),
        " ".join([key.graph, *(part for part in key.flags.split() if part in QUANTIZED)]),
        "x".join(map(str, shape)),
        f"{key.product} {key.version.partition('-')[0]}",
        " ".join(part for part in (key.target.partition(" (")[0], key.driver) if part),
        f"{entry.size / 2**20:.1f}",
        entry.created[:16].replace("T", " "),
    )


def _bundle_names() -> dict[str, str]:
    from std_rt.core.bundle import Bundle, list_bundles

    return {bundle.digest: bundle.name for bundle in list_bundles() if isinstance(bundle, Bundle)}


def _bundle_digests(cache: EngineCache) -> set[str]:
    """Digests of all bundles found, and of those in folders that engines were built from."""
    digests = set(_bundle_names())
    try:
        origins = {entry.origin for entry in cache.entries() if entry.origin}
    except BackendError:
        return digests  # gc removes the unreadable list itself
    for origin in origins:
        try:
            manifest = json.loads((Path(origin) / "manifest.json").read_text(encoding="utf-8"))
            digests.add(str(manifest["manifest_sha256"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no bundle there any more
    return digests


def _installed_versions() -> dict[str, str]:
    from std_rt.engines.tensorrt.onnx_to_engine import PRODUCTS, load_product

    versions = {
        product.module: str(load_product(product).__version__)
        for product in PRODUCTS.values()
        if find_spec(product.module) is not None
    }
    if find_spec("openvino") is not None:
        versions["openvino"] = str(import_module("openvino").__version__)
    return versions
