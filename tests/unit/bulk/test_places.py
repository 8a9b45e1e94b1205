"""Files by address: Arrow's and fsspec's file systems give what the local one gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from pyarrow import ArrowException, fs
from support.cli_support import files_in

from std_rt.bulk import places
from std_rt.bulk.options import BulkOptions
from std_rt.bulk.plan import items, wishes
from std_rt.bulk.stages import PaintBlock, ReadBlock, WriteBlock
from std_rt.core.bundle import Bundle
from std_rt.core.errors import MediaError

SCHEMES = ["", "file://", "twin://"]


class _Twin(LocalFileSystem):  # type: ignore[misc]
    """The local files under a scheme that only fsspec knows."""

    protocol = "twin"


fsspec.register_implementation("twin", _Twin, clobber=True)


def test_both_libraries_are_used(tmp_path: Path) -> None:
    systems = [places.opened(f"{scheme}{tmp_path}") for scheme in SCHEMES]
    assert [path for _, path in systems] == [str(tmp_path)] * 3
    assert isinstance(systems[1][0], fs.LocalFileSystem)
    assert isinstance(systems[2][0], fs.PyFileSystem)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_is_listed_and_matched(scheme: str, photos: Path) -> None:
    (photos / ".hidden").mkdir()
    (photos / ".hidden" / "x.png").touch()
    found = places.listed(f"{scheme}{photos}")
    assert [*found] == ["a.png", "b.jpg", "c.png", "more/a.png", "more/d.png"]
    assert found["more/d.png"][0] == (photos / "more" / "d.png").stat().st_size
    assert places.stats([f"{scheme}{photos}/a.png", f"{scheme}{photos}/none.png"]) == [
        found["a.png"],
        (-1, -1),
    ]
    assert places.matching(f"{scheme}{photos}/**/a.png") == [
        f"{scheme}{photos}/a.png",
        f"{scheme}{photos}/more/a.png",
    ]
    assert places.listed(f"{scheme}{photos}/nowhere") == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_appears_as_a_whole_or_not_at_all(scheme: str, tmp_path: Path) -> None:
    with places.stored(f"{scheme}{tmp_path}/new/a.bin") as path:
        path.write_bytes(b"first")
        assert not (tmp_path / "new" / "a.bin").exists()
    with suppress(EOFError), places.stored(f"{scheme}{tmp_path}/new/a.bin") as path:
        path.write_bytes(b"half")
        raise EOFError
    assert files_in(tmp_path / "new") == {"a.bin"}
    with places.fetched(f"{scheme}{tmp_path}/new/a.bin") as path:
        assert path.read_bytes() == b"first"


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_what_is_missing_or_closed_is_named_by_its_address(scheme: str, tmp_path: Path) -> None:
    missing, closed = f"{scheme}{tmp_path}/none.png", f"{scheme}{tmp_path}/file/a.png"
    with pytest.raises(MediaError, match=f"{missing} cannot be read"), places.fetched(missing):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(MediaError, match=f"{closed} cannot be written"), places.stored(closed) as path:
        path.touch()


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    with suppress(EOFError), places.stored(str(tmp_path / "in" / "a.png")) as path:
        left = path
        raise EOFError
    left.touch()
    (tmp_path / "in" / ".kept.png").touch()
    (tmp_path / "in" / "b.part.png").touch()
    places.sweep(str(tmp_path))
    assert files_in(tmp_path / "in") == {".kept.png", "b.part.png"}


def test_a_store_without_folders_of_its_own_is_like_a_disk(tmp_path: Path) -> None:
    """fsspec's memory, which stands for S3 and its like: nothing of it is a path of this machine."""
    folder = f"memory://{tmp_path.name}"
    for name in ("a.png", "more/b.png"):
        with places.stored(f"{folder}/{name}") as path:
            path.write_bytes(name.encode())
    with suppress(EOFError), places.stored(f"{folder}/half.png") as path:
        path.write_bytes(b"half")
        raise EOFError
    found = places.listed(folder)
    assert {name: size for name, (size, _) in found.items()} == {"a.png": 5, "more/b.png": 10}
    assert places.stats([f"{folder}/a.png", f"{folder}/none.png"]) == [found["a.png"], (-1, -1)]
    with places.fetched(f"{folder}/more/b.png") as path:
        assert path.read_bytes() == b"more/b.png"


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("gs://anonymous@studio/a b/c.png", "studio/a b/c.png"),
        ("gs://studio", "studio"),
        ("s3://key:secret@studio/a.png?region=eu-central-1", "studio/a.png"),
        ("file:///", "/"),
    ],
)
def test_an_address_may_say_who_asks(address: str, path: str) -> None:
    assert places.opened(address)[1] == path


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ArrowException(
                "Unknown error: google::cloud::Status(UNKNOWN: Permanent error, with a last message of No "
                "token. error_info={reason=UNKNOWN, metadata={original-message=No token.}})"
            ),
            "No token.",
        ),
        (
            PermissionError(13, "google::cloud::Status(PERMISSION_DENIED: No error_info={})"),
            "PERMISSION_DENIED: No",
        ),
        (OSError("AWS Error ACCESS_DENIED"), "AWS Error ACCESS_DENIED"),
    ],
)
def test_whatever_a_store_raises_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    store = SimpleNamespace(
        type_name="gcs", open_input_stream=fail, open_output_stream=fail, get_file_info=fail, delete_file=fail
    )
    monkeypatch.setattr(places, "_file_system", lambda *_: (store, "studio"))
    place = "gs://studio/a.png"
    with pytest.raises(MediaError) as read, places.fetched(place):
        pass
    assert str(read.value) == f"{place} cannot be read: {said}"
    asks: list[Callable[[str], object]] = [places.listed, places.sweep, places.matching]
    for ask in (*asks, lambda each: places.stats([each])):
        with pytest.raises(MediaError) as asked:
            ask(place)
        assert str(asked.value) == str(read.value)
    with pytest.raises(MediaError) as written, places.stored(place) as path:
        path.touch()
    assert str(written.value) == f"{place} cannot be written: {said}"
    places.remove(place)


def test_an_unknown_scheme_says_what_is_missing() -> None:
    with pytest.raises(MediaError, match=r"nonesuch://a/b cannot be opened: .*; install"):
        places.opened("nonesuch://a/b")


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_items_by_address_become_the_same_files(
    handmade: Bundle, photos: Path, art: Path, tmp_path: Path, scheme: str
) -> None:
    from std_rt.bulk.job import Job, fitter

    made = []
    for where, name in (("", "here"), (scheme, "there")):
        out = f"{where}{tmp_path / name}"
        options = BulkOptions(bundle=str(handmade.path))
        plan = items(wishes([f"{where}{photos}"], [f"{where}{art}"]), "", {})
        read = ReadBlock(fitter(Job(plan, options, handmade, out, None))).run(plan)  # type: ignore[arg-type]
        rows = WriteBlock(out).run(PaintBlock(options, out)(read)).to_pylist()
        assert [row["reason"] for row in rows] == [""] * 5
        made.append({row["output"]: (tmp_path / name / row["output"]).read_bytes() for row in rows})
    assert made[0] == made[1]
