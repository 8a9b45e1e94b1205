"""Files by path or address: local, or on any file system that Arrow or fsspec opens (``s3://``, ``gs://``).

The runtime reads and writes local files: `fetched` and `stored` give it one, and carry it over if it is not
at home here. A half-written file never has the final name, wherever it is.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from pyarrow import ArrowException, ArrowInvalid, fs

from std_rt.core.errors import MediaError
from std_rt.core.files import atomic_file, reason

__all__ = [
    "absolute",
    "fetched",
    "is_address",
    "joined",
    "listed",
    "matching",
    "opened",
    "remove",
    "stats",
    "stored",
    "sweep",
]

Stat = tuple[int, int]
"""Size in bytes and time of change in ns; (-1, -1) of a file that is not there."""

_CHUNK_BYTES = 1 << 20
_ASKED_AT_ONCE = 16
_FAILURES = (OSError, ArrowException)  # Google's client raises both
_GOOGLE = ("gs", "gcs")
_RETRY = "?retry_limit_seconds=60"  # Google's own are 15 minutes, without a word if there are no credentials


def is_address(place: str) -> bool:
    """Whether ``place`` is an address such as ``s3://bucket/folder``, not a local path."""
    return "://" in place


def absolute(place: str) -> str:
    """A path as every process of this machine understands it; an address as it is."""
    return place.rstrip("/") if is_address(place) else str(Path(place).absolute())


def joined(folder: str, name: str) -> str:
    """``name``, a relative path with ``/``, inside ``folder``."""
    return f"{folder}/{name}" if is_address(folder) else str(Path(folder, name))


@lru_cache(maxsize=64)
def _file_system(scheme: str, host: str, query: str) -> tuple[Any, str]:
    """An Arrow file system, and the path on it that ``scheme://host`` is."""
    query = query or (_RETRY if scheme in _GOOGLE else "")
    try:
        found: tuple[Any, str] = fs.FileSystem.from_uri(f"{scheme}://{host}/{query}")
        return found
    except (ArrowInvalid, NotImplementedError):  # not one of Arrow's own
        import fsspec

        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme))), host


def opened(place: str) -> tuple[Any, str]:
    """(Arrow file system, path on it). Raises MediaError if nothing here opens such an address."""
    if not is_address(place):
        return fs.LocalFileSystem(), place
    scheme, _, rest = place.partition("://")
    rest, mark, query = rest.partition("?")
    host, _, path = rest.partition("/")
    try:
        files, base = _file_system(scheme, host, mark + query)
    except (ImportError, ValueError, OSError) as error:
        raise MediaError(
            f"{place} cannot be opened: {reason(error)}; install the fsspec package for {scheme}://"
        ) from error
    path = path.rstrip("/")
    return files, f"{base.rstrip('/')}/{path}" if path else base


@contextmanager
def _asked(place: str, verb: str) -> Iterator[None]:
    """Turn what a file system raises in the block into a MediaError of one line."""
    try:
        yield
    except _FAILURES as error:
        said = reason(error).partition(" error_info=")[0]  # Google's repeat themselves
        said = said.rpartition(" last message of ")[2].removeprefix("google::cloud::Status(")
        raise MediaError(f"{place} cannot be {verb}: {said}") from error


def stats(places: Sequence[str]) -> list[Stat]:
    """Size and time of change of each file; (-1, -1) where there is none."""
    found: list[Stat] = []
    for begin in range(0, len(places), 1000):
        some = places[begin : begin + 1000]
        files = [opened(place) for place in some]
        if all(not is_address(place) for place in some):
            found += [_stat(info) for info in fs.LocalFileSystem().get_file_info(list(some))]
        else:
            with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:  # each is a request to a server
                found += pool.map(_asked_stat, some, files)
    return found


def _asked_stat(place: str, file: tuple[Any, str]) -> Stat:
    with _asked(place, "read"):
        return _stat(file[0].get_file_info(file[1]))


def _stat(info: Any) -> Stat:
    return (info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else (-1, -1)


def listed(folder: str) -> dict[str, Stat]:
    """Every file below ``folder``, by its path relative to it (with ``/``), and what `stats` says of it.

    Hidden files and folders are left out. Empty if there is no such folder.
    """
    _, path = opened(folder)
    root = PurePosixPath(path.replace("\\", "/").lstrip("/"))
    found: dict[str, Stat] = {}
    for info in _below(folder):
        name = PurePosixPath(info.path.replace("\\", "/").lstrip("/"))  # fsspec's memory adds one
        inside = name.relative_to(root) if name.is_relative_to(root) else name
        if info.type == fs.FileType.File and not any(part.startswith(".") for part in inside.parts):
            found[inside.as_posix()] = _stat(info)
    return dict(sorted(found.items()))


def _below(folder: str) -> list[Any]:
    """Arrow's infos of all that is below a folder."""
    files, path = opened(folder)
    with _asked(folder, "read"):
        found: list[Any] = files.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    return found


def sweep(folder: str) -> None:
    """Remove what killed processes left half-written in a folder that nobody else writes to."""
    if not is_address(folder):
        for left in Path(folder).rglob(".*.????????.part*"):
            with suppress(OSError):
                left.unlink()
        return
    files, _ = opened(folder)
    for info in _below(folder):
        if re.fullmatch(r"\.[0-9a-f]{8}\.part.*", PurePosixPath(info.path).name):
            with suppress(*_FAILURES):
                files.delete_file(info.path)


def remove(place: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens where there is none."""
    files, path = opened(place)
    with suppress(*_FAILURES):
        if files.get_file_info(path).type == fs.FileType.File:
            files.delete_file(path)
        else:
            files.delete_dir(path)


def matching(pattern: str) -> list[str]:
    """The files that match a pattern with ``*``, ``?``, ``[...]`` and ``**``, by name."""
    from fsspec.implementations.arrow import ArrowFSWrapper

    files, path = opened(absolute(pattern))
    with _asked(pattern, "read"):
        names = sorted(ArrowFSWrapper(files).glob(path))
        names = [name for name in names if files.get_file_info(name).type == fs.FileType.File]
    if not is_address(pattern):
        return names
    scheme, _, rest = pattern.partition("://")
    root = f"{scheme}://{rest.partition('/')[0]}"
    base = opened(root)[1].strip("/")
    return [f"{root}/{name.lstrip('/').removeprefix(base).lstrip('/')}" for name in names]


@contextmanager
def fetched(place: str) -> Iterator[Path]:
    """The file as a local one for the time of the block. Raises MediaError if it cannot be fetched."""
    if not is_address(place):
        yield Path(place)
        return
    files, path = opened(place)
    with TemporaryDirectory(prefix="std-rt-") as folder:
        local = Path(folder) / (PurePosixPath(path).name or "file")
        with (
            _asked(place, "read"),
            files.open_input_stream(path) as source,
            local.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)
        try:
            yield local
        except MediaError as error:
            raise MediaError(str(error).replace(str(local), place)) from error


@contextmanager
def stored(place: str) -> Iterator[Path]:
    """A local path to write; what is there when the block ends appears at ``place`` as a whole.

    Raises MediaError if it cannot be stored; exceptions of the block pass through, and nothing is left.
    """
    if not is_address(place):
        sink = Path(place)
        try:
            sink.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MediaError(f"{place} cannot be written: {reason(error)}") from error
        with atomic_file(sink, error=MediaError) as partial:
            yield partial
        return
    files, path = opened(place)
    final = PurePosixPath(path)
    with TemporaryDirectory(prefix="std-rt-") as folder:
        local = Path(folder) / final.name
        yield local
        partial_path = str(final.with_name(f".{uuid4().hex[:8]}.part{final.suffix}"))
        with _asked(place, "written"):
            if files.type_name != "gcs":  # where it would make a bucket, too, that is misspelt
                files.create_dir(str(final.parent), recursive=True)
            try:
                with local.open("rb") as source, files.open_output_stream(partial_path) as sink:
                    shutil.copyfileobj(source, sink, _CHUNK_BYTES)
                files.move(partial_path, path)
            except _FAILURES:
                with suppress(*_FAILURES):
                    files.delete_file(partial_path)
                raise
