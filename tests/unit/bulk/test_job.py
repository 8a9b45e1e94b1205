"""A job's passes, without Ray: what is lost is given out again, and what kills its worker fails alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pytest

from std_rt.bulk import job
from std_rt.bulk.cluster import Engines
from std_rt.bulk.job import Job, Report, run
from std_rt.bulk.options import BulkOptions
from std_rt.bulk.plan import ITEM
from std_rt.bulk.stages import RESULT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")  # it warns of itself

Row = Mapping[str, Any]


def the_job(count: int) -> Job:
    names = [f"{index}.png" for index in range(count)]
    plan = pa.table([names, names, names, [1.0] * count, names], schema=ITEM)
    return Job(plan, BulkOptions(), None, "/out", Engines(1, 0, 2))  # type: ignore[arg-type]


def result(item: Row, reason: str = "", **more: Any) -> Row:
    nothing: dict[str, Any] = dict.fromkeys(RESULT.names, 0)
    return nothing | item | {"reason": reason, "engine_s": 0.5, "disk_full": False} | more


class Workers:
    """Stands in for Ray: loses each block that holds a ``poison`` item, and the first ``lost`` blocks."""

    def __init__(self, poison: str = "", lost: int = 0, **results: Any) -> None:
        self.poison, self.lost, self.results = poison, lost, results
        self.passes: list[list[str]] = []

    def __call__(self, the_job: Job, items: pa.Table, *, alone: bool) -> Iterator[list[Row]]:
        rows = items.to_pylist()
        self.passes.append([row["key"] for row in rows])
        size = 1 if alone else 4
        for begin in range(0, len(rows), size):
            block = rows[begin : begin + size]
            if self.lost > 0 or self.poison in [row["key"] for row in block]:
                self.lost -= 1
                continue
            yield [result(row, **self.results) for row in block]


def collect(monkeypatch: pytest.MonkeyPatch, workers: Workers, count: int = 10) -> tuple[Report, list[Row]]:
    monkeypatch.setattr(job, "_results", workers)
    rows: list[Row] = []

    def take(some: list[Row], report: Report) -> bool:
        rows.extend(some)
        return report.failed < 3

    return run(the_job(count), take), rows


def test_lost_blocks_are_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(lost=2)
    report, rows = collect(monkeypatch, workers)
    assert (report.done, report.failed, report.lost) == (10, 0, 8)
    assert sorted(row["key"] for row in rows) == [f"{index}.png" for index in range(10)]
    assert [len(keys) for keys in workers.passes] == [10, 8]


def test_an_item_that_kills_its_worker_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(poison="5.png")
    report, rows = collect(monkeypatch, workers)
    assert (report.done, report.failed) == (9, 1)
    (failed,) = (row for row in rows if row["reason"])
    assert (failed["input"], failed["stage"]) == ("5.png", "worker")
    assert "a crash, or out of memory" in failed["reason"]
    assert [len(keys) for keys in workers.passes] == [10, 4, 1]


def test_an_item_that_comes_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers()
    monkeypatch.setattr(Workers, "__call__", lambda self, j, items, alone: iter([_all(items), _all(items)]))
    report, rows = collect(monkeypatch, workers, 3)
    assert (report.done, len(rows)) == (3, 3)


def _all(items: pa.Table) -> list[Row]:
    return [result(row) for row in items.to_pylist()]


def test_a_full_disk_and_too_many_failures_end_a_job_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Workers(reason="the disk is full", disk_full=True)
    report, _ = collect(monkeypatch, full, 100)
    assert (report.disk_is_full, report.failed) == (True, 4)
    bad = Workers(reason="damaged")
    report, _ = collect(monkeypatch, bad, 100)
    assert report.failed == 4
    assert len(bad.passes) == 1


def test_the_share_of_the_engines_is_theirs_of_the_time() -> None:
    report = Report(4, engines=2)
    report.add(result({"key": "a", "output": "a.png"}, engine_s=3.0, read_s=1.0))
    report.wall_s = 2.0
    assert report.engine_share == 0.75
