"""Output files: refused early, written beside their final name, renamed when whole."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from std_rt.core.errors import MediaError

__all__ = ["check_input", "check_output", "partial_file", "reason"]


def reason(error: BaseException) -> str:
    """The short cause of an operating-system or decoder error, one line, without paths."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def check_input(path: Path) -> None:
    """Raise MediaError unless ``path`` is a readable file with at least one byte."""
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise MediaError(f"{path} is a folder; a picture or video file is due here")
        if size == 0:
            raise MediaError(f"{path} is empty (zero bytes); nothing can be read from it")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise MediaError(f"{path} does not exist; check the spelling and the folder") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be read: {reason(error)}") from error


def check_output(
    sink: Path, *, source: Path | None = None, overwrite: bool = False, flag: str = "-o"
) -> None:
    """Refuse an output before any work is done; creates the output's folder where it is missing.

    ``flag``: the option that named it, for what is said.

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
    if sink.is_dir():
        raise MediaError(f"{sink} is a folder; give a file name with {flag}, such as {sink / 'out.png'}")
    if not sink.exists():
        return
    if source is not None and source.exists() and source.samefile(sink):
        raise MediaError(f"{sink} is the input itself; give another name with {flag}")
    if not overwrite:
        raise MediaError(f"{sink} exists already; add --overwrite to replace it or {flag} for another name")


@contextmanager
def partial_file(sink: Path) -> Iterator[Path]:
    """A new empty file beside ``sink`` with its suffix; takes the name ``sink`` when the block ends well.

    If the block raises (Ctrl-C included) the partial file is removed and ``sink`` is left as it was.
    A failing rename or creation is a MediaError.
    """
    try:
        partial = _new_partial(sink)
    except (OSError, ValueError) as error:
        raise MediaError(
            f"{sink} cannot be written: {reason(error)}; choose another place with -o"
        ) from error
    try:
        yield partial
        _take_name(partial, sink)
    finally:
        # After the rename there is nothing left to remove. Windows keeps a file that is still open.
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _take_name(partial: Path, sink: Path) -> None:
    try:
        partial.replace(sink)
    except OSError as error:  # Windows: the old file is open elsewhere.
        raise MediaError(f"{sink} cannot be replaced: {reason(error)}; close the program using it") from error


def _new_partial(sink: Path) -> Path:
    """Create it here, with the user's umask (a mkstemp file would keep its private mode)."""
    partial = sink.with_name(f".{sink.stem[:40]}.{secrets.token_hex(4)}.part{sink.suffix}")
    partial.touch(exist_ok=False)
    return partial
