"""The engine store: what is listed, what is refused, and what happens to builds that meet or break off."""

from __future__ import annotations

import errno
import json
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
from std_rt.engines.cache import EngineKey, EngineStore

KEY = EngineKey("b1", "unet", {"sample": (1, 4, 8, 8)}, "tensorrt_rtx", "1.7", "sm89", "", "level=3")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STD_RT_DATA", str(tmp_path / "data"))


@pytest.fixture
def store() -> EngineStore:
    opened = EngineStore.open()
    assert opened is not None
    return opened


def test_an_engine_is_built_once_and_found_with_its_bytes(store: EngineStore) -> None:
    assert store.find(KEY) is None
    assert store.read(KEY) is None
    path = store.build(KEY, lambda file: _write(file, b"engine"))
    assert store.build(KEY, b"not used") == path == store.find(KEY)
    assert store.read(KEY) == path.read_bytes() == b"engine"
    assert path.name == f"{KEY.digest}.engine"
    assert store.verify() == []
    again = EngineStore.open()
    assert again is not None
    assert again.find(KEY) == path


def test_replace_makes_it_anew(store: EngineStore) -> None:
    store.build(KEY, b"old")
    assert store.build(KEY, b"new", replace=True).read_bytes() == b"new"
    assert store.read(KEY) == b"new"
    assert len(store.entries()) == 1


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
def test_one_thing_different_is_another_engine(store: EngineStore, change: dict[str, object]) -> None:
    store.build(KEY, b"engine")
    other = replace(KEY, **change)  # type: ignore[arg-type]
    assert other.digest != KEY.digest
    assert store.find(other) is None


@given(st.dictionaries(st.text(), st.lists(st.integers(0, 9)).map(tuple)), st.text(), st.text())
def test_a_key_survives_the_manifest(shapes: dict[str, tuple[int, ...]], graph: str, flags: str) -> None:
    key = EngineKey("b", graph, shapes, "p", "v", "t", "d", flags)
    back = EngineKey.from_dict(json.loads(json.dumps(key.as_dict())))
    assert back == key
    assert back.digest == key.digest


def test_an_engine_for_several_targets_serves_each_of_them(store: EngineStore) -> None:
    path = store.build(replace(KEY, target="sm89+sm120"), b"both")
    assert store.find(KEY) == path
    assert store.find(replace(KEY, target="sm120")) == path
    assert store.find(replace(KEY, target="sm86")) is None
    assert store.find(replace(KEY, target="sm86+sm89")) is None
    assert store.find(replace(KEY, target="sm120", version="1.8")) is None


def test_changed_bytes_are_refused_with_the_command_that_mends_it(store: EngineStore) -> None:
    store.build(KEY, b"engine").write_bytes(b"eNgine")
    for ask in (store.find, store.read, lambda key: store.build(key, b"x")):
        with pytest.raises(
            BackendError, match=r"'unet' is not used: .* has changed.*; run: std-rt engines gc"
        ):
            ask(KEY)
    assert len(store.verify()) == 1
    [dropped] = store.gc()
    assert dropped.why == "has changed since it was built"
    assert store.read(KEY) is None
    assert store.build(KEY, b"engine").read_bytes() == b"engine"


def test_a_missing_file_is_refused(store: EngineStore) -> None:
    store.build(KEY, b"engine").unlink()
    for ask in (store.find, store.read):
        with pytest.raises(BackendError, match="is missing; run: std-rt engines gc"):
            ask(KEY)


@pytest.mark.parametrize("field", ["sha256", "bytes", "created", "origin", "seal", "key"])
def test_an_entry_changed_by_hand_is_refused(store: EngineStore, field: str) -> None:
    path = store.build(KEY, b"engine")
    manifest = store.folder / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    [entry] = content["entries"]
    asked = KEY
    if field == "key":  # an engine listed for one thing, offered for another
        entry["key"]["bundle"], asked = "b2", replace(KEY, bundle="b2")
        path.rename(path.with_name(f"{asked.digest}.engine"))
    else:
        entry[field] = 7 if field == "bytes" else "é"
    manifest.write_text(json.dumps(content), encoding="utf-8")
    for ask in (store.find, store.read):
        with pytest.raises(BackendError, match="was not listed by this machine; run: std-rt engines gc"):
            ask(asked)


def test_a_cache_copied_from_another_machine_is_not_believed(
    store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.build(KEY, b"engine")
    shutil.copytree(tmp_path / "cache", tmp_path / "copied")
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "copied"))
    monkeypatch.setenv("STD_RT_DATA", str(tmp_path / "other data"))
    there = EngineStore.open()
    assert there is not None
    with pytest.raises(BackendError, match="was not listed by this machine"):
        there.read(KEY)
    assert [dropped.why for dropped in there.gc()] == ["was not listed by this machine"]


def test_an_engine_file_that_is_not_listed_is_never_given_out(store: EngineStore) -> None:
    (store.folder / f"{KEY.digest}.engine").write_bytes(b"planted")
    assert store.find(KEY) is None
    assert store.read(KEY) is None
    assert store.verify() == [f"{KEY.digest}.engine is not listed"]
    assert store.build(KEY, b"ours").read_bytes() == b"ours"


def test_the_secret_is_made_once_and_is_its_owners_alone(store: EngineStore, tmp_path: Path) -> None:
    path = tmp_path / "data" / "engine-secret"
    secret = path.read_bytes()
    EngineStore.open()
    assert path.read_bytes() == secret
    assert len(secret) == 32
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"short")
    with pytest.raises(BackendError, match=r"engine-secret is damaged \(5 bytes\); delete it"):
        EngineStore.open()


def test_a_failed_build_leaves_nothing(store: EngineStore) -> None:
    def fail(path: Path) -> None:
        _write(path, b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.build(KEY, fail)
    assert store.find(KEY) is None
    assert [path.name for path in store.folder.iterdir() if path.is_file()] == []


def test_a_killed_build_leaves_no_final_name_and_its_rest_is_collected(store: EngineStore) -> None:
    code = (
        "import os, sys\nfrom std_rt.engines.cache import EngineKey, EngineStore\n"
        f"key = EngineKey.from_dict({KEY.as_dict()!r})\n"
        "def make(path):\n    path.write_bytes(b'half')\n    os._exit(9)\n"
        "EngineStore.open().build(key, make)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 9
    assert store.find(KEY) is None
    [rest] = [path for path in store.folder.iterdir() if path.is_file()]
    assert rest.suffix == ".partial"
    assert [dropped.why for dropped in store.gc(dry_run=True)] == ["rest of an interrupted build"]
    assert rest.exists()
    store.gc()
    assert not rest.exists()
    assert store.build(KEY, b"engine").read_bytes() == b"engine"


def test_gc_leaves_a_build_that_goes_on_alone(store: EngineStore) -> None:
    seen = []

    def make(path: Path) -> None:
        _write(path, b"engine")
        collector = threading.Thread(target=lambda: seen.append(store.gc()))
        collector.start()
        collector.join()

    assert store.build(KEY, make).read_bytes() == b"engine"
    assert seen == [[]]


def test_builders_at_once_build_once(store: EngineStore) -> None:
    made, found = [], []

    def make(path: Path) -> None:
        made.append(path)
        time.sleep(0.05)
        _write(path, b"engine")

    def work() -> None:
        own = EngineStore.open()
        assert own is not None
        found.append(own.build(KEY, make))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert set(found) == {store.find(KEY)}


def test_different_engines_built_at_once_are_all_listed(store: EngineStore) -> None:
    keys = [replace(KEY, graph=f"g{i}") for i in range(12)]
    threads = [threading.Thread(target=store.build, args=(key, key.graph.encode())) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {store.read(key) for key in keys} == {key.graph.encode() for key in keys}


def test_a_full_disk_is_one_line(store: EngineStore) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BackendError, match=r"'unet' cannot be kept in .*: the disk is full; .*STD_RT_CACHE"):
        store.build(KEY, full)
    assert store.entries() == []


def test_an_unreadable_manifest_is_one_line_and_gc_mends_it(store: EngineStore) -> None:
    path = store.build(KEY, b"engine")
    (store.folder / "manifest.json").write_text("{", encoding="utf-8")
    for ask in (store.entries, store.verify, lambda: store.find(KEY)):
        with pytest.raises(BackendError, match=r"cannot be read .*; run: std-rt engines gc"):
            ask()
    assert {dropped.why for dropped in store.gc()} == {"cannot be read", "not listed"}
    assert not path.exists()
    assert store.entries() == []


def test_no_store_where_no_folder_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    for name in ("STD_RT_CACHE", "STD_RT_DATA"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(file / "inside"))
            assert EngineStore.open() is None, name


def test_gc_keeps_what_is_of_use_and_says_why_the_rest_goes(store: EngineStore) -> None:
    keep = [KEY, replace(KEY, bundle="", graph="glue"), replace(KEY, product="other", version="0")]
    gone = {
        replace(KEY, bundle="b9").digest: "its bundle is no longer there",
        replace(KEY, version="1.6").digest: "for tensorrt_rtx 1.6, installed is 1.7",
        replace(KEY, driver="cuda 12.9").digest: "for driver cuda 12.9, installed is cuda 13.0",
        replace(KEY, graph="old").digest: "not used for 40 days",
    }
    for key in (*keep, replace(KEY, bundle="b9"), replace(KEY, version="1.6")):
        store.build(key, b"12345")
    store.build(replace(KEY, driver="cuda 12.9"), b"12345")
    old = store.build(replace(KEY, graph="old"), b"12345")
    long_ago = time.time() - 40.2 * 86400
    os.utime(old, (long_ago, long_ago))
    rules = {"versions": {"tensorrt_rtx": "1.7"}, "drivers": {"tensorrt_rtx": "cuda 13.0"}}
    dropped = store.gc({"b1"}, **rules, older_than_days=30, dry_run=True)  # type: ignore[arg-type]
    assert len(store.entries()) == 7
    assert {item.name.split()[0]: item.why for item in dropped} == {k[:16]: why for k, why in gone.items()}
    assert {item.size for item in dropped} == {5}
    assert store.gc({"b1"}, **rules, older_than_days=30) == dropped  # type: ignore[arg-type]
    assert {entry.key.digest for entry in store.entries()} == {key.digest for key in keep}
    assert store.verify() == []
    assert store.gc({"b1"}, **rules, older_than_days=30) == []  # type: ignore[arg-type]


def test_use_keeps_an_engine_young(store: EngineStore) -> None:
    path = store.build(KEY, b"engine")
    os.utime(path, (0, 0))
    store.find(KEY)
    assert store.gc(older_than_days=1) == []
    os.utime(path, (0, 0))
    store.read(KEY)
    assert store.gc(older_than_days=1) == []


def test_remove_takes_file_and_entry(store: EngineStore) -> None:
    store.build(KEY, b"12345")
    assert store.remove([KEY.digest, "no such"]) == 5
    assert store.entries() == store.verify() == []


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
