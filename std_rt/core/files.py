"""File helpers: the one atomic writer, sha256, user folders, short messages for disk errors.

    with writing(path, MediaError), atomic_file(path) as partial:
        picture.save(partial)

A half-written file never has the final name: it is written next to it under another name and renamed when
complete.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from std_rt.core.errors import MediaError, StdRtError

__all__ = [
    "alone",
    "atomic_file",
    "cache_root",
    "check_input",
    "check_output",
    "disk_is_full",
    "file_digest",
    "is_inside",
    "missing",
    "reason",
    "user_folder",
    "write_bytes",
    "write_text",
    "writing",
]

_EXAMPLES = Path(__file__).parents[1] / "examples"
_ANOTHER_PLACE = "choose another place with -o"
_LEFT_BEHIND_S = 24 * 3600  # no file takes that long to write
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.IGNORECASE)  # a Path has one slash of the two
_CLOSE_IT = "close the program that has it open, or choose another place with -o"  # Windows refuses then


def file_digest(path: Path) -> str:
    """sha256 of a file in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """The short cause of an operating-system or decoder error, one line, without paths."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    full = isinstance(error, OSError) and disk_is_full(error)
    return "the disk is full" if full else " ".join(str(text).split())


def disk_is_full(error: OSError) -> bool:
    """Whether a write failed for lack of space: a full disk, a quota, or a limit on file sizes."""
    known = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
    # NumPy's tofile gives no number, only how much was written.
    return error.errno in known or (error.errno is None and "requested and" in str(error))


@contextmanager
def writing(
    path: Path | str, error: type[StdRtError] = MediaError, advice: str = _ANOTHER_PLACE
) -> Iterator[None]:
    """Turn an OSError inside the block into ``error`` in one line: ``path``, the reason and ``advice``."""
    try:
        yield
    except OSError as found:
        raise error(f"{path} cannot be written: {reason(found)}; {advice}") from found


@contextmanager
def alone(folder: Path, lock: str, busy: str, error: type[StdRtError], advice: str) -> Iterator[None]:
    """``folder``, which is made, for this process until the block ends, by a file ``lock`` in it.

    Raises ``error``: ``busy`` if another process has it, or in one line with ``advice`` if it cannot be
    written. Without effect on file systems without locks, as some that machines share.
    """
    from filelock import FileLock, Timeout

    held = FileLock(folder / lock, thread_local=False)
    with writing(folder, error, advice):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            raise error(busy) from None
        except (OSError, NotImplementedError) as found:
            if isinstance(found, OSError) and found.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
    try:
        yield
    finally:
        held.release()


@contextmanager
def atomic_file(
    path: Path, *, durable: bool = False, mode: int = 0o666, error: type[StdRtError] | None = None
) -> Iterator[Path]:
    """A new empty file next to ``path``, with its suffix; renamed to ``path`` if the block succeeds.

    If the block raises (Ctrl-C included) the new file is removed and ``path`` is left as it was. ``durable``
    forces content and name to the disk, so that a power cut leaves the old file or the new one, never an
    empty one; it also removes partial files that killed processes left behind. ``mode`` (less the umask) is
    that of the new file.

    Raises OSError, or ``error`` if given, if the file cannot be created or renamed. Exceptions of the block
    pass through unchanged (`writing` turns its OSErrors into one line, too).
    """
    if durable:
        _sweep(path)
    with writing(path, error) if error else nullcontext():
        partial = _new_partial(path, mode)
    try:
        yield partial
        with writing(path, error, _CLOSE_IT) if error else nullcontext():
            if durable:
                _sync(partial, os.O_RDWR)
            partial.replace(path)
        if durable and os.name == "posix":
            with suppress(OSError):  # not every file system can do it; the content is safe already
                _sync(path.parent, os.O_RDONLY)
    finally:
        # After the rename there is nothing left to remove. Windows keeps a file that is still open.
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Replace ``path`` by ``data`` as a whole; see `atomic_file`. Raises OSError."""
    with atomic_file(path, durable=durable) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """`write_bytes` of ``text`` in UTF-8, newlines as given."""
    write_bytes(path, text.encode("utf-8"), durable=durable)


def check_input(path: Path, *, may_be_empty: bool = False) -> None:
    """Raise MediaError unless ``path`` is a readable file with at least one byte (or none)."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise MediaError(f"{path} is a folder; name a file in it")
        if not stat.S_ISREG(found.st_mode):
            raise MediaError(f"{path} is a pipe or a device, not a file; save what it gives to a file first")
        if found.st_size == 0 and not may_be_empty:
            raise MediaError(f"{path} is empty (zero bytes); nothing can be read from it")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise MediaError(missing(path)) from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be read: {reason(error)}") from error


def missing(path: Path | str) -> str:
    """What to say of a file that is not there: an address, a pattern, a ``~`` and a wrong name differ."""
    text = path.as_posix() if isinstance(path, Path) else path
    match = _ADDRESS.fullmatch(text)
    if match is not None and match[1].lower() == "file":
        return f"{match[1]}://{match[2]} is an address; give the path alone"
    if match is not None:
        url = f"{match[1]}://{match[2]}"
        return f'{url} is a web address, and std-rt reads files; download it first: curl -LOJ "{url}"'
    if text.startswith("~"):
        return f"{path} does not exist: the shell has not expanded ~; write the whole path"
    if os.name == "posix" and "\\" in text:
        return f"{path} does not exist; on this system / separates folders, and \\ is a part of a name"
    if text.isidentifier() and (example := next(_EXAMPLES.glob(f"*/{text}.jpg"), None)) is not None:
        return f"{path} does not exist here; the example of that name is {example}"
    if any(mark in text for mark in "*?["):
        return f"no file matches {path}; check the pattern and the folder"
    return f"{path} does not exist; check the spelling and the folder"


def check_output(
    sink: Path, *, source: Path | None = None, overwrite: bool = False, flag: str = "-o"
) -> None:
    """Refuse an output before any work is done; creates the output's folder if it is missing.

    ``flag``: the option that named it, for messages.

    Raises MediaError if ``sink`` is ``source`` (even with ``overwrite``), is a folder, exists and
    ``overwrite`` is False, or if its folder cannot be made or written to.
    """
    try:
        _refuse_taken(sink, source, overwrite, flag)
        sink.parent.mkdir(parents=True, exist_ok=True)
        _new_partial(sink).unlink()
    except (OSError, ValueError) as error:
        raise MediaError(
            f"{sink} cannot be written: {reason(error)}; choose another place with {flag}"
        ) from error


def _refuse_taken(sink: Path, source: Path | None, overwrite: bool, flag: str) -> None:
    if sink.parts[:1] == ("~",) and not Path("~").exists():
        raise MediaError(
            f"{sink} would make a folder named ~ here: the shell expands it only at the beginning of a word; "
            f"write {flag} {sink}, with a space"
        )
    if sink.is_dir():
        raise MediaError(f"{sink} is a folder; give a file name with {flag}, such as {sink / 'out.png'}")
    if not sink.exists():
        above = next((folder for folder in sink.parents if folder.exists()), None)
        if above is not None and not above.is_dir():
            what = f"{sink} cannot be written: {above} is a file, not a folder"
            raise MediaError(f"{what}; choose another place with {flag}")
        return
    if source is not None and source.exists() and source.samefile(sink):
        raise MediaError(f"{sink} is the input itself; give another name with {flag}")
    if not overwrite:
        raise MediaError(f"{sink} exists already; add --overwrite to replace it or {flag} for another name")


def _new_partial(path: Path, mode: int = 0o666) -> Path:
    """Create it with the user's umask (a mkstemp file would keep its private mode)."""
    partial = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}.part{path.suffix}")
    partial.touch(mode, exist_ok=False)
    return partial


def _sweep(path: Path) -> None:
    """Remove partial files more than a day old, left by killed processes: checkpoints are large."""
    left = f".{glob.escape(path.stem[:40])}.????????.part{glob.escape(path.suffix)}"
    with suppress(OSError):
        for old in path.parent.glob(left):
            if time.time() - old.stat().st_mtime > _LEFT_BEHIND_S:
                old.unlink()


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left half-written in ``folder`` and below; nothing may write there now."""
    for left in folder.rglob(".*.????????.part*"):
        with suppress(OSError):
            left.unlink()


def _sync(path: Path, flags: int) -> None:
    """Force a file's content, or a folder's names, to the disk."""
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_inside(name: str) -> bool:
    """Whether a file's name is a relative path that stays inside its folder, on every system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    rooted = posix.is_absolute() or windows.is_absolute() or windows.drive or windows.root
    return bool(name) and not rooted and ".." not in posix.parts and ".." not in windows.parts


def cache_root() -> Path | None:
    """A writable folder for files that can be recreated, or None; ``STD_RT_CACHE`` overrides it."""
    root = user_folder("STD_RT_CACHE", "user_cache_dir")
    return root if root is not None and os.access(root, os.W_OK) else None


def user_folder(variable: str, kind: str) -> Path | None:
    """The folder that ``variable`` names, else platformdirs' of that kind; None if it cannot be made."""
    asked = os.environ.get(variable)
    if asked:
        root = Path(asked)
    else:
        import platformdirs

        root = Path(getattr(platformdirs, kind)("std-rt", appauthor=False))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return root
