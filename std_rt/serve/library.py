"""The styles that all sessions, jobs and pictures of a server choose from, and where its uploads lie.

Uploads are files of a private folder under names made here; the names that clients give are shown, and never
touch the file system. A style's id is the start of the hash of its content, so that the same picture sent
again, or after a restart, is the same style.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from threading import Lock
from typing import BinaryIO

from std_rt.core.arrays import Frame
from std_rt.core.errors import MediaError, StdRtError
from std_rt.core.files import file_digest, writing
from std_rt.media.image import Picture, read_picture
from std_rt.pipeline.conditioning import StyleSquares
from std_rt.pipeline.style_file import (
    SUFFIX,
    StyleFile,
    blend_files,
    clean_name,
    load_style,
    read_style,
    save_style,
    thumbnail,
)
from std_rt.pipeline.stylizer import Stylizer
from std_rt.serve.limits import ConflictError, Limits, MissingError

__all__ = ["Library", "Style", "Uploads", "named"]

_ID_LENGTH = 16


class Uploads:
    """A private folder for uploads and results, gone when the server ends."""

    def __init__(self) -> None:
        self.folder = Path(mkdtemp(prefix="std-rt-serve-"))

    def new(self, suffix: str = "") -> Path:
        """A path that is not used yet; ``suffix`` is the server's own choice."""
        return self.folder / f"{secrets.token_hex(16)}{suffix}"

    def store(self, file: BinaryIO, suffix: str = "") -> Path:
        """Copy an upload into a file of this folder. Raises MediaError if the disk is full."""
        path = self.new(suffix)
        try:
            with writing("the upload", advice="the server's disk has no room"), path.open("wb") as sink:
                shutil.copyfileobj(file, sink, 1 << 20)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    @contextmanager
    def spooled(self, file: BinaryIO, suffix: str = "", called: str = "the upload") -> Iterator[Path]:
        """`store` for the length of a block; errors in it name the file so, not by its path."""
        path = self.store(file, suffix)
        try:
            yield path
        except StdRtError as error:
            raise named(error, path, called) from error
        finally:
            path.unlink(missing_ok=True)

    def picture(self, file: BinaryIO, max_pixels: int) -> Picture:
        """Read an uploaded picture; raises as `read_picture` does."""
        with self.spooled(file, called="the picture") as path:
            return read_picture(path, max_pixels)

    def close(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Style:
    """A style of the library. ``picture`` is None for one that came as a style file.

    ``file``: that style file. ``uploaded``: by a client, so it may be renamed and deleted.
    """

    id: str
    name: str
    thumbnail: Frame
    picture: StyleSquares | None
    file: StyleFile | None
    uploaded: bool = True


class Library:
    """Styles by id. Any thread may call any method."""

    def __init__(
        self,
        stylizer: Stylizer,
        uploads: Uploads,
        limits: Limits,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stylizer, self._uploads, self._limits, self._now = stylizer, uploads, limits, now
        self._styles: dict[str, Style] = {}
        self._used_s: dict[str, float] = {}
        self._lock = Lock()

    def all(self) -> list[Style]:
        """The styles, in the order in which they came."""
        with self._lock:
            return list(self._styles.values())

    def get(self, key: str) -> Style:
        """The style of an id. Raises MissingError."""
        with self._lock:
            self._used_s[key] = self._now()
            if key in self._styles:
                return self._styles[key]
        del self._used_s[key]
        raise MissingError(f"there is no style {key[:40]!r} here; GET /v1/styles lists them")

    def add_own(self, source: Path | Frame, name: str | None = None) -> str:
        """Add a style of the server's: a path, or a frame. Raises MediaError. Returns its id."""
        if isinstance(source, Path):
            made, key, name = self._read(source), file_digest(source), name or source.stem
        else:
            made, key = self._of_picture(source), hashlib.sha256(source.tobytes()).hexdigest()
        style = replace(made, id=key[:_ID_LENGTH], name=clean_name(name or "style"), uploaded=False)
        return self._put(style)

    def add(self, file: BinaryIO, name: str) -> Style:
        """Add an uploaded picture or style file. Raises MediaError, or ConflictError if there is no room."""
        self.sweep()
        with self._uploads.spooled(file, _suffix(file)) as path:
            key = file_digest(path)[:_ID_LENGTH]
            made = self._read(path)
        called = name.rpartition(".")[0] or name  # for people to read
        return self._styles[self._put(replace(made, id=key, name=clean_name(called)))]

    def read(self, file: BinaryIO, name: str, stroke_size: float) -> StyleFile:
        """An uploaded style that is used once and not kept. Raises MediaError."""
        with self._uploads.spooled(file, _suffix(file), "the style") as path:
            if path.suffix == SUFFIX:
                return replace(load_style(path, self._stylizer.bundle), name=clean_name(name))
            # Whole, as `std-rt stylize` takes it: made small twice, it would be another style by a shade.
            frame = read_picture(path, self._limits.picture_px).frame
        encode = self._stylizer.encode_style
        return read_style(frame, self._stylizer.bundle, encode, name, stroke_size=stroke_size)

    def _read(self, path: Path) -> Style:
        if path.suffix == SUFFIX:
            loaded = load_style(path, self._stylizer.bundle)
            return Style("", loaded.name, loaded.thumbnail, None, loaded)
        return self._of_picture(read_picture(path, self._limits.picture_px).frame)

    def _of_picture(self, frame: Frame) -> Style:
        squares = StyleSquares.of(frame, self._stylizer.bundle.style_px)
        return Style("", "", thumbnail(frame), squares, None)

    def _put(self, style: Style) -> str:
        with self._lock:
            if style.id not in self._styles:
                if len(self._styles) >= self._limits.styles:
                    count = len(self._styles)
                    raise ConflictError(f"{count} styles are here, which is the limit; delete some")
                self._styles[style.id] = style
            self._used_s[style.id] = self._now()
        return style.id

    def rename(self, key: str, name: str) -> Style:
        """Rename an uploaded style. Raises MissingError, or ConflictError for one of the server's."""
        style = replace(self._of_client(key), name=clean_name(name))
        with self._lock:
            self._styles[key] = style
        return style

    def delete(self, key: str) -> None:
        """Delete an uploaded style; sessions that show it keep it. Raises as `rename`."""
        self._of_client(key)
        with self._lock:
            self._styles.pop(key, None)
            self._used_s.pop(key, None)

    def _of_client(self, key: str) -> Style:
        style = self.get(key)
        if not style.uploaded:
            raise ConflictError(f"style '{style.name}' is the server's own and stays as it is")
        return style

    def sweep(self) -> None:
        """Delete uploaded styles that nobody has used for a time."""
        with self._lock:
            before = self._now() - self._limits.keep_s
            for key in [key for key, style in self._styles.items() if style.uploaded]:
                if self._used_s[key] < before:
                    del self._styles[key], self._used_s[key]

    def encoded(
        self, weights: Mapping[str, float], stroke_size: float = 1.0, name: str = "blend"
    ) -> StyleFile:
        """A blend as one style. Raises UsageError for an unknown id, or a stroke size out of range."""
        parts = [(self._encoded(self.get(key), stroke_size), weight) for key, weight in weights.items()]
        return parts[0][0] if len(parts) == 1 else blend_files(parts, name)

    def _encoded(self, style: Style, stroke_size: float) -> StyleFile:
        if style.file is not None:
            return replace(style.file, name=style.name)
        assert style.picture is not None
        encode = self._stylizer.encode_style
        return read_style(style.picture, self._stylizer.bundle, encode, style.name, stroke_size=stroke_size)

    def style_file(self, weights: Mapping[str, float], stroke_size: float, name: str) -> bytes:
        """The content of a style file with this blend. Raises as `encoded`."""
        path = self._uploads.new(SUFFIX)
        try:
            save_style(path, replace(self.encoded(weights, stroke_size, name), name=clean_name(name)))
            return path.read_bytes()
        except OSError as error:
            raise MediaError("the style file cannot be written; the server's disk has no room") from error
        finally:
            path.unlink(missing_ok=True)


def named(error: StdRtError, path: Path, called: str) -> StdRtError:
    """``error`` as a client may read it: files of the server's go by what they are, not where they lie."""
    text = str(error).replace(str(path), called).replace(path.name, called)
    return error if text == str(error) else MediaError(text)


def _suffix(file: BinaryIO) -> str:
    """Of a style file, which begins with the length of its header and a brace; else none."""
    start = file.read(9)
    file.seek(0)
    return SUFFIX if start[8:] == b"{" else ""
