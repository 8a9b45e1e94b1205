"""`std-rt bulk`: many pictures and clips on Ray Data, on one machine or a cluster.

Exits with 1 if an item failed (all others are made), 130 if Ctrl-C or SIGTERM ended it; the same command goes
on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Argument, BadParameter, Option

from std_rt.cli.options import StylizerFlags, TemporalOption, parse_size
from std_rt.cli.terminal import note, progress_lines, say
from std_rt.core.errors import MediaError, UsageError
from std_rt.core.signals import ended_as_by_ctrl_c

if TYPE_CHECKING:
    from std_rt.bulk.job import Report
    from std_rt.bulk.manifest import Manifest
    from std_rt.bulk.options import BulkOptions
    from std_rt.bulk.plan import Wish

__all__ = ["BulkRequest", "bulk"]

_FLUSH_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class BulkRequest(StylizerFlags):
    """What ``std-rt bulk`` was asked to do."""

    inputs: Annotated[
        list[str],
        Argument(
            metavar="INPUT...",
            help="Pictures, clips, folders with all below them, 'patterns/**/*.jpg', lists (.txt; .csv and "
            ".parquet with columns input, style, strength); paths or addresses such as s3://bucket/folder.",
        ),
    ]
    style: Annotated[
        list[str] | None,
        Option("--style", "-s", metavar="PICTURE", help="Picture or style file; each input in each of them."),
    ] = None
    output: Annotated[
        str,
        Option(
            "--output", "-o", metavar="FOLDER", help="An empty folder, or that of an earlier run: it goes on."
        ),
    ]
    address: Annotated[
        str | None,
        Option(metavar="HOST:PORT|auto", help="A running Ray cluster. Default: this machine alone."),
    ] = None
    cores: Annotated[
        int, Option(min=0, help="Processor cores for each engine. Default: all of a machine, 8 at most.")
    ] = 0
    per_call: Annotated[
        int,
        Option(
            min=0,
            max=64,
            help="Pictures of one size in a call of the engine. Default: what it is fastest at.",
        ),
    ] = 0
    max_failures: Annotated[
        int | None, Option(min=0, help="Stop after more failures than this. Default: never.")
    ] = None
    upscale: Annotated[
        bool, Option("--upscale", help="Bring results back to the size of their input, along its edges.")
    ] = False
    temporal: TemporalOption = "full"
    segment_seconds: Annotated[
        float | None,
        Option(
            min=0,
            metavar="SECONDS",
            help="With --temporal off: cut clips at key frames into segments of at least this, for several "
            "engines to share and a later run to go on in the middle; 0: never. Default: 60 with several "
            "engines.",
        ),
    ] = None
    sound: Annotated[str, Option(metavar="auto|copy|convert|drop", help="Sound of clips.")] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sound not in ("auto", "copy", "convert", "drop"):
            raise BadParameter(f"--sound must be one of auto, copy, convert, drop, got {self.sound!r}")
        if self.segment_seconds and self.temporal != "off":
            raise UsageError(
                f"--segment-seconds needs --temporal off, got {self.temporal}, which needs the frames before"
            )
        if self.overwrite or self.build_in_background:
            flag = "--overwrite" if self.overwrite else "--build-in-background"
            raise UsageError(f"bulk has no {flag}: finished items stay; delete the folder to make them again")


def bulk(request: BulkRequest) -> int:
    """Stylize many pictures and clips on Ray Data, on one machine or a cluster; run again, it goes on.

    std-rt bulk photos/ --style art.png -o styled

    std-rt bulk 's3://bucket/frames/**/*.png' -s a.png -s b.png -o s3://bucket/styled --address auto

    std-rt bulk list.csv -o styled
    """
    from std_rt.core.machine import require

    require("std-rt bulk", "bulk", "ray", "pyarrow", "fsspec")
    from std_rt.bulk import places
    from std_rt.bulk.plan import wishes

    console = Console(stderr=True)
    out = places.absolute(request.output)
    options = _options(request)
    found = wishes(request.inputs, request.style or [], request.style_strength, out=out)
    with ended_as_by_ctrl_c("SIGTERM", "SIGHUP"), _alone(out):
        return _bulk(request, options, found, out, console)


def _options(request: BulkRequest) -> BulkOptions:
    """The request as workers get it. Raises StdRtError if the bundle cannot do it."""
    from std_rt.bulk import BulkOptions, places
    from std_rt.core.bundle import BUILT_IN, load_bundle
    from std_rt.engines.registry import choose_backend, choose_form
    from std_rt.pipeline.style_file import open_styles

    bundle = load_bundle(request.bundle)
    bundle.check_precision(request.precision)
    bundle.check_strength(request.style_strength)
    size = parse_size(request.size)
    bundle.check_size(size)
    bundle.coefficients(request.steps)
    if request.address is None:
        choose_form(choose_backend(request.backend)[0], request.precision, bundle.forms)
    for style in request.style or ():
        with places.fetched(style) as path:
            open_styles([(path, 1.0)], bundle, request.stroke_size)
    is_built_in = bundle.name == BUILT_IN and request.bundle is None
    return BulkOptions(
        bundle=None if is_built_in else places.absolute(str(bundle.path)),
        digest=bundle.digest,
        size=size,
        **{
            name: getattr(request, name)
            for name in (
                *("backend", "steps", "precision", "guidance", "guidance_mode", "prompt", "negative_prompt"),
                *("stroke_size", "keep_colours", "seed", "upscale", "temporal", "sound", "per_call", "cores"),
                "segment_seconds",
            )
        },
    )


def _bulk(request: BulkRequest, options: BulkOptions, found: list[Wish], out: str, console: Console) -> int:
    from std_rt.bulk import places
    from std_rt.bulk.cluster import connected, engines_for
    from std_rt.bulk.job import Job, run
    from std_rt.bulk.manifest import Manifest
    from std_rt.bulk.plan import items
    from std_rt.core.bundle import load_bundle

    bundle = load_bundle(options.bundle, verify=False)
    manifest = Manifest(out)
    there = places.listed(out)
    if there and not manifest.exists:
        raise MediaError(f"{out} holds files that are not of std-rt bulk; give an empty folder with -o")
    plan = items(found, options.made_by(), manifest.taken)
    todo = manifest.unfinished(plan, there)
    if todo.num_rows < plan.num_rows:
        note(console, f"{plan.num_rows - todo.num_rows} of {plan.num_rows} are finished already")
    manifest.begin()
    manifest.flush()
    if not todo.num_rows:
        return 0
    with connected(request.address):
        job = Job(todo, options, bundle, out, engines_for(options.backend, options.cores))
        note(console, f"{bundle.name}, {todo.num_rows} to make, {_told(job.engines.count, 'engine')}")
        with _shown(console, todo.num_rows) as show, _recorded(manifest, console) as record:

            def take(rows: list[Mapping[str, Any]], report: Report) -> bool:
                record(rows)
                show(report)
                return request.max_failures is None or report.failed <= request.max_failures

            try:
                report = run(job, take)
            finally:
                places.sweep(out)
    report.done -= manifest.removed
    if manifest.removed:
        report.disk_is_full = True
        note(console, f"note: {_told(manifest.removed, 'result')} removed again, to make room for the record")
    return _tell_end(report, request, out, console)


def _alone(out: str) -> AbstractContextManager[None]:
    """One command at a time writes to a folder. Raises MediaError if another does, or it cannot be made."""
    from std_rt.bulk import places
    from std_rt.core.files import alone

    if places.is_address(out):
        return nullcontext()
    busy = f"another std-rt bulk writes to {out}; wait for it, or give another folder"
    return alone(Path(out), ".std-rt-bulk.lock", busy, MediaError, "choose another place with -o")


@contextmanager
def _recorded(manifest: Manifest, console: Console) -> Iterator[Callable[[list[Mapping[str, Any]]], None]]:
    """Yields a function that takes results and writes the manifest now and then, and at the end."""
    last_s = time.monotonic()

    def flush() -> None:
        nonlocal last_s
        last_s = time.monotonic()
        try:
            manifest.flush()
        except MediaError as error:  # tried again; what it loses is made again
            note(console, f"note: {error}")

    def record(rows: list[Mapping[str, Any]]) -> None:
        manifest.add(rows)
        for row in rows:
            if row["reason"]:
                named = row["input"] in row["reason"]
                _complain(console, f"failed: {'' if named else row['input'] + ': '}{row['reason']}")
        if time.monotonic() - last_s > _FLUSH_EVERY_S:
            flush()

    try:
        yield record
    finally:
        flush()


@contextmanager
def _shown(console: Console, total: int) -> Iterator[Callable[[Report], None]]:
    """Yields a function that shows progress: a bar with rate and time left; in logs a line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    lines = progress_lines(console)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening the engines", total=total)

        def show(report: Report) -> None:
            made = report.done + report.failed
            bar.update(task, completed=made, description=_state(report))
            lines(f"items ({_state(report)})", made, total)

        yield show


def _state(report: Report) -> str:
    rate = report.done / report.wall_s if report.wall_s else 0.0
    busy_s = report.read_s + report.engine_s + report.write_s or 1.0
    shares = ", ".join(
        f"{name} {seconds / busy_s:.0%}"
        for name, seconds in (("read", report.read_s), ("engine", report.engine_s), ("write", report.write_s))
    )
    parts = f", {report.parts} of {report.all_parts} segments" if report.all_parts else ""
    failed = f", {report.failed} failed" if report.failed else ""
    return f"{rate:.1f}/s, {shares}{parts}{failed}"


def _tell_end(report: Report, request: BulkRequest, out: str, console: Console) -> int:
    """Print what has become of the job; the exit code."""
    rate = report.done / report.wall_s if report.wall_s else 0.0
    say(
        f"{report.done} made, {report.failed} failed in {report.wall_s:.0f} s: {rate:.2f}/s, engines "
        f"{report.engine_share:.0%} busy, peak memory {report.peak_mb:.0f} MB an engine, "
        f"{report.driver_mb:.0f} MB this process"
    )
    if report.lost:
        note(console, f"note: {report.lost} items were lost with their workers and given out again")
    left = report.total - report.done - report.failed
    if report.disk_is_full:
        _complain(console, f"the disk of {out} is full; free some space and run the same command again")
    elif left:
        _complain(console, f"stopped after {report.failed} failures (--max-failures {request.max_failures})")
    if left:
        _complain(console, f"{left} items are left; the same command goes on with them")
    if report.failed:
        _complain(
            console, f"{report.failed} failed: {out}/failed.jsonl says why; the same command tries again"
        )
    return 1 if report.failed or left else 0


def _complain(console: Console, line: str) -> None:
    console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def _told(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
