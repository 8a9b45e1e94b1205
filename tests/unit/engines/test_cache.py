"""The engine cache: what is listed, what is refused, and what happens to builds that meet or break off."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from std_rt.core.errors import BackendError
from std_rt.engines.cache import EngineCache, EngineKey, Entry, Removed

KEY = EngineKey("b1", "unet", {"sample": (1, 4, 8, 8)}, "tensorrt_rtx", "1.7", "sm89", "", "level=3")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STD_RT_DATA", str(tmp_path / "data"))


@pytest.fixture
def cache() -> EngineCache:
    opened = EngineCache.open()
    assert opened is not None
    return opened


def test_an_engine_is_built_once_and_found_with_its_bytes(cache: EngineCache) -> None:
    assert cache.find(KEY) is None
    assert cache.read(KEY) is None
    path = cache.build(KEY, lambda file: _write(file, b"engine"))
    assert cache.build(KEY, b"not used") == path == cache.find(KEY)
    assert cache.read(KEY) == path.read_bytes() == b"engine"
    assert path.name == f"{KEY.digest}.engine"
    assert cache.verify() == []
    again = EngineCache.open()
    assert again is not None
    assert again.find(KEY) == path


def test_replace_makes_it_anew(cache: EngineCache) -> None:
    cache.build(KEY, b"old")
    assert cache.build(KEY, b"new", replace=True).read_bytes() == b"new"
    assert cache.read(KEY) == b"new"
    assert len(cache.entries()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"bundle": "b2"},
        {"graph": "vae_decoder"},
        {"shapes": {"sample": (2, 4, 8, 8)}},
        {"shapes": {"latents": (1, 4, 8, 8)}},
        {"product": "tensorrt"},
        {"version": "1.8"},
        {"target": "sm120"},
        {"driver": "cuda 13.0"},
        {"flags": "level=4"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_one_thing_different_is_another_engine(cache: EngineCache, change: dict[str, object]) -> None:
    cache.build(KEY, b"engine")
    other = replace(KEY, **change)  # type: ignore[arg-type]
    assert other.digest != KEY.digest
    assert cache.find(other) is None


@given(st.dictionaries(st.text(), st.lists(st.integers(0, 9)).map(tuple)), st.text(), st.text())
def test_an_entry_survives_the_manifest(shapes: dict[str, tuple[int, ...]], graph: str, flags: str) -> None:
    key = EngineKey("b", graph, shapes, "p", "v", "t", "d", flags)
    entry = Entry(key, "0" * 64, 5, "2026-01-01", "origin").sealed_with(b"secret")
    back = Entry.from_dict(json.loads(json.dumps(entry.as_dict())))
    assert back == entry == back.sealed_with(b"secret") != back.sealed_with(b"other")
    assert back.key.digest == key.digest


def test_an_engine_for_several_targets_serves_each_of_them(cache: EngineCache) -> None:
    path = cache.build(replace(KEY, target="sm89+sm120"), b"both")
    assert cache.find(KEY) == path
    assert cache.find(replace(KEY, target="sm120")) == path
    assert cache.find(replace(KEY, target="sm86")) is None
    assert cache.find(replace(KEY, target="sm86+sm89")) is None
    assert cache.find(replace(KEY, target="sm120", version="1.8")) is None


def test_changed_bytes_are_refused_with_the_command_that_mends_it(cache: EngineCache) -> None:
    cache.build(KEY, b"engine").write_bytes(b"eNgine")
    for ask in (cache.find, cache.read, lambda key: cache.build(key, b"x")):
        with pytest.raises(
            BackendError, match=r"'unet' is not used: .* has changed.*; run: std-rt engines gc"
        ):
            ask(KEY)
    assert len(cache.verify()) == 1
    [dropped] = cache.gc()
    assert dropped.why == "has changed since it was built"
    assert cache.read(KEY) is None
    assert cache.build(KEY, b"engine").read_bytes() == b"engine"


def test_a_missing_file_is_refused(cache: EngineCache) -> None:
    cache.build(KEY, b"engine").unlink()
    for ask in (cache.find, cache.read):
        with pytest.raises(BackendError, match="is missing; run: std-rt engines gc"):
            ask(KEY)


@pytest.mark.parametrize("field", ["sha256", "bytes", "created", "origin", "seal", "key"])
def test_an_entry_changed_by_hand_is_refused(cache: EngineCache, field: str) -> None:
    path = cache.build(KEY, b"engine")
    manifest = cache.folder / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    [entry] = content["entries"]
    asked = KEY
    if field == "key":  # an engine listed for one thing, offered for another
        entry["key"]["bundle"], asked = "b2", replace(KEY, bundle="b2")
        path.rename(path.with_name(f"{asked.digest}.engine"))
    else:
        entry[field] = 7 if field == "bytes" else "é"
    manifest.write_text(json.dumps(content), encoding="utf-8")
    for ask in (cache.find, cache.read):
        with pytest.raises(BackendError, match="was not listed by this machine; run: std-rt engines gc"):
            ask(asked)


def test_a_cache_copied_from_another_machine_is_not_believed(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.build(KEY, b"engine")
    shutil.copytree(tmp_path / "cache", tmp_path / "copied")
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "copied"))
    monkeypatch.setenv("STD_RT_DATA", str(tmp_path / "other data"))
    there = EngineCache.open()
    assert there is not None
    with pytest.raises(BackendError, match="was not listed by this machine"):
        there.read(KEY)
    assert [dropped.why for dropped in there.gc()] == ["was not listed by this machine"]


def test_an_engine_file_that_is_not_listed_is_never_given_out(cache: EngineCache) -> None:
    (cache.folder / f"{KEY.digest}.engine").write_bytes(b"planted")
    assert cache.find(KEY) is None
    assert cache.read(KEY) is None
    assert cache.verify() == [f"{KEY.digest}.engine is not listed"]
    assert cache.build(KEY, b"ours").read_bytes() == b"ours"


def test_the_secret_is_made_once_and_is_its_owners_alone(cache: EngineCache, tmp_path: Path) -> None:
    path = tmp_path / "data" / "engine-secret"
    secret = path.read_bytes()
    EngineCache.open()
    assert path.read_bytes() == secret
    assert len(secret) == 32
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"short")
    with pytest.raises(BackendError, match=r"engine-secret is damaged \(5 bytes\); delete it"):
        EngineCache.open()


def test_a_failed_build_leaves_nothing(cache: EngineCache) -> None:
    def fail(path: Path) -> None:
        _write(path, b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build(KEY, fail)
    assert cache.find(KEY) is None
    assert [path.name for path in cache.folder.iterdir() if path.is_file()] == []


def test_a_killed_build_leaves_no_final_name_and_its_rest_is_collected(cache: EngineCache) -> None:
    code = (
        "import os\nfrom std_rt.engines.cache import EngineCache, EngineKey\n"
        f"key = EngineKey(**{KEY.as_dict()!r})\n"
        "def make(path):\n    path.write_bytes(b'half')\n    os._exit(9)\n"
        "EngineCache.open().build(key, make)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 9
    assert cache.find(KEY) is None
    [rest] = [path for path in cache.folder.iterdir() if path.is_file()]
    assert rest.suffix == ".engine"
    assert rest.name.startswith(".")
    assert cache.verify() == [f"{rest.name} is not listed"]
    assert [dropped.why for dropped in cache.gc(dry_run=True)] == ["left by an interrupted build"]
    assert rest.exists()
    cache.gc()
    assert not rest.exists()
    assert cache.build(KEY, b"engine").read_bytes() == b"engine"


def test_gc_leaves_a_build_that_goes_on_alone(cache: EngineCache) -> None:
    seen = []

    def make(path: Path) -> None:
        _write(path, b"engine")
        collector = threading.Thread(target=lambda: seen.append(cache.gc()))
        collector.start()
        collector.join()

    assert cache.build(KEY, make).read_bytes() == b"engine"
    assert seen == [[]]


def test_builders_at_once_build_once(cache: EngineCache) -> None:
    made, found = [], []

    def make(path: Path) -> None:
        made.append(path)
        time.sleep(0.05)
        _write(path, b"engine")

    def work() -> None:
        own = EngineCache.open()
        assert own is not None
        found.append(own.build(KEY, make))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert set(found) == {cache.find(KEY)}


def test_different_engines_built_at_once_are_all_listed(cache: EngineCache) -> None:
    keys = [replace(KEY, graph=f"g{i}") for i in range(12)]
    threads = [threading.Thread(target=cache.build, args=(key, key.graph.encode())) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {cache.read(key) for key in keys} == {key.graph.encode() for key in keys}


def test_a_full_disk_is_one_line(cache: EngineCache) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        BackendError, match=r"engine of 'unet' in .* cannot be written: the disk is full; .*STD_RT_CACHE"
    ):
        cache.build(KEY, full)
    assert cache.entries() == []


def test_an_unreadable_manifest_is_one_line_and_gc_mends_it(cache: EngineCache) -> None:
    path = cache.build(KEY, b"engine")
    (cache.folder / "manifest.json").write_text("{", encoding="utf-8")
    for ask in (cache.entries, cache.verify, lambda: cache.find(KEY)):
        with pytest.raises(BackendError, match=r"cannot be read .*; run: std-rt engines gc"):
            ask()
    assert {dropped.why for dropped in cache.gc()} == {"cannot be read", "not listed"}
    assert not path.exists()
    assert cache.entries() == []


def test_no_cache_where_no_folder_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    for name in ("STD_RT_CACHE", "STD_RT_DATA"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(file / "inside"))
            assert EngineCache.open() is None, name


def test_gc_removes_what_it_is_given_a_reason_for(cache: EngineCache) -> None:
    other = replace(KEY, graph="other")
    for key in (KEY, other):
        cache.build(key, b"12345")

    def unused(entry: Entry) -> str:
        return "old" if entry.key == other else ""

    [removed] = cache.gc(unused, dry_run=True)
    assert len(cache.entries()) == 2
    assert removed == Removed(f"{other.digest[:16]} (other)", "old", 5)
    assert cache.gc(unused) == [removed]
    assert [entry.key for entry in cache.entries()] == [KEY]
    assert cache.verify() == cache.gc(unused) == []


def test_use_keeps_an_engine_young(cache: EngineCache) -> None:
    path = cache.build(KEY, b"engine")
    for use in (cache.find, cache.read):
        os.utime(path, (0, 0))
        use(KEY)
        assert path.stat().st_mtime > time.time() - 3600


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def test_a_mapped_engine_is_the_files_pages_checked_as_all_are(cache: EngineCache) -> None:
    with cache.mapped(KEY) as nothing:
        assert nothing is None
    path = cache.build(KEY, b"engine" * 1000)
    with cache.mapped(KEY) as data:
        assert isinstance(data, mmap.mmap)  # no copy of 5 GB
        assert data[:] == path.read_bytes()
    assert data.closed
    path.write_bytes(b"")  # which cannot be mapped
    with pytest.raises(BackendError, match="has changed since it was built"), cache.mapped(KEY):
        pass
