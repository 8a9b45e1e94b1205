"""A job: a plan through the three stages, streamed, until every item has a result.

Blocks of items that a dying worker, engine or machine took with it come back with nothing. They are given
out again, item by item, so that an item which kills its worker takes no other with it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from std_rt.bulk import segments
from std_rt.bulk.cluster import Engines, job_context
from std_rt.bulk.options import BulkOptions
from std_rt.bulk.plan import is_clip_name
from std_rt.bulk.stages import RESULT, Fitter, PaintBlock, ReadBlock, WriteBlock
from std_rt.core.bundle import Bundle
from std_rt.core.errors import StdRtError
from std_rt.core.machine import peak_memory_mb

__all__ = ["Job", "Report", "blocks", "fitter", "run"]

_PASSES = 3
_BLOCK_MB = 24  # of frames: bounds what waits between stages
_MOST_ROWS = 64
_BLOCKS_AN_ENGINE = 4  # at least, so that none is idle at the end for long
_SEGMENT_S = 60.0  # long beside what each decodes ahead of its first frame: a second, or a group of pictures

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What to make, how, where to and with what: ``plan`` holds `plan.ITEM` rows."""

    plan: pa.Table
    options: BulkOptions
    bundle: Bundle
    out: str
    engines: Engines

    @property
    def segment_seconds(self) -> float:
        """Least length of a clip's segments in s; 0: clips stay whole.

        A temporal filter needs the frames before. One engine gains nothing by cuts, and a clip behind an
        address would be fetched for each of its segments: such are only cut if the options ask for it.
        """
        asked = self.options.segment_seconds
        if self.options.temporal != "off" or self.bundle.window is not None:
            return 0.0
        return asked if asked is not None else _SEGMENT_S if self.engines.count > 1 else 0.0


@dataclass
class Report:
    """What has become of a job so far. Times in s: ``wall_s`` of the job, the others summed over workers."""

    total: int
    engines: int
    done: int = 0
    failed: int = 0
    frames: int = 0
    wall_s: float = 0.0
    read_s: float = 0.0
    engine_s: float = 0.0
    write_s: float = 0.0
    peak_mb: float = 0.0
    driver_mb: float = 0.0
    parts: int = 0
    """Segments that were painted, of ``all_parts`` without a part when the job began."""
    all_parts: int = 0
    disk_is_full: bool = False
    lost: int = 0
    """Items that had to be given out again."""
    _begun_s: float = field(default_factory=time.monotonic)

    def add(self, row: Row) -> None:
        """Count a result. A segment that failed is painted, or fails, with its clip."""
        if segments.is_part(row["output"]):
            self.parts += 1
        else:
            self.failed += bool(row["reason"])
            self.done += not row["reason"]
            self.frames += row["frames"]
        for name in ("read_s", "engine_s", "write_s"):
            setattr(self, name, getattr(self, name) + row[name])
        self.peak_mb = max(self.peak_mb, row["peak_mb"])
        self.driver_mb = peak_memory_mb() or 0.0
        self.disk_is_full |= row["disk_full"]
        self.wall_s = time.monotonic() - self._begun_s

    @property
    def engine_share(self) -> float:
        """Share of the time that the engines were at work, 0..1."""
        return min(1.0, self.engine_s / (self.wall_s * self.engines)) if self.wall_s else 0.0


def run(job: Job, take: Callable[[list[Row], Report], bool]) -> Report:
    """Make every item of the plan. ``take`` gets results (`stages.RESULT`) as they come, each item once.

    It returns whether to go on. Raises StdRtError if the engines cannot be opened.
    """
    report = Report(job.plan.num_rows, job.engines.count)
    cut = segments.segments_of(job.plan, seconds) if (seconds := job.segment_seconds) else {}
    missing = segments.unpainted(job.out, cut) if cut else []
    report.all_parts = len(missing)

    def count(rows: list[Row]) -> bool:
        for row in rows:
            report.add(row)
        items = [row for row in rows if not segments.is_part(row["output"])]
        return take(items, report) and not report.disk_is_full

    with job_context():
        for turn in segments.rounds(job.plan, missing, cut, _BLOCKS_AN_ENGINE * job.engines.count):
            if not _run_turn(job, turn, report, count):
                break
    return report


def _run_turn(job: Job, missing: pa.Table, report: Report, count: Callable[[list[Row]], bool]) -> bool:
    """Make the rows of a turn, and give out again what is lost. Returns whether to go on."""
    for attempt in range(_PASSES):
        seen: set[str] = set()
        for rows in _results(job, missing, alone=attempt > 0):
            fresh = [row for row in rows if row["key"] not in seen]
            seen.update(row["key"] for row in fresh)
            if not count(fresh):
                return False
        keep = np.array([key not in seen for key in missing["key"].to_pylist()], bool)
        missing = missing.filter(pa.array(keep))
        if not missing.num_rows:
            return True
        report.lost += missing.num_rows
    reason = "its worker ended without a result, each time: a crash, or out of memory"
    return count([_lost(row, reason) for row in missing.to_pylist()])


def _lost(item: Row, reason: str) -> Row:
    nothing = dict.fromkeys(RESULT.names, 0) | {"disk_full": False}
    return nothing | dict(item) | {"stage": "worker", "reason": reason}


def _results(job: Job, items: pa.Table, *, alone: bool) -> Iterator[list[Row]]:
    """Results in the order in which they are written, a block at a time."""
    rows = 1 if alone else _block_rows(job, items.num_rows)
    options = replace(job.options, cores=job.engines.cores)
    tasks = {"batch_format": "pyarrow", **job.engines.tasks()}
    # A task that its actor's death took with it must not be tried again by Ray, which waits for that actor:
    # it may have no place to come back to. Ray says that such arguments will have other names.
    actors = {"batch_format": "pyarrow", "max_task_retries": 0, **job.engines.actors()}
    reader, writer = ReadBlock(fitter(job), options.keep_colours), WriteBlock(job.out, options.upscale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        read = ray.data.from_arrow(list(blocks(items, rows))).map_batches(reader.run, **tasks)
        painted = read.map_batches(PaintBlock, fn_constructor_args=(options, job.out), **actors)
        dataset = painted.map_batches(writer.run, **tasks)
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield batch.to_pylist()
    except ray.exceptions.RayError as error:
        raise StdRtError(_cause(error)) from error


def _cause(error: BaseException) -> str:
    """The one line of ours in an error of Ray's and its causes, or the last line of the innermost."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:  # the innermost may be an empty error of Ray's own
        if isinstance(cause, StdRtError):
            return str(cause)
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
        cause = getattr(cause, "cause", None) or cause.__cause__ or cause.__context__
    ours = [line.partition(": ")[2] for line in lines if line.startswith("std_rt.core.errors.")]
    return (ours or lines or [type(error).__name__])[-1]


def fitter(job: Job) -> Fitter:
    bundle = job.bundle
    size = bundle.size_default if job.options.size is None else job.options.size
    return Fitter(size, bundle.size_multiple, *bundle.size_range)


def _block_rows(job: Job, count: int) -> int:
    """Items in a block: many share calls of the engine, few bound the memory and what a crash loses."""
    size = job.bundle.size_default if job.options.size is None else job.options.size
    height, width = (size, size) if isinstance(size, int) else size
    fitting = int(_BLOCK_MB * 2**20 / (height * width * 3))
    spread = -(-count // (_BLOCKS_AN_ENGINE * job.engines.count))
    return max(1, min(fitting, _MOST_ROWS, spread))


def blocks(items: pa.Table, rows: int) -> Iterator[pa.Table]:
    """Slices of ``rows`` items; a clip has its own, as nobody knows how long it takes."""
    is_clip = [is_clip_name(name) for name in items["input"].to_pylist()]
    begin = 0
    for index, clip in enumerate([*is_clip, True]):
        if index > begin and (clip or index - begin == rows):
            yield items.slice(begin, index - begin)
            begin = index
        if index < len(is_clip) and clip:
            yield items.slice(index, 1)
            begin = index + 1
