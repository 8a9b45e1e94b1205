"""What to read and where to write: arguments to a list of jobs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from std_rt.core.errors import MediaError
from std_rt.core.files import check_output, reason
from std_rt.media.image import WRITABLE_SUFFIXES
from std_rt.media.kind import PICTURE_SUFFIXES, VIDEO_SUFFIXES, media_kind
from std_rt.media.video.transcode import CLIP_SUFFIXES, default_clip_suffix

__all__ = ["Job", "expand_inputs", "output_path", "plan_outputs"]

_MARK = "_styled"


@dataclass(frozen=True)
class Job:
    """One input and its output; ``is_video`` says which way it goes."""

    source: Path
    sink: Path
    is_video: bool


def expand_inputs(paths: list[Path]) -> list[Path]:
    """Files as they are; a folder becomes the pictures and clips in it, by name, not recursive.

    Known suffixes only, hidden files and results of an earlier run (``x_styled.png`` beside ``x.*``) left
    out; each file once. Raises MediaError for a missing path or a folder without any.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        try:
            files = _folder_files(path) if path.is_dir() else [path]
            for file in files:
                found.setdefault(file.resolve(strict=True), file)
        except FileNotFoundError:
            raise MediaError(f"{path} does not exist; check the spelling and the folder") from None
        except (OSError, ValueError) as error:
            raise MediaError(f"{path} cannot be read: {reason(error)}") from error
    return list(found.values())


def _folder_files(folder: Path) -> list[Path]:
    names = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    known = [entry for entry in names if entry.suffix.lower() in PICTURE_SUFFIXES | VIDEO_SUFFIXES]
    stems = {entry.stem for entry in known}
    files = [entry for entry in known if not _is_result(entry.stem, stems)]
    if not files:
        raise MediaError(
            f"{folder} holds no picture or clip (subfolders are not searched); give files or another folder"
        )
    return files


def _is_result(stem: str, stems: set[str]) -> bool:
    return stem.endswith(_MARK) and stem.removesuffix(_MARK) in stems


def output_path(source: Path, out: Path | None, many: bool, is_video: bool) -> Path:
    """Where the result of ``source`` goes.

    ``out`` None: ``<stem>_styled<suffix>`` beside the source. ``out`` a folder (exists, or has no suffix):
    the same name in it. Else ``out`` itself. Suffix: kept where it can be written, else .png for pictures
    and .mp4 for clips (.mkv if the sound does not fit mp4; animated GIF and PNG become .mp4).
    Raises MediaError if ``out`` has a suffix that does not fit (photo to .mp4, clip to .png, unknown) or is
    one file for ``many`` inputs.
    """
    if out is not None and not out.is_dir() and out.suffix:
        _check_named(source, out, many, is_video)
        return out
    folder = source.parent if out is None else out
    if folder.is_file():
        raise MediaError(f"{folder} is a file without a suffix; give -o a folder or a name such as out.png")
    suffix = default_clip_suffix(source) if is_video else _picture_suffix(source)
    return folder / f"{source.stem}{_MARK}{suffix}"


def _picture_suffix(source: Path) -> str:
    return source.suffix if source.suffix.lower() in WRITABLE_SUFFIXES else ".png"


def _check_named(source: Path, out: Path, many: bool, is_video: bool) -> None:
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


def plan_outputs(inputs: list[Path], out: Path | None, *, overwrite: bool = False) -> list[Job]:
    """Expand, classify, name and check everything before any work: the list of jobs.

    Raises MediaError for the first input that is missing or no picture or clip, for two inputs with one
    output, for an output that exists (without ``overwrite``), is an input, or cannot be written.
    """
    sources = expand_inputs(inputs)
    jobs: dict[Path, Job] = {}
    for source in sources:
        is_video = media_kind(source) == "video"
        sink = output_path(source, out, len(sources) > 1, is_video)
        twin = jobs.setdefault(sink.absolute(), Job(source, sink, is_video))
        if twin.source != source:
            raise MediaError(
                f"{twin.source} and {source} would both become {sink}; stylize them one at a time with -o"
            )
    _check_sinks(list(jobs.values()), overwrite)
    return list(jobs.values())


def _check_sinks(jobs: list[Job], overwrite: bool) -> None:
    inputs = {job.source.resolve() for job in jobs}
    for job in jobs:
        if job.sink.resolve() in inputs - {job.source.resolve()}:
            raise MediaError(f"{job.sink} is one of the inputs; give another folder with -o")
        check_output(job.sink, source=job.source, overwrite=overwrite)
