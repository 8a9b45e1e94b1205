"""The engine store: what backends compiled on this machine, listed in one manifest, and nothing else.

    store = EngineStore.open()                      # None where no folder can be written
    path = store.find(key) or store.build(key, make)

    CACHE/engines/
      manifest.json     every engine: its key, sha256, size, date, and a signature
      KEY.engine        KEY = sha256 over everything the engine depends on (`EngineKey`)

An engine is executable code, so none is given out that this machine's manifest does not list, byte for byte.
Every entry is signed (HMAC-SHA256) with a random secret that lies outside the cache, in the user's data
folder, so a cache folder copied from another machine is not believed here.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from std_rt.core.digest import file_digest
from std_rt.core.errors import BackendError, disk_is_full
from std_rt.engines.registry import cache_root, user_folder

__all__ = ["MEND", "Dropped", "EngineKey", "EngineStore", "Entry", "data_root"]

MEND = "std-rt engines gc"  # drops what is broken; it is built again when it is next needed
_SCHEMA = 1
_SECRET_BYTES = 32
_DAY_S = 86400.0

Make = Callable[[Path], None]


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on; one thing different, another engine.

    ``target``: the GPU's compute capability (``sm89``), several joined by ``+`` for an engine that holds
    code for each, or the CPU's features. ``driver`` and ``flags`` are empty where nothing depends on them.
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
        """Fields as JSON has them."""
        shapes = {name: list(map(int, shape)) for name, shape in self.shapes.items()}
        return asdict(self) | {"shapes": shapes}

    def covers(self, other: EngineKey) -> bool:
        """True where this engine holds code for the target of ``other`` and equals it in all else."""
        ours, theirs = self.as_dict(), other.as_dict()
        targets = set(ours.pop("target").split("+"))
        return set(theirs.pop("target").split("+")) <= targets and ours == theirs

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EngineKey:
        """The reverse of `as_dict`. Raises KeyError, TypeError or ValueError on anything else."""
        shapes = {str(name): tuple(map(int, shape)) for name, shape in fields["shapes"].items()}
        rest = {name: str(fields[name]) for name in cls.__dataclass_fields__ if name != "shapes"}
        return cls(shapes=shapes, **rest)


@dataclass(frozen=True)
class Entry:
    """One line of the manifest: ``size`` in bytes, ``created`` in ISO 8601 (UTC), ``seal`` the signature.

    ``origin`` is the folder of the bundle it was built from; nothing but `EngineStore.gc` depends on it.
    """

    key: EngineKey
    sha256: str
    size: int
    created: str
    origin: str = ""
    seal: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Fields as JSON has them."""
        fields = {"key": self.key.as_dict(), "sha256": self.sha256, "bytes": self.size}
        return fields | {"created": self.created, "origin": self.origin, "seal": self.seal}

    def sealed_with(self, secret: bytes) -> str:
        """The signature that ``secret`` gives."""
        body = {name: value for name, value in self.as_dict().items() if name != "seal"}
        return hmac.new(secret, _canonical(body), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Dropped:
    """What `EngineStore.gc` removed, or would: a file or entry, why, and the bytes that frees."""

    name: str
    why: str
    size: int


class EngineStore:
    """The engines of one cache folder. Safe to use from several threads and processes at once."""

    def __init__(self, folder: Path, secret: bytes) -> None:
        """Most callers want `open`."""
        self.folder = folder
        self._secret = secret

    @classmethod
    def open(cls) -> EngineStore | None:
        """The store under `cache_root`; None where the cache or the data folder cannot be written.

        Raises BackendError where the secret is there and damaged.
        """
        root, data = cache_root(), data_root()
        if root is None or data is None:
            return None
        folder = root / "engines"
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            return cls(folder, _secret(data))
        except OSError:
            return None

    def find(self, key: EngineKey) -> Path | None:
        """The engine's file, checked against manifest and signature; None where none is listed.

        Raises BackendError, with the command that mends it, where a listed engine is missing or changed.
        """
        entry = self.entry(key)
        if entry is None:
            return None
        path = self._path(entry)
        problem = self._seal_problem(entry) or self._file_problem(entry)
        if problem:
            raise BackendError(_refusal(entry, path, problem))
        _touch(path)
        return path

    def read(self, key: EngineKey) -> bytes | None:
        """The engine's bytes, and these very bytes were checked; None and errors as in `find`."""
        entry = self.entry(key)
        if entry is None:
            return None
        path, data = self._path(entry), None
        problem = self._seal_problem(entry)
        if not problem:
            try:
                data = path.read_bytes()
            except OSError as error:
                problem = _reason(error)
        if data is not None and hashlib.sha256(data).hexdigest() != entry.sha256:
            problem = "has changed since it was built"
        if data is None or problem:
            raise BackendError(_refusal(entry, path, problem))
        _touch(path)
        return data

    def build(
        self, key: EngineKey, make: Make | bytes, *, replace: bool = False, origin: str | Path = ""
    ) -> Path:
        """The engine's file, made first where it is not listed: several builders at once make it once.

        ``make(path)`` writes the engine to ``path`` (or is its bytes). An interrupted build leaves nothing
        under the final name. ``replace`` makes it in any case. Raises BackendError on a full disk, on a
        changed engine as `find` does, and whatever ``make`` raises.
        """
        with self._room(key), self._lock(key.digest):
            known = None if replace else self.find(key)
            if known is not None:
                return known
            partial = self.folder / f"{key.digest}.{secrets.token_hex(4)}.partial"
            try:
                if isinstance(make, bytes):
                    partial.write_bytes(make)
                else:
                    make(partial)
                return self._keep(key, partial, str(origin))
            finally:
                partial.unlink(missing_ok=True)

    def entry(self, key: EngineKey) -> Entry | None:
        """What is listed for this key: its own engine, or one for several targets; not checked."""
        listed = self._manifest()
        exact = listed.get(key.digest)
        if exact is not None:
            return exact
        return next((entry for entry in listed.values() if entry.key.covers(key)), None)

    def entries(self) -> list[Entry]:
        """Everything listed, believed or not. Raises BackendError on an unreadable manifest."""
        return list(self._manifest().values())

    def verify(self) -> list[str]:
        """One line for every listed engine that would be refused, and every file that is not listed."""
        listed = self._manifest()
        problems = []
        for digest, entry in listed.items():
            problem = self._seal_problem(entry) or self._file_problem(entry)
            if problem:
                problems.append(f"{digest[:16]} ({entry.key.graph}) {problem}")
        return problems + [f"{path.name} is not listed" for path in self._unlisted(listed)]

    def remove(self, digests: Collection[str]) -> int:
        """Delete these engines and their entries; returns the bytes freed."""
        freed = 0
        with self._manifest_lock():
            listed = self._manifest()
            for digest in digests:
                freed += _unlink(self.folder / f"{digest}.engine")
                listed.pop(digest, None)
            self._write_manifest(listed)
        return freed

    def gc(
        self,
        keep_bundles: Collection[str] | None = None,
        *,
        versions: Mapping[str, str] | None = None,
        drivers: Mapping[str, str] | None = None,
        older_than_days: float | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> list[Dropped]:
        """Remove what cannot be used any more, and say what.

        Always: entries that would be refused, files that are not listed, rests of interrupted builds, an
        unreadable manifest. Then entries of bundles not among ``keep_bundles`` (digests; None keeps all),
        of another version than ``versions`` says for their product, of another driver than ``drivers``
        says for it, and those not used for ``older_than_days``. ``everything``: all of them.
        """
        rules = _Rules(keep_bundles, versions or {}, drivers or {}, older_than_days, everything)
        listed, dropped = self._readable(dry_run)
        gone = {}
        for digest, entry in listed.items():
            path = self._path(entry)
            why = self._seal_problem(entry) or self._file_problem(entry) or rules.why(entry, path)
            if why:
                gone[digest] = Dropped(f"{digest[:16]} ({entry.key.graph})", why, _size(path))
        dropped += gone.values()
        if gone and not dry_run:
            self.remove(gone)
        for path in self._unlisted(listed):
            dropped += self._drop_file(path, dry_run)
        return dropped

    def _path(self, entry: Entry) -> Path:
        return self.folder / f"{entry.key.digest}.engine"

    def _seal_problem(self, entry: Entry) -> str:
        right = hmac.compare_digest(entry.seal.encode(), entry.sealed_with(self._secret).encode())
        return "" if right else "was not listed by this machine"

    def _file_problem(self, entry: Entry) -> str:
        path = self._path(entry)
        try:
            found = file_digest(path)
        except OSError as error:
            return _reason(error)
        return "" if found == entry.sha256 else "has changed since it was built"

    def _keep(self, key: EngineKey, partial: Path, origin: str) -> Path:
        """Rename a finished file and list it."""
        sha256 = file_digest(partial)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = Entry(key, sha256, partial.stat().st_size, now, origin)
        entry = replace(entry, seal=entry.sealed_with(self._secret))
        with self._manifest_lock():
            listed = self._manifest()
            partial.replace(self._path(entry))
            self._write_manifest(listed | {key.digest: entry})
        return self._path(entry)

    def _manifest(self) -> dict[str, Entry]:
        path = self.folder / "manifest.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != _SCHEMA:
                raise ValueError(f"schema {content['schema']}, this std-rt reads {_SCHEMA}")
            entries = [_entry_from(fields) for fields in content["entries"]]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(
                f"the list of engines {path} cannot be read ({error!r}); run: {MEND}"
            ) from error
        return {entry.key.digest: entry for entry in entries}

    def _write_manifest(self, listed: Mapping[str, Entry]) -> None:
        entries = [entry.as_dict() for entry in listed.values()]
        text = json.dumps({"schema": _SCHEMA, "entries": entries}, indent=1, ensure_ascii=False) + "\n"
        partial = self.folder / f"manifest.{secrets.token_hex(4)}.tmp"
        try:
            partial.write_text(text, encoding="utf-8", newline="\n")
            partial.replace(self.folder / "manifest.json")
        finally:
            partial.unlink(missing_ok=True)

    def _readable(self, dry_run: bool) -> tuple[dict[str, Entry], list[Dropped]]:
        """The manifest; where it cannot be read, an empty one, and the note that says so."""
        path = self.folder / "manifest.json"
        try:
            return self._manifest(), []
        except BackendError:
            note = Dropped(path.name, "cannot be read", _size(path))
            if not dry_run:
                path.unlink(missing_ok=True)
            return {}, [note]

    def _unlisted(self, listed: Mapping[str, Entry]) -> list[Path]:
        found = [*self.folder.glob("*.engine"), *self.folder.glob("*.partial"), *self.folder.glob("*.tmp")]
        return sorted(path for path in found if path.suffix != ".engine" or path.stem not in listed)

    def _drop_file(self, path: Path, dry_run: bool) -> list[Dropped]:
        """Delete an unlisted file, unless a build that goes on right now owns it."""
        digest = path.name.split(".")[0]
        try:
            with self._lock(digest, timeout_s=0):
                if path.suffix == ".engine" and digest in self._readable(dry_run=True)[0]:
                    return []  # listed meanwhile
                why = "not listed" if path.suffix == ".engine" else "rest of an interrupted build"
                dropped = Dropped(path.name, why, _size(path))
                if not dry_run:
                    _unlink(path)
                return [dropped]
        except Timeout:
            return []

    def _lock(self, name: str, timeout_s: float = -1) -> FileLock:
        return FileLock(self.folder / "locks" / f"{name}.lock", timeout=timeout_s)

    def _manifest_lock(self) -> FileLock:
        return self._lock("manifest")

    @contextmanager
    def _room(self, key: EngineKey) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if disk_is_full(error) else str(error)
            raise BackendError(
                f"the engine of '{key.graph}' cannot be kept in {self.folder}: {reason}; make room (as with: "
                f"{MEND}) or set STD_RT_CACHE to a folder on another disk"
            ) from error


@dataclass(frozen=True)
class _Rules:
    """When an engine that is in order is no longer of use."""

    keep_bundles: Collection[str] | None
    versions: Mapping[str, str]
    drivers: Mapping[str, str]
    older_than_days: float | None
    everything: bool

    def why(self, entry: Entry, path: Path) -> str:
        key = entry.key
        if self.everything:
            return "asked for"
        if self.keep_bundles is not None and key.bundle and key.bundle not in self.keep_bundles:
            return "its bundle is no longer there"
        if self.versions.get(key.product, key.version) != key.version:
            return f"for {key.product} {key.version}, installed is {self.versions[key.product]}"
        if key.driver and self.drivers.get(key.product, key.driver) != key.driver:
            return f"for driver {key.driver}, installed is {self.drivers[key.product]}"
        age_days = (time.time() - path.stat().st_mtime) / _DAY_S
        if self.older_than_days is not None and age_days > self.older_than_days:
            return f"not used for {age_days:.0f} days"
        return ""


def data_root() -> Path | None:
    """The user's data folder, where the secret lies, or None; ``STD_RT_DATA`` overrides it."""
    return user_folder("STD_RT_DATA", "user_data_dir")


def _secret(data: Path) -> bytes:
    """This machine's secret, made at first use and readable by its owner alone (where there are modes)."""
    path = data / "engine-secret"
    if not path.is_file():
        with FileLock(data / "engine-secret.lock"):
            if not path.is_file():
                partial = data / f"engine-secret.{secrets.token_hex(4)}.tmp"
                handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(handle, "wb") as file:
                    file.write(secrets.token_bytes(_SECRET_BYTES))
                partial.replace(path)
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise BackendError(f"{path} is damaged ({len(secret)} bytes); delete it and run: {MEND}")
    return secret


def _entry_from(fields: Mapping[str, Any]) -> Entry:
    key = EngineKey.from_dict(fields["key"])
    names = ("created", "origin", "seal")
    return Entry(key, str(fields["sha256"]), int(fields["bytes"]), *(str(fields[name]) for name in names))


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _refusal(entry: Entry, path: Path, problem: str) -> str:
    graph, product = entry.key.graph, entry.key.product
    return f"the {product} engine of '{graph}' is not used: {path} {problem}; run: {MEND}"


def _reason(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def _touch(path: Path) -> None:
    """Note the use, for `EngineStore.gc`; where the file is another user's it stays as it was."""
    with suppress(OSError):
        os.utime(path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _unlink(path: Path) -> int:
    size = _size(path)
    path.unlink(missing_ok=True)
    return size
