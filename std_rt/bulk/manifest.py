"""The record of a job beside its outputs: what is finished (Parquet) and what failed (JSON lines).

    OUT/manifest/*.parquet    one row for each finished item; `pyarrow.parquet.read_table` reads the folder
    OUT/failed.jsonl          the failures of the last run, with their reasons

Only the command itself writes here, never a worker. Rows that a killed command had not written yet are made
again by the next one, over the same files.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from uuid import uuid4

import pyarrow as pa
from pyarrow import parquet

from std_rt.bulk import places, segments
from std_rt.core.errors import MediaError
from std_rt.core.files import writing

__all__ = ["FAILED", "FOLDER", "Manifest"]

FOLDER, FAILED = "manifest", "failed.jsonl"
_ROOM_BYTES = 256 * 1024  # more than the record of ten seconds needs
_ROW = pa.schema(
    [
        *(("key", pa.string()), ("input", pa.string()), ("style", pa.string()), ("strength", pa.float64())),
        *(("output", pa.string()), ("bytes", pa.int64()), ("width", pa.int32()), ("height", pa.int32())),
        ("frames", pa.int64()),
    ]
)


class Manifest:
    """What is finished in an output folder. Raises MediaError if it cannot be read."""

    def __init__(self, out: str) -> None:
        self._out, self._folder = out, places.joined(out, FOLDER)
        self._parts = [name for name in places.listed(self._folder) if name.endswith(".parquet")]
        self.exists = bool(self._parts)
        self._done: dict[str, tuple[str, int]] = {}  # key -> output, bytes
        self.taken: dict[str, str] = {}
        """Identities of items by the outputs that were written for them."""
        self._new: list[Mapping[str, Any]] = []
        self._failed: list[Mapping[str, Any]] = []
        self.removed = 0
        """Results that were removed again by `flush`."""
        for name in self._parts:
            self._remember(self._read(name))

    def _read(self, name: str) -> pa.Table:
        place = places.joined(self._folder, name)
        try:
            with places.fetched(place) as path:
                return parquet.read_table(path).select(_ROW.names)
        except (OSError, ValueError, KeyError) as error:
            raise MediaError(
                f"{place} is damaged ({' '.join(str(error).split())[:100]}); delete it, and what it lists "
                "is made again"
            ) from error

    def _remember(self, table: pa.Table) -> None:
        names = ("key", "input", "style", "strength", "output", "bytes")
        columns = [table[name].to_pylist() for name in names]
        for key, source, style, strength, output, size in zip(*columns, strict=True):
            self._done[key] = (output, size)
            self.taken[output] = f"{source}|{style}|{strength!r}"

    def is_finished(self, key: str, sizes: Mapping[str, places.Stat]) -> bool:
        """Whether the item was written, and its file is there in full; ``sizes``: the files of the folder."""
        output, size = self._done.get(key, ("", -1))
        return size >= 0 and sizes.get(output, (-1, -1))[0] == size

    def unfinished(self, plan: pa.Table, sizes: Mapping[str, places.Stat]) -> pa.Table:
        """The rows of a plan (`plan.ITEM`) that are not finished."""
        keep = [not self.is_finished(key, sizes) for key in plan["key"].to_pylist()]
        return plan.filter(pa.array(keep, pa.bool_()))

    def add(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Results of workers: rows of `stages.RESULT`. Written by the next `flush`."""
        for row in results:
            (self._failed if row["reason"] else self._new).append(row)

    def flush(self) -> None:
        """Write what is new. Raises MediaError; the next call tries again.

        On a full disk a few of the newest results are removed, as many as the record needs room: without it
        all would be made again. They are counted in ``removed``.
        """
        try:
            self._with_room(self._write_failed)
        finally:  # what is finished is recorded, even if what failed cannot be
            self._with_room(self._write_new)
            self._new = []

    def _with_room(self, write: Callable[[], None]) -> None:
        freed = 0
        while True:
            try:
                return write()
            except MediaError as error:
                if not self._new or freed > _ROOM_BYTES or not self._is_full(error.__cause__):
                    raise
                row = self._new.pop()
                places.remove(places.joined(self._out, row["output"]))
                freed += row["bytes"]
                self.removed += 1

    def _is_full(self, cause: BaseException | None) -> bool:
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1))
        return full and not places.is_address(self._out)  # of a store, the local disk is full

    def _write_new(self) -> None:
        if not self._new:
            return
        name = f"{uuid4().hex}.parquet"
        self._write(name, pa.Table.from_pylist([dict(row) for row in self._new], schema=_ROW))
        self._parts.append(name)
        if any(row["frames"] > 1 for row in self._new):
            segments.discard(self._out, {row["key"] for row in self._new}.__contains__)

    def _write_failed(self) -> None:
        told = ("input", "style", "output", "stage", "reason")
        lines = [json.dumps({name: row[name] for name in told}, ensure_ascii=False) for row in self._failed]
        place = places.joined(self._out, FAILED)
        with writing(place), places.stored(place) as path:
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def begin(self) -> None:
        """Mark the folder as this command's, with its parts joined into one."""
        tables = [self._read(name) for name in self._parts]
        before, name = self._parts, f"{uuid4().hex}.parquet"
        segments.discard(self._out, self._done.__contains__)
        if len(before) == 1:
            return
        rows = pa.concat_tables([*tables, _ROW.empty_table()])
        last = {key: index for index, key in enumerate(rows["key"].to_pylist())}
        self._write(name, rows.take(pa.array(sorted(last.values()), pa.int64())))
        self._parts = [name]
        for old in before:
            places.remove(places.joined(self._folder, old))

    def _write(self, name: str, table: pa.Table) -> None:
        place = places.joined(self._folder, name)
        with writing(place), places.stored(place) as path:
            parquet.write_table(table, path)
