"""The atomic writer: the old file or the whole new one, and one line where the disk refuses."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from std_rt.core.errors import BackendError, MediaError
from std_rt.core.files import alone, atomic_file, missing, reason, write_bytes, write_text, writing


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_as_a_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one\r\n", durable=durable)
    assert path.read_bytes() == b"one\r\n"
    with atomic_file(path, durable=durable) as partial:
        partial.write_bytes(b"two")
        assert (partial.parent, partial.suffix) == (tmp_path, ".txt")
        assert path.read_bytes() == b"one\r\n"
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken"), ValueError("no")])
def test_what_breaks_off_leaves_the_old_file_and_passes_through(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def write_half() -> None:
        with atomic_file(path, error=MediaError) as partial:
            partial.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        write_half()
    assert caught.value is error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_an_os_error_or_the_error_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "no such folder" / "a.bin"
    with pytest.raises(FileNotFoundError):
        write_bytes(path, b"")
    said = r"a\.bin cannot be written: No such file"
    with pytest.raises(BackendError, match=said) as caught, atomic_file(path, error=BackendError):
        pytest.fail("the block must not run")
    assert "\n" not in str(caught.value)


def test_a_name_taken_by_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    said = "close the program that has it open"
    with pytest.raises(MediaError, match=said), atomic_file(tmp_path / "a", error=MediaError):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f".{name}.part.bin" for name in ("a.01234567", "a.89abcdef", "b.01234567"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    write_bytes(tmp_path / "a.bin", b"", durable=True)
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, None])
def test_a_full_disk_is_called_so(number: int | None) -> None:
    # NumPy's tofile gives no number.
    full = OSError("9 requested and 5 written") if number is None else OSError(number, os.strerror(number))
    assert reason(full) == "the disk is full"
    said = r"^out cannot be written: the disk is full; make room$"
    with pytest.raises(BackendError, match=said), writing(Path("out"), BackendError, "make room"):
        raise full


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_bytes(tmp_path / "a", b"")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_an_example_is_found_by_its_name() -> None:
    told = missing(Path("wave"))
    assert told.startswith("wave does not exist here; the example of that name is ")
    assert Path(told.rpartition(" is ")[2]).is_file()
    assert "example" not in missing(Path("waves"))
    assert "example" not in missing(Path("a/wave"))


def test_a_folder_is_for_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(folder: Path) -> AbstractContextManager[None]:
        return alone(folder, ".lock", "it is busy", MediaError, "choose another")

    folder = tmp_path / "a" / "b"
    with held(folder), pytest.raises(MediaError, match=r"^it is busy$"), held(folder):
        pass
    with held(folder):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(MediaError, match=r"file cannot be written: .*; choose another"),
        held(tmp_path / "file"),
    ):
        pass

    def fail(number: int) -> None:
        def acquire(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("filelock.FileLock.acquire", acquire)

    fail(errno.ENOLCK)  # a file system without locks
    with held(folder), held(folder):
        pass
    fail(errno.EACCES)
    with (
        pytest.raises(MediaError, match=r"b cannot be written: Permission denied; choose another"),
        held(folder),
    ):
        pass
