"""Index of training pictures (names, sizes, captions), and the reading of one.

Folders of pictures and of clips, Hugging Face's imagefolder layout (``metadata.jsonl``), captions in
``NAME.txt``, and webdataset shards. Shards are read with the standard library and not with the webdataset
package: that one streams, but runs that resume exactly and sizes known beforehand need random access. A
plain tar has it: each member's place in the file is noted once.
"""

from __future__ import annotations

import io
import json
import logging
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from rich.progress import track

from std_rt.core.arrays import Size
from std_rt.core.errors import RecipeError
from std_rt.core.files import reason
from std_rt.training.data.picture_set import SUFFIXES, Frame
from std_rt.training.run.recipe import PicturesConfig

__all__ = [
    "BrokenFileError",
    "Entry",
    "Index",
    "draw_frame",
    "first_five",
    "index_pictures",
    "read_clip",
    "read_frame",
]

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv"}
SHARD_SUFFIXES = {".tar"}
_OF_KIND = {
    "pictures": SUFFIXES,
    "videos": VIDEO_SUFFIXES,
    "webdataset": SHARD_SUFFIXES,
    "auto": SUFFIXES | VIDEO_SUFFIXES | SHARD_SUFFIXES,
}
# By content, not by name: collected pictures often have the suffix of another format. Nothing else, since
# Pillow has readers that run other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
# What decoders raise on damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    tarfile.TarError,
    av.FFmpegError,
    Image.DecompressionBombError,
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HD_LINES, _BT709, _UNTAGGED = 720, 1, 2
# webdataset's rule: a sample's key ends at the first dot of the base name.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_LOG = logging.getLogger(__name__)


class BrokenFileError(Exception):
    """A file that cannot be used; ``str(error)`` is the reason, without the file's name."""


@dataclass(frozen=True)
class Entry:
    """One picture, or one clip of which each visit takes another frame."""

    name: str  # relative to the folder; a shard's member as SHARD:KEY.SUFFIX
    path: Path
    size: Size  # (height, width) px, upright
    caption: str
    offset: int = 0  # where a shard's member starts in its file, bytes
    length: int = 0  # of a shard's member, bytes; 0: the whole file
    frames: int = 0  # of a clip; 0: a picture


@dataclass(frozen=True)
class Index:
    """All usable entries of a folder, sorted by name, and the broken ones: name -> reason."""

    entries: list[Entry]
    broken: dict[str, str]


def first_five(broken: dict[str, str]) -> str:
    """``3 (a.png: reason; ...)``: how many, and the first five by name."""
    named = "; ".join(f"{name}: {why}" for name, why in list(broken.items())[:5])
    return f"{len(broken)} ({named}{'; ...' if len(broken) > 5 else ''})"


def index_pictures(config: PicturesConfig, quiet: bool = False, key: str = "pictures.folder") -> Index:
    """The contents of ``config.folder`` (recursively), from file headers; of clips, one frame is decoded.

    Broken files are left out, counted and named in one warning, unless ``quiet``. ``key`` names the folder in
    messages. ``kind = "auto"`` takes pictures, clips and shards alike. Raises RecipeError if there is no
    folder or nothing usable in it.
    """
    root = Path(config.folder)
    if not config.folder or not root.exists():
        raise RecipeError(f"{key} = {config.folder!r} does not exist; set it to pictures, clips or *.tar")
    found = _Indexing(config, root, key)
    files = found.files()
    for path in files:
        if path.name == "metadata.jsonl":
            found.read_metadata(path)
    for path in track(files, f"indexing {root}", transient=True, disable=quiet):
        found.add(path)
    index = found.index()
    if index.broken and not quiet:
        _LOG.warning("left out broken files of %s: %s", root, first_five(index.broken))
    return index


@dataclass
class _Indexing:
    """The state of ``index_pictures``."""

    config: PicturesConfig
    root: Path
    key: str
    entries: list[Entry] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    metadata: dict[Path, str] = field(default_factory=dict)  # captions of metadata.jsonl
    present: set[Path] = field(default_factory=set)
    captioned: int = 0  # entries with a caption of their own
    keys: set[str] = field(default_factory=set)  # of JSON objects that lack caption_key

    def files(self) -> list[Path]:
        """All files but hidden ones (macOS puts a ._NAME beside each NAME), sorted alike on each system."""
        if self.root.is_file():
            self.root, self.present = self.root.parent, {self.root}
        else:
            self.present = {p for p in self.root.rglob("*") if p.name[0] != "." and p.is_file()}
        return sorted(self.present, key=self._name)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """Errors inside are noted for ``name``, and indexing continues."""
        try:
            yield
        except (BrokenFileError, *_DAMAGE) as error:
            self.broken[name] = _reason(error)

    def read_metadata(self, path: Path) -> None:
        """Captions of an imagefolder: one JSON object per line, ``file_name`` relative to its folder."""
        name = self._name(path)
        with self._noting(name):
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
                if line.strip():
                    with self._noting(f"{name}:{number}"):
                        self._read_row(path.parent, line)

    def _read_row(self, folder: Path, line: str) -> None:
        row = _json_object(line)
        if not isinstance(row.get("file_name"), str):
            raise BrokenFileError("no file_name")
        target = folder / row["file_name"]
        if target not in self.present:
            raise BrokenFileError(f"no file {row['file_name']}")
        caption = self._caption(row)
        if caption is not None:
            self.metadata[target] = caption

    def _caption(self, row: dict[str, Any]) -> str | None:
        """The row's caption, None if it has none."""
        if not self.config.caption_key:
            return None
        if self.config.caption_key not in row:
            self.keys |= row.keys()
            return None
        caption = row[self.config.caption_key]
        if caption is not None and not isinstance(caption, str):
            raise BrokenFileError(f"{self.config.caption_key} is not text")
        return caption

    def add(self, path: Path) -> None:
        """Note one file, if it is of the recipe's kind."""
        suffix = path.suffix.lower()
        if suffix not in _OF_KIND[self.config.kind]:
            return
        with self._noting(self._name(path)):
            if suffix in SHARD_SUFFIXES:
                self._add_shard(path)
            else:
                self._add_file(path, suffix in VIDEO_SUFFIXES)

    def _add_file(self, path: Path, is_clip: bool) -> None:
        caption = self.metadata.get(path)
        sidecar = path.with_suffix(".txt")
        if caption is None and sidecar in self.present:
            caption = sidecar.read_text(encoding="utf-8-sig")
        if is_clip:
            size, frames = _probe_clip(path)
        else:
            with path.open("rb") as file:
                size, frames = _picture_size(file), 0
        self._note(Entry(self._name(path), path, size, "", frames=frames), caption)

    def _note(self, entry: Entry, caption: str | None) -> None:
        self.captioned += caption is not None
        fields = {**vars(entry), "caption": (self.config.caption if caption is None else caption).strip()}
        self.entries.append(Entry(**fields))

    def _add_shard(self, path: Path) -> None:
        """Each picture of a tar with the text or JSON of the same key."""
        groups: dict[str, dict[str, tarfile.TarInfo]] = {}
        # "r:" is a plain tar: in a compressed one, members could not be reached without reading all before.
        with tarfile.open(path, "r:") as tar:
            # A shard that is cut off ends in an error, after whose whole members are used.
            with self._noting(self._name(path)):
                for member in tar:
                    match = _MEMBER.fullmatch(member.name) if member.isfile() else None
                    if match:
                        groups.setdefault(match[1], {})[match[2].lower()] = member
            for key, members in groups.items():
                suffix = next((s for s in members if f".{s}" in SUFFIXES), None)
                if suffix is not None:
                    with self._noting(f"{self._name(path)}:{key}.{suffix}"):
                        self._add_member(path, tar, members, suffix)

    def _add_member(
        self, path: Path, tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], suffix: str
    ) -> None:
        member = members[suffix]
        if member.offset_data + member.size > path.stat().st_size:
            raise BrokenFileError("cut off with its shard")
        if not member.size:
            raise BrokenFileError("empty")
        caption = None
        if "txt" in members:
            caption = _member(tar, members["txt"]).read().decode("utf-8-sig")
        elif "json" in members:
            caption = self._caption(_json_object(_member(tar, members["json"]).read().decode("utf-8-sig")))
        size = _picture_size(_member(tar, member))
        name = f"{self._name(path)}:{member.name}"
        self._note(Entry(name, path, size, "", member.offset_data, member.size), caption)

    def index(self) -> Index:
        """The result; RecipeError if nothing is usable, or no caption is under the recipe's key."""
        if not self.entries:
            kind = "pictures, clips or *.tar shards" if self.config.kind == "auto" else self.config.kind
            broken = f"; broken: {first_five(self.broken)}" if self.broken else ""
            raise RecipeError(
                f"no usable {kind} in {self.config.folder}{broken}; set {self.key} (or pictures.kind)"
            )
        if self.keys and not self.captioned:
            raise RecipeError(
                f"{self.config.folder} has no caption under pictures.caption_key = "
                f"{self.config.caption_key!r} but {', '.join(sorted(self.keys)[:8])}; "
                "set it to one of them, or to '' for no captions"
            )
        return Index(sorted(self.entries, key=lambda e: e.name), self.broken)


def _reason(error: BaseException) -> str:
    """One short line."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    return reason(error)[:120]


def _json_object(text: str) -> dict[str, Any]:
    row = json.loads(text)
    if not isinstance(row, dict):
        raise BrokenFileError("not a JSON object")
    return row


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    assert file is not None, "only regular files are kept"
    return file


# --- one picture ------------------------------------------------------------------------------------


def _open(file: IO[bytes]) -> Image.Image:
    Image.init()  # Asked for some formats by name, Pillow would not load all of their readers.
    return Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])


def _orientation(image: Image.Image) -> int:
    """EXIF orientation still to apply, 1..8; asked before the pixels are loaded."""
    if image.format in ("TIFF", "AVIF"):  # Pillow turns these itself, and gives the upright size.
        return 1
    try:
        # PNG's own getexif would decode the whole picture in search of EXIF behind the pixels.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:  # A damaged EXIF block says nothing about the pixels.
        return 1


def _picture_size(file: IO[bytes]) -> Size:
    """Upright (height, width) px, from the header."""
    with _open(file) as image:
        w, h = image.size
        return (w, h) if _orientation(image) >= 5 else (h, w)


def _to_8bit(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey values of 16 or 32 bits to 0..255; white is 65535, or 1 or 255 if nothing exceeds that."""
    real = np.nan_to_num(values.astype(np.float32))
    high = float(real.max(initial=0.0))
    floats = values.dtype.kind == "f"
    white = 1.0 if floats and high <= 1 else 255.0 if values.dtype.itemsize > 2 and high <= 255 else 65535.0
    return np.asarray(np.clip(np.rint(real * (255 / white)), 0, 255), np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; what is transparent is laid over white."""
    if image.mode[0] in "IF":
        return Image.fromarray(_to_8bit(np.asarray(image))).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _decode_picture(data: bytes) -> Frame:
    with _open(io.BytesIO(data)) as image:
        turn = _TURNS.get(_orientation(image))
        rgb = _to_rgb(image)
        return np.asarray(rgb if turn is None else rgb.transpose(turn), np.uint8)


# --- one clip ---------------------------------------------------------------------------------------


@contextmanager
def _open_clip(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    # Only local files: a file named like a clip may be a playlist of addresses.
    options = {"protocol_whitelist": "file"}
    with av.open(str(path), container_options=options, metadata_errors="replace") as container:
        for stream in container.streams.video:
            if not stream.disposition & Disposition.attached_pic:  # album covers
                yield container, stream
                return
        raise BrokenFileError("has no video stream")


def _rate(stream: VideoStream) -> Fraction:
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def _frame_count(container: InputContainer, stream: VideoStream) -> int:
    """As the file says, or by its duration, or counted; at least 1."""
    if stream.frames:
        return stream.frames
    seconds = stream.duration * (stream.time_base or 0) if stream.duration else 0
    if not seconds and container.duration:
        seconds = Fraction(container.duration, av.time_base)
    return round(seconds * _rate(stream)) or max(1, sum(p.size > 0 for p in container.demux(stream)))


def _upright(frame: VideoFrame) -> Frame:
    """RGB ``[H, W, 3]``, rotated by the display matrix."""
    # As players do: an untagged clip of 720 lines and more is BT.709, where FFmpeg would take BT.601.
    untagged = int(frame.colorspace) == _UNTAGGED and min(frame.height, frame.width) >= _HD_LINES
    rgb = frame.to_ndarray(format="rgb24", src_colorspace=_BT709 if untagged else None)
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))


def _probe_clip(path: Path) -> tuple[Size, int]:
    """Upright (height, width) and the number of frames; the first is decoded, as only it knows its turn."""
    with _open_clip(path) as (container, stream):
        for frame in container.decode(stream):
            h, w = frame.height, frame.width
            size = (w, h) if round(frame.rotation / 90) % 2 else (h, w)
            return size, _frame_count(container, stream)
    raise BrokenFileError("no frame can be decoded")


def _decode_frame(path: Path, index: int) -> Frame:
    """Frame ``index`` by its time at the average rate; the last one if the clip ends before it."""
    with _open_clip(path) as (container, stream):
        step = 1 / (_rate(stream) * (stream.time_base or Fraction(1, 90_000)))
        at = (stream.start_time or 0) + round(index * step)
        container.seek(at, stream=stream)
        last = None
        for frame in container.decode(stream):
            last = frame
            if frame.pts is not None and frame.pts >= at - step / 2:
                break
        if last is None:
            raise BrokenFileError(f"frame {index} cannot be decoded")
        return _upright(last)


def read_clip(entry: Entry, start: int, count: int, interval: int) -> NDArray[np.uint8]:
    """``count`` frames from ``start`` on, each ``interval`` after the last: uint8 ``[T, H, W, 3]``, upright.

    Frames are those due at their times at the average rate. Raises BrokenFileError.
    """
    try:
        return np.stack(_decode_frames(entry.path, range(start, start + count * interval, interval)))
    except _DAMAGE as error:
        raise BrokenFileError(_reason(error)) from error


def _decode_frames(path: Path, wanted: range) -> list[Frame]:
    """The frames of rising numbers, in one pass from the key frame before the first."""
    with _open_clip(path) as (container, stream):
        step = 1 / (_rate(stream) * (stream.time_base or Fraction(1, 90_000)))
        due = [(stream.start_time or 0) + round(index * step) for index in wanted]
        container.seek(due[0], stream=stream)
        found: list[Frame] = []
        for frame in container.decode(stream):
            while frame.pts is not None and len(found) < len(due) and frame.pts >= due[len(found)] - step / 2:
                found.append(_upright(frame))
            if len(found) == len(due):
                return found
        raise BrokenFileError(f"it ends before frame {wanted[len(found)]}")


# --- both -------------------------------------------------------------------------------------------


def draw_frame(entry: Entry, rng: np.random.Generator) -> int:
    """The frame of a clip that this visit takes; 0 for a picture, without touching ``rng``."""
    return int(rng.integers(entry.frames)) if entry.frames else 0


def read_frame(entry: Entry, index: int = 0) -> Frame:
    """uint8 ``[H, W, 3]`` RGB, upright; ``index`` is a clip's frame. Raises BrokenFileError."""
    try:
        if entry.frames:
            return _decode_frame(entry.path, index)
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            return _decode_picture(file.read(entry.length or -1))
    except _DAMAGE as error:
        raise BrokenFileError(_reason(error)) from error
