"""Inputs and outputs: which files are pictures and which are clips, and where each result goes.

The content decides whether a file is a picture or a clip; its suffix only if the content says nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from std_rt.core.errors import MediaError, counted
from std_rt.core.files import check_input, check_output, missing, reason, writing
from std_rt.media.image import PICTURE_SUFFIXES, WRITABLE_SUFFIXES, is_animated, open_picture
from std_rt.media.picture_formats import RefusedKind, UnreadablePictureError, refused_kind
from std_rt.media.video.clip import open_clip
from std_rt.media.video.transcode import CLIP_SUFFIXES, default_clip_suffix

__all__ = [
    "PICTURE_SUFFIXES",
    "STANDARD_STREAM",
    "VIDEO_SUFFIXES",
    "Job",
    "expand_inputs",
    "is_stream",
    "is_video",
    "media_kind",
    "output_path",
    "plan_outputs",
    "spooled_inputs",
    "spooled_output",
]

VIDEO_SUFFIXES = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv"),
        *(".flv", ".ogv", ".3gp", ".3g2", ".mxf", ".y4m", ".ivf"),
    )
)
# Treated as clips, so that the error says they contain only sound.
_AUDIO_SUFFIXES = frozenset({".mp3", ".m4a", ".aac", ".wav", ".flac", ".ogg", ".opus", ".wma"})
_MARK = "_styled"
_NAMED = 8  # files in a line
_NAME_BYTES, _LONGEST_SUFFIX = 255, ".jpeg"  # of a file's name, on every usual file system
STANDARD_STREAM = Path("-")
"""As an input stdin, as an output stdout."""

Kind = Literal["picture", "video"]


def media_kind(path: Path) -> Kind:
    """``"picture"`` or ``"video"``; animated GIF, PNG, WebP and AVIF are videos, still ones are pictures.

    Reads headers only. A damaged or empty file counts as what its suffix says; reading it then reports the
    error. Raises MediaError if the file is missing, a folder, a picture of a kind that is not read, or if
    neither content nor suffix is known.
    """
    known = PICTURE_SUFFIXES | VIDEO_SUFFIXES | _AUDIO_SUFFIXES
    check_input(path, may_be_empty=path.suffix.lower() in known)
    try:
        with open_picture(path) as picture:
            return "video" if is_animated(picture) else "picture"
    except UnreadablePictureError:
        raise
    except MediaError:  # Not a picture.
        suffix = path.suffix.lower()
    try:
        with open_clip(path):
            return "video"
    except MediaError:  # Damaged, or neither.
        if suffix in PICTURE_SUFFIXES:
            return "picture"
        if suffix in VIDEO_SUFFIXES | _AUDIO_SUFFIXES:
            return "video"
    raise MediaError(f"{path} cannot be read as a picture or video; give a .jpg, .png, .mp4 or similar")


def is_video(path: Path) -> bool:
    """Whether `media_kind` is ``"video"``; False on any error."""
    try:
        return media_kind(path) == "video"
    except MediaError:
        return False


@dataclass(frozen=True)
class Job:
    """One input file and its output file.

    ``is_video``: a clip, not a picture. ``is_done``: the output exists and stays as it is.
    """

    source: Path
    sink: Path
    is_video: bool
    is_done: bool = False


def expand_inputs(paths: list[Path], say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Files as they are; a folder becomes the pictures and clips in it, by name, not recursive.

    Known suffixes only, hidden files and results of an earlier run (``x_styled.png`` next to ``x.*``)
    left out; each file once. So are a folder's pictures of a kind that is not read (raw files, HEIC without
    its library), and ``say`` is given a line that counts and names them. Raises MediaError for a missing
    path or a folder without any.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        try:
            for file in _folder_files(path, say) if path.is_dir() else [path]:
                found.setdefault(file.resolve(strict=True), file)
        except FileNotFoundError:
            raise MediaError(missing(path)) from None
        except (OSError, ValueError) as error:
            raise MediaError(f"{path} cannot be read: {reason(error)}") from error
    return list(found.values())


_OF_THE_SYSTEM = {"desktop.ini", "thumbs.db"}  # Windows puts them into folders of pictures


def _folder_files(folder: Path, say: Callable[[str], None]) -> list[Path]:
    names = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    known = [entry for entry in names if _is_media(entry)]
    results = {_marked(entry.stem, "") for entry in known}
    files: list[Path] = []
    refused: dict[RefusedKind, list[str]] = {}
    for entry in known:
        if entry.stem in results:
            continue
        kind = refused_kind(entry)
        if kind is None:
            files.append(entry)
        else:
            refused.setdefault(kind, []).append(entry.name)
    left_out = [_left_out(kind, names) for kind, names in refused.items()]
    others = [e.name for e in names if not _is_media(e) and e.name.lower() not in _OF_THE_SYSTEM]
    if not files:
        found = f", only {' and '.join(left_out)}" if left_out else ""
        raise MediaError(
            f"{folder} holds no picture or clip that can be read{found} (subfolders are not searched);"
            " give files or another folder"
        )
    for line in left_out:
        say(f"{folder}: left out {line}")
    if others:
        say(f"{folder}: left out {_counted_names(others)}, not named as a picture or clip")
    inside = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir() and _holds_media(entry)]
    if inside:
        say(f"{folder}: subfolders are not searched ({', '.join(inside[:_NAMED])}); name them as inputs")
    return files


def _is_media(path: Path) -> bool:
    """Whether a file is named as a picture or a clip."""
    return path.suffix.lower() in PICTURE_SUFFIXES | VIDEO_SUFFIXES


def _holds_media(folder: Path) -> bool:
    """Whether a visible subfolder has pictures or clips."""
    if folder.name.startswith("."):
        return False
    with suppress(OSError):
        return any(map(_is_media, folder.iterdir()))
    return False


def _left_out(kind: RefusedKind, names: list[str]) -> str:
    """Such as ``3 files (a.NEF, b.NEF, c.NEF), each a raw file of a camera: develop it first ...``."""
    return f"{_counted_names(names)}, {'' if len(names) == 1 else 'each '}{kind.name}: {kind.remedy}"


def _counted_names(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return f"{counted(len(names), 'file')} ({shown})"


def output_path(source: Path, out: Path | None, many: bool, is_video: bool, sound: str = "auto") -> Path:
    """Where the result of ``source`` goes.

    ``out`` None: ``<stem>_styled<suffix>`` next to the source. ``out`` a folder (exists, or has no suffix):
    the same name in it. Else ``out`` itself. Suffix: kept if it can be written, else .png for pictures
    and .mp4 for clips (.mkv if the sound does not fit mp4; animated pictures become .mp4).
    Raises MediaError if ``out`` has a suffix that does not fit (photo to .mp4, clip to .png, unknown) or is
    one file for ``many`` inputs.
    """
    if out is not None and not out.is_dir() and out.suffix:
        if many:
            raise MediaError(
                f"-o {out} names one file for several inputs; give a folder, such as -o {out.with_suffix('')}"
            )
        suffixes, kind = (CLIP_SUFFIXES, "clip") if is_video else (WRITABLE_SUFFIXES, "picture")
        if out.suffix.lower() not in suffixes:
            known = " ".join(sorted(suffixes))
            raise MediaError(
                f"{source} is a {kind} and cannot become {out.name}; give -o a name ending in one of {known}"
            )
        return out
    folder = source.parent if out is None else out
    if folder.is_file():
        raise MediaError(f"{folder} is a file without a suffix; give -o a folder or a name such as out.png")
    if is_video:
        suffix = default_clip_suffix(source, sound)
    else:
        suffix = source.suffix if source.suffix.lower() in WRITABLE_SUFFIXES else ".png"
    return folder / _marked(source.stem, suffix)


def _marked(stem: str, suffix: str) -> str:
    """The name of a result; the end of a stem gives way if file systems could not hold it."""
    while stem and len(os.fsencode(f"{stem}{_MARK}{_LONGEST_SUFFIX}")) > _NAME_BYTES:
        stem = stem[:-1]
    return f"{stem}{_MARK}{suffix}"


def plan_outputs(
    inputs: list[Path],
    out: Path | None,
    *,
    overwrite: bool = False,
    skip_existing: bool = False,
    sound: str = "auto",
    say: Callable[[str], None] = lambda line: None,
    needed: Sequence[Path] = (),
) -> list[Job]:
    """Expand (``say``: see `expand_inputs`), classify, name and check everything before any work.

    sound: what becomes of the sound of clips, see `transcode_stream`.

    ``skip_existing``: a job whose output exists is done, and results of an earlier run among the inputs are
    left out. Raises MediaError for the first input that is missing or not a picture or clip, for two inputs
    with one output, for an output that exists (without either flag), is an input or one of ``needed``
    (styles, a mask), or cannot be written.
    """
    sources = expand_inputs(inputs, say)
    jobs: dict[Path, Job] = {}
    for source in sources:
        is_video = media_kind(source) == "video"
        sink = output_path(source, out, len(sources) > 1, is_video, sound)
        is_done = skip_existing and sink.is_file() and not sink.samefile(source)
        job = Job(source, sink, is_video, is_done)
        twin = jobs.setdefault(sink.absolute(), job)
        if twin.source != source:
            raise MediaError(
                f"{twin.source} and {source} would both become {sink}; stylize them one at a time with -o"
            )
    found = _without_results([*jobs.values()], leave_out=skip_existing)
    existing = [job.sink for job in found if job.sink.is_file() and not job.sink.samefile(job.source)]
    if existing and len(found) > 1 and not (overwrite or skip_existing):
        raise MediaError(
            f"{len(existing)} of {len(found)} results exist already, such as {existing[0]}; add "
            "--skip-existing to keep them and make the others, --overwrite to replace them, or -o for "
            "another folder"
        )
    for job in found:
        if not job.is_done:
            if job.sink.exists() and any(path.exists() and job.sink.samefile(path) for path in needed):
                raise MediaError(f"{job.sink} is the style or the mask itself; give another name with -o")
            check_output(job.sink, source=job.source, overwrite=overwrite)
    return found


def _without_results(jobs: Sequence[Job], *, leave_out: bool) -> list[Job]:
    """The jobs whose input is not the result of another; unless ``leave_out``, such an input is refused."""
    sources = {job.source.resolve(): job for job in jobs}
    for job in jobs:
        earlier = sources.get(job.sink.resolve(), job)
        if earlier is not job and not leave_out:
            raise MediaError(
                f"{job.sink} is one of the inputs; add --skip-existing to leave out what is done, "
                "or give another folder with -o"
            )
    results = {job.sink.resolve() for job in jobs if job.sink.resolve() != job.source.resolve()}
    return [job for source, job in sources.items() if source not in results]


@contextmanager
def spooled_inputs(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Files as they are; stdin (``-``) and pipes as temporary files, which decoders can seek in.

    Raises MediaError if stdin is a terminal or named twice.
    """
    if list(paths).count(STANDARD_STREAM) > 1:
        raise MediaError("stdin can be read once, and - is given twice; save it to a file first")
    with ExitStack() as stack:
        yield [_spooled(path, stack) if is_stream(path) else path for path in paths]


def is_stream(path: Path) -> bool:
    """Whether ``path`` is stdin (``-``) or a pipe, such as the shell's ``<(...)``: read once, no name."""
    try:
        return path == STANDARD_STREAM or path.is_fifo()
    except (OSError, ValueError):  # reported when it is read
        return False


def _spooled(path: Path, stack: ExitStack) -> Path:
    """What a stream gives, as a file with the suffix of its kind of picture, if it is one."""
    is_stdin = path == STANDARD_STREAM
    if is_stdin and (sys.stdin is None or sys.stdin.isatty()):
        raise MediaError("- reads stdin, which is a terminal here; pipe a picture in, or name a file")
    place = Path(stack.enter_context(TemporaryDirectory(prefix="std-rt-"))) / (
        "stdin" if is_stdin else "pipe"
    )
    with writing(place.parent, advice="set TMPDIR to a folder with room"), place.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer if is_stdin else stack.enter_context(path.open("rb")), file)
    if not place.stat().st_size:
        raise MediaError(
            f"{'stdin' if is_stdin else path} is empty (zero bytes); pipe a picture or a clip in"
        )
    with suppress(MediaError):  # a clip, or nothing that can be read: told when it is opened
        with open_picture(place) as picture:
            suffix = f".{str(picture.format).lower()}"
        return place.rename(place.with_suffix(suffix))
    return place


@contextmanager
def spooled_output(out: Path | None) -> Iterator[Path | None]:
    """``out`` itself; for ``-`` a temporary folder, whose file goes to stdout at the end of the block.

    Raises MediaError if stdout is a terminal, or closed.
    """
    if out != STANDARD_STREAM:
        yield out
        return
    if sys.stdout is None or sys.stdout.isatty():
        raise MediaError("-o - writes a picture to stdout, which is a terminal here; add > out.png")
    with TemporaryDirectory(prefix="std-rt-") as folder:
        yield Path(folder)
        for path in Path(folder).iterdir():
            with path.open("rb") as file, writing("stdout", advice="check what reads it"):
                shutil.copyfileobj(file, sys.stdout.buffer)
                sys.stdout.buffer.flush()
