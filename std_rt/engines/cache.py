"""The engine cache: engines compiled on this machine, listed by sha256 in one manifest.

    cache = EngineCache.open()                      # None if no folder can be written
    path = cache.find(key) or cache.build(key, make)

    CACHE/engines/
      manifest.json     every engine: its key, sha256, size, date, and a seal
      KEY.engine        KEY = sha256 over everything the engine depends on (`EngineKey`)

An engine is executable code, so none is loaded unless this machine's own manifest lists it, byte for byte.
Every entry is sealed (HMAC-SHA256) with a random secret kept outside the cache, in the user's data folder, so
a cache folder copied from another machine is not trusted here.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import mmap
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from std_rt.core.errors import BackendError
from std_rt.core.files import atomic_file, cache_root, file_digest, reason, user_folder, write_text, writing

__all__ = ["CLEAN_UP", "EngineCache", "EngineKey", "Entry", "Removed"]

CLEAN_UP = "std-rt engines gc"  # removes broken engines; they are built again when next needed
_SCHEMA = 1
_SECRET_BYTES = 32

T = TypeVar("T")


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on: if one field differs, it is another engine.

    ``target``: the GPU's compute capability (``sm89``), several joined by ``+`` for an engine with code for
    each, or the CPU's name and features. ``driver`` and ``flags`` are empty if nothing depends on them.
    """

    bundle: str
    graph: str
    shapes: Mapping[str, tuple[int, ...]]
    product: str
    version: str
    target: str
    driver: str = ""
    flags: str = ""

    @property
    def digest(self) -> str:
        """sha256 hex over the canonical JSON of all fields: the engine's file name."""
        return hashlib.sha256(_canonical(self.as_dict())).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        shapes = {name: list(map(int, shape)) for name, shape in self.shapes.items()}
        return {**vars(self), "shapes": shapes}

    def covers(self, other: EngineKey) -> bool:
        """Whether this engine has code for the targets of ``other`` and equals it in everything else."""
        ours, theirs = (set(key.target.split("+")) for key in (self, other))
        return theirs <= ours and replace(self, target="").digest == replace(other, target="").digest


@dataclass(frozen=True)
class Entry:
    """One engine in the manifest: ``size`` in bytes, ``created`` in ISO 8601 (UTC), ``seal`` the HMAC.

    ``origin`` is the folder of the bundle it was built from, by which ``engines gc`` finds the bundle again.
    """

    key: EngineKey
    sha256: str
    size: int
    created: str
    origin: str = ""
    seal: str = ""

    def __str__(self) -> str:
        return f"{self.key.digest[:16]} ({self.key.graph})"

    def as_dict(self) -> dict[str, Any]:
        """The fields as the manifest has them."""
        body = {"key": self.key.as_dict(), "sha256": self.sha256, "bytes": self.size}
        return {**body, "created": self.created, "origin": self.origin, "seal": self.seal}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Entry:
        """The reverse of `as_dict`. Anything else is a KeyError, TypeError, ValueError or AttributeError."""
        named = {name: str(value) for name, value in fields["key"].items() if name != "shapes"}
        shapes = {name: tuple(map(int, shape)) for name, shape in fields["key"]["shapes"].items()}
        text = {name: str(fields[name]) for name in ("sha256", "created", "origin", "seal")}
        return cls(EngineKey(shapes=shapes, **named), size=int(fields["bytes"]), **text)

    def sealed_with(self, secret: bytes) -> Entry:
        """This entry with the seal that ``secret`` gives."""
        body = {name: value for name, value in self.as_dict().items() if name != "seal"}
        return replace(self, seal=hmac.new(secret, _canonical(body), hashlib.sha256).hexdigest())


@dataclass(frozen=True)
class Removed:
    """A file or entry that `EngineCache.gc` removed, or would: its name, why, and the bytes this frees."""

    name: str
    why: str
    size: int


class EngineCache:
    """The engines of one cache folder. Safe in several threads and processes at once."""

    def __init__(self, folder: Path, secret: bytes) -> None:
        """Use `open` unless in a test."""
        self.folder, self._secret = folder, secret
        self._manifest_path = folder / "manifest.json"

    @classmethod
    def open(cls) -> EngineCache | None:
        """The cache in `cache_root`; None if it or the user's data folder cannot be written.

        The data folder is platformdirs', or the one in ``STD_RT_DATA``. Raises BackendError if the secret in
        it is damaged.
        """
        root, data = cache_root(), user_folder("STD_RT_DATA", "user_data_dir")
        if root is None or data is None:
            return None
        folder = root / "engines"
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            return cls(folder, _read_secret(data / "engine-secret"))
        except OSError:
            return None

    def find(self, key: EngineKey) -> Path | None:
        """The engine's file, checked against manifest and seal; None if none is listed.

        Raises BackendError, with the command that helps, if a listed engine is missing or changed.
        """
        return self._checked(key, _hashed)

    def read(self, key: EngineKey) -> bytes | None:
        """The engine's bytes, as they were checked; None and errors as in `find`."""

        def load(path: Path) -> tuple[bytes, str]:
            data = path.read_bytes()
            return data, hashlib.sha256(data).hexdigest()

        return self._checked(key, load)

    @contextmanager
    def mapped(self, key: EngineKey) -> Iterator[mmap.mmap | bytes | None]:
        """`read` without a copy in memory: the file, mapped for as long as the block runs.

        The file's pages are checked and then used; whoever may write to this folder is trusted meanwhile.
        """

        def load(path: Path) -> tuple[mmap.mmap | bytes, str]:
            with path.open("rb") as file:
                empty = not os.fstat(file.fileno()).st_size  # which cannot be mapped
                data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return data, hashlib.sha256(data).hexdigest()

        data = self._checked(key, load)
        try:
            yield data
        finally:
            if isinstance(data, mmap.mmap):
                data.close()  # Windows replaces no file that is mapped

    def build(
        self,
        key: EngineKey,
        make: Callable[[Path], None] | bytes,
        *,
        replace: bool = False,
        origin: str | Path = "",
    ) -> Path:
        """The engine's file, built first if it is not listed; concurrent callers build it once.

        ``make(path)`` writes the engine to ``path`` (or is its bytes). An interrupted build leaves nothing
        under the final name. ``replace`` makes it in any case. Raises BackendError on a full disk or, as
        `find` does, on a changed engine; and whatever ``make`` raises.
        """
        advice = f"free some space ({CLEAN_UP}) or set STD_RT_CACHE to a folder on another disk"
        what = f"the engine of '{key.graph}' in {self.folder}"
        with writing(what, BackendError, advice), self._lock(key.digest), ExitStack() as held:
            known = None if replace else self.find(key)
            if known is not None:
                return known
            with atomic_file(self.path(key)) as partial:
                if isinstance(make, bytes):
                    partial.write_bytes(make)
                else:
                    make(partial)
                now = datetime.now(UTC).isoformat(timespec="seconds")
                entry = Entry(key, file_digest(partial), partial.stat().st_size, now, str(origin))
                held.enter_context(self._lock("manifest"))  # over the rename of the engine, too
                listed = self._manifest()
            self._write_manifest({**listed, key.digest: entry.sealed_with(self._secret)})
        return self.path(key)

    def path(self, key: EngineKey) -> Path:
        """The file name of the engine of ``key``, whether it exists or not."""
        return self.folder / f"{key.digest}.engine"

    def entries(self) -> list[Entry]:
        """Every engine listed, trusted or not. Raises BackendError on an unreadable manifest."""
        return list(self._manifest().values())

    def verify(self) -> list[str]:
        """One line for every listed engine that would be refused, and every file that is not listed."""
        listed = self._manifest()
        problems = [(entry, self._load(entry, _hashed)[1]) for entry in listed.values()]
        refused = [f"{entry} {problem}" for entry, problem in problems if problem]
        return refused + [f"{path.name} is not listed" for path in self._unlisted(listed)]

    def gc(
        self, unused: Callable[[Entry], str] = lambda entry: "", *, dry_run: bool = False
    ) -> list[Removed]:
        """Remove what can no longer be used: changed or unlisted files, left-overs, an unreadable manifest.

        Engines for which ``unused`` returns a reason go too. ``dry_run`` only reports what would go.
        """
        removed: list[Removed] = []
        listed = self._readable_manifest()
        if listed is None:
            listed = {}
            removed.append(self._remove(self._manifest_path, "cannot be read", dry_run))
        gone = {}
        for digest, entry in listed.items():
            why = self._load(entry, _hashed)[1] or unused(entry)
            if why:
                gone[digest] = Removed(str(entry), why, _size(self.path(entry.key)))
        if gone and not dry_run:
            with self._lock("manifest"):
                for digest in gone:
                    (self.folder / f"{digest}.engine").unlink(missing_ok=True)
                left = {digest: entry for digest, entry in self._manifest().items() if digest not in gone}
                self._write_manifest(left)
        removed += gone.values()
        for path in self._unlisted(listed):
            removed += self._remove_unlisted(path, dry_run)
        return removed

    def _checked(self, key: EngineKey, load: Callable[[Path], tuple[T, str]]) -> T | None:
        """What ``load`` returns for the engine of ``key``; see `find`."""
        listed = self._manifest()
        entry = listed.get(key.digest) or next((e for e in listed.values() if e.key.covers(key)), None)
        if entry is None:
            return None
        path = self.path(entry.key)
        content, problem = self._load(entry, load)
        if problem:
            raise BackendError(
                f"the {key.product} engine of '{key.graph}' is not used: {path} {problem}; run: {CLEAN_UP}"
            )
        with suppress(OSError):  # the file may be another user's
            os.utime(path)  # records the use, for gc
        return content

    def _load(self, entry: Entry, load: Callable[[Path], tuple[T, str]]) -> tuple[T | None, str]:
        """(content, why it must not be used or ""); ``load(path)`` returns the content and its sha256."""
        seal = entry.sealed_with(self._secret).seal
        if not hmac.compare_digest(entry.seal.encode(), seal.encode()):
            return None, "was not listed by this machine"
        try:
            content, sha256 = load(self.path(entry.key))
        except FileNotFoundError:
            return None, "is missing"
        except OSError as error:
            return None, f"cannot be read ({reason(error)})"
        return (content, "") if sha256 == entry.sha256 else (None, "has changed since it was built")

    def _manifest(self) -> dict[str, Entry]:
        """The entries by the digests of their keys."""
        try:
            content = json.loads(self._manifest_path.read_text(encoding="utf-8"))
            if content["schema"] != _SCHEMA:
                raise ValueError(f"schema {content['schema']}, this std-rt reads {_SCHEMA}")
            entries = [Entry.from_dict(fields) for fields in content["entries"]]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(
                f"the list of engines {self._manifest_path} cannot be read ({error!r}); run: {CLEAN_UP}"
            ) from error
        return {entry.key.digest: entry for entry in entries}

    def _readable_manifest(self) -> dict[str, Entry] | None:
        try:
            return self._manifest()
        except BackendError:
            return None

    def _write_manifest(self, listed: Mapping[str, Entry]) -> None:
        content = {"schema": _SCHEMA, "entries": [entry.as_dict() for entry in listed.values()]}
        write_text(
            self._manifest_path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", durable=True
        )

    def _unlisted(self, listed: Mapping[str, Entry]) -> list[Path]:
        """Engines that are not listed, and partial files of interrupted builds."""
        found = {*self.folder.glob("*.engine"), *self.folder.glob(".*.part.*")}
        return sorted(path for path in found if path.suffix != ".engine" or path.stem not in listed)

    def _remove_unlisted(self, path: Path, dry_run: bool) -> list[Removed]:
        """Delete it, unless a build that is running right now owns it."""
        name = path.name.lstrip(".").split(".")[0]
        try:
            with self._lock(name, timeout_s=0):
                if path.name != f"{name}.engine":
                    return [self._remove(path, "left by an interrupted build", dry_run)]
                if name in (self._readable_manifest() or {}):
                    return []  # listed meanwhile
                return [self._remove(path, "not listed", dry_run)]
        except Timeout:
            return []

    def _remove(self, path: Path, why: str, dry_run: bool) -> Removed:
        removed = Removed(path.name, why, _size(path))
        if not dry_run:
            path.unlink(missing_ok=True)
        return removed

    def _lock(self, name: str, timeout_s: float = -1) -> FileLock:
        """The lock of one engine's file, by its digest, or of the manifest."""
        return FileLock(self.folder / "locks" / f"{name[:32]}.lock", timeout=timeout_s)


def _read_secret(path: Path) -> bytes:
    """This machine's secret, made at first use and readable only by its owner (on POSIX)."""
    if not path.is_file():
        with FileLock(path.with_name(f"{path.name}.lock")):
            if not path.is_file():
                with atomic_file(path, durable=True, mode=0o600) as partial:
                    partial.write_bytes(secrets.token_bytes(_SECRET_BYTES))
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise BackendError(f"{path} is damaged ({len(secret)} bytes); delete it and run: {CLEAN_UP}")
    return secret


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _hashed(path: Path) -> tuple[Path, str]:
    return path, file_digest(path)


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
