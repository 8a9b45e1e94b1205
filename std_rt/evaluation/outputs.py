"""Outputs as folders of pictures: what other programs are given, and what is read from them.

    FOLDER/content/CONTENT--STYLE.png      the content of a pair, a square
    FOLDER/style/CONTENT--STYLE.png        its style picture, a square of the same size
    FOLDER/LABEL/CONTENT--STYLE.png        the output of a bundle, or of another program
    FOLDER/content/CLIP--STYLE/0000.png    a clip, frame by frame; outputs likewise

CONTENT, STYLE and CLIP are file names without their suffix. Outputs may also be .jpg, .jpeg or .webp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from std_rt.core.errors import MediaError, UsageError
from std_rt.core.files import writing
from std_rt.evaluation.measures import Frame
from std_rt.evaluation.picture_quality import Clip, pair_name
from std_rt.media.fit import resize
from std_rt.media.image import read_picture, write_picture

__all__ = ["BASELINES", "Peer", "check_folder", "check_labels", "frame_names", "pair_names", "save", "split"]

BASELINES = ("reinhard", "cv2.stylization", "photo")
_TAKEN = {"content", "style", *BASELINES}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def split(text: str) -> tuple[str, str]:
    """``LABEL=PLACE`` -> (label, place); the label is "" if there is none, or a file has the whole name."""
    label, equals, place = text.partition("=")
    return (label.strip(), place) if equals and not Path(text).exists() else ("", text)


def check_labels(labels: Sequence[str]) -> None:
    """Raise UsageError unless the labels differ, and can be the names of folders."""
    for label in labels:
        if not re.fullmatch(r"\w([\w .+-]*[\w+-])?", label) or label.lower() in _TAKEN:
            taken = ", ".join(sorted(_TAKEN))
            raise UsageError(
                f"a candidate cannot be called {label!r}; use letters, digits, '.', '_', '-' and '+' "
                f"(and not {taken}), as in --bundle NAME=FOLDER"
            )
        if labels.count(label) > 1:
            raise UsageError(f"two candidates are called {label!r}; rename one, as in --bundle NAME=FOLDER")


def pair_names(files: Sequence[tuple[Path, Path]]) -> list[str]:
    """The name of every pair. Raises UsageError if two pairs of different files have one name."""
    known: dict[str, tuple[Path, Path]] = {}
    for pair in files:
        first = known.setdefault(pair_name(*pair), pair)
        if first != pair:
            twins = next(two for two in zip(first, pair, strict=True) if two[0] != two[1])
            raise UsageError(f"{twins[0]} and {twins[1]} have one name without suffix; rename one of them")
    return [pair_name(*pair) for pair in files]


def frame_names(clip: Clip) -> list[str]:
    """The names of a clip's frames, with their folder."""
    return [f"{clip.name}/{i:04d}" for i in range(len(clip.frames))]


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a folder that is a file or holds something (unless ``overwrite``)."""
    if folder.is_file():
        raise MediaError(f"--save-outputs {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise MediaError(f"--save-outputs {folder} is not empty; add --overwrite to write into it")


def save(folder: Path, frames: Mapping[str, Frame]) -> None:
    """Write each frame as ``folder/NAME.png``. Raises MediaError."""
    for name, frame in frames.items():
        path = folder / f"{name}.png"
        with writing(path, MediaError, "choose another place with --save-outputs"):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_picture(path, frame)


@dataclass(frozen=True)
class Peer:
    """Another program's outputs."""

    label: str
    folder: Path

    @classmethod
    def parse(cls, text: str) -> Peer:
        """``NAME=FOLDER``. Raises UsageError."""
        label, folder = split(text)
        if not label:
            raise UsageError(f"--peer {text} has no name; write NAME=FOLDER, as in --peer MicroAST={text}")
        if not Path(folder).is_dir():
            raise UsageError(f"--peer {text}: there is no folder {folder}")
        return cls(label, Path(folder))

    def has(self, clip: Clip) -> bool:
        """Whether it holds that clip; clips are optional."""
        return (self.folder / clip.name).is_dir()

    def read(self, names: Sequence[str], side_px: int) -> tuple[list[Frame], str]:
        """The outputs of those names as squares, and a note if they had to be resized.

        Raises UsageError for missing pictures and for those that are not square.
        """
        paths = [self._find(name) for name in names]
        missing = [name for name, path in zip(names, paths, strict=True) if path is None]
        if missing:
            raise UsageError(
                f"--peer {self.label}: {self.folder} lacks {len(missing)} of {len(paths)} pictures, such as "
                f"{missing[0]}.png; run it on what --save-outputs FOLDER writes"
            )
        found = {path: read_picture(path).frame for path in paths if path is not None}
        for path, frame in found.items():
            height, width = frame.shape[:2]
            if height != width:
                raise UsageError(
                    f"--peer {self.label}: {path} is {width}x{height} px, "
                    f"but pairs are square; give outputs of {side_px}x{side_px} px"
                )
        frames = [found[path] for path in paths if path is not None]
        odd = sorted({len(frame) for frame in frames} - {side_px})
        sizes = ", ".join(f"{side}x{side}" for side in odd)
        note = f"outputs of {self.label} were resized from {sizes} to {side_px}x{side_px} px" if odd else ""
        return [resize(frame, (side_px, side_px)) for frame in frames], note

    def _find(self, name: str) -> Path | None:
        paths = (self.folder / f"{name}{suffix}" for suffix in _SUFFIXES)
        return next((path for path in paths if path.is_file()), None)
