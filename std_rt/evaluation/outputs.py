"""Outputs as folders of pictures: what other programs are given, what is read from them, what a run resumes.

    FOLDER/outputs.json                    the pairs and bundles they are of
    FOLDER/content/CONTENT--STYLE.png      the content of a pair, a square
    FOLDER/style/CONTENT--STYLE.png        its style picture, a square of the same size
    FOLDER/LABEL/CONTENT--STYLE.png        the output of a bundle, or of another program
    FOLDER/content/CLIP--STYLE/0000.png    a clip, frame by frame; outputs likewise

CONTENT, STYLE and CLIP are file names without their suffix; where two in subfolders are called alike, with
the subfolder's name before them (``ink_1``). Outputs may also be .jpg, .jpeg or .webp.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from std_rt.core.errors import MediaError, UsageError
from std_rt.core.files import write_text, writing
from std_rt.evaluation.measures import Frame
from std_rt.evaluation.picture_quality import Clip
from std_rt.media.fit import resize
from std_rt.media.image import open_picture, read_picture, write_picture

__all__ = [
    "BASELINES",
    "Lazy",
    "Peer",
    "Store",
    "check_labels",
    "frame_names",
    "open_store",
    "pair_names",
    "read_plan",
    "split",
]

T = TypeVar("T")

BASELINES = ("reinhard", "cv2.stylization", "photo")
_TAKEN = {"content", "style", *BASELINES}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_PLAN = "outputs.json"


class Lazy(Sequence[T]):
    """A sequence whose members are made when asked for, so that memory holds one of hundreds."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._indices, self._make = range(count), make

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[T]: ...
    def __getitem__(self, at: int | slice) -> T | Sequence[T]:
        chosen = self._indices[at]
        return self._make(chosen) if isinstance(chosen, int) else [self._make(i) for i in chosen]


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
    contents, styles = (_short_names(paths) for paths in zip(*files, strict=True))
    return [f"{contents[content]}--{styles[style]}" for content, style in files]


def _short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Each file's name without suffix; of files that share one, after that of its folder."""
    distinct = dict.fromkeys(paths)
    stems = Counter(path.stem for path in distinct)
    named = {p: p.stem if stems[p.stem] == 1 else f"{p.parent.name}_{p.stem}" for p in distinct}
    known: dict[str, Path] = {}
    for path, name in named.items():
        if known.setdefault(name, path) != path:
            raise UsageError(f"{known[name]} and {path} have one name without suffix; rename one of them")
    return named


def frame_names(clip: Clip) -> list[str]:
    """The names of a clip's frames, with their folder."""
    return [f"{clip.name}/{i:04d}" for i in range(len(clip.frames))]


class Store:
    """Frames by label and name: in a folder, where they outlive the run; without one, in memory.

    What a folder holds already is read, not made again. ``note`` is what `begin` writes into it, ``fresh``
    are the labels whose pictures there are of something else. Raises MediaError where a picture cannot be
    read or written.
    """

    def __init__(
        self,
        folder: Path | None = None,
        note: str = "",
        fresh: Sequence[str] = (),
        flag: str = "--save-outputs",
    ) -> None:
        self.folder, self._note, self._fresh = folder, note, fresh
        self._advice = f"choose another place with {flag}"
        self._kept: dict[tuple[str, str], Frame] = {}

    def begin(self, names: Sequence[str]) -> None:
        """Make the folder ready for frames of those names; until then nothing is written or removed."""
        if self.folder is None:
            return
        with writing(self.folder / _PLAN, MediaError, self._advice):
            self.folder.mkdir(parents=True, exist_ok=True)
            for label in self._fresh:
                for name in names:
                    self._path(label, name).unlink(missing_ok=True)
            write_text(self.folder / _PLAN, self._note)

    def has(self, label: str, name: str) -> bool:
        """Whether there is nothing left to make."""
        return (label, name) in self._kept if self.folder is None else self._path(label, name).is_file()

    def get(self, label: str, name: str) -> Frame:
        """That frame, which `has` knows."""
        return self._kept[label, name] if self.folder is None else read_picture(self._path(label, name)).frame

    def all(self, label: str, names: Sequence[str]) -> Sequence[Frame]:
        """The frames of those names, each read when asked for."""
        return Lazy(len(names), lambda i: self.get(label, names[i]))

    def put(self, label: str, name: str, frame: Frame) -> None:
        """Keep a frame."""
        if self.folder is None:
            self._kept[label, name] = frame
            return
        path = self._path(label, name)
        with writing(path, MediaError, self._advice):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_picture(path, frame)

    def _path(self, label: str, name: str) -> Path:
        assert self.folder is not None
        return self.folder / label / f"{name}.png"


def open_store(
    folder: Path, plan: Mapping[str, Any], *, overwrite: bool, flag: str = "--save-outputs"
) -> Store:
    """The store of a run; nothing is written until it begins.

    ``plan``: what must be the same to go on with a folder, and under ``bundles``, by label, what made its
    pictures; other labels may join. ``flag``: the option that named the folder. Raises MediaError for a
    folder of something else, unless ``overwrite``.
    """
    if folder.is_file():
        raise MediaError(f"{flag} {folder} is a file; name a folder")
    known = None if overwrite else read_plan(folder)
    if known is None and folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise MediaError(f"{flag} {folder} is not empty; add --overwrite to write into it")
    bundles: dict[str, Any] = dict(known["bundles"]) if known else {}
    changed = [name for name in plan if known and name != "bundles" and known.get(name) != plan[name]]
    changed += [label for label, made in plan["bundles"].items() if bundles.get(label, made) != made]
    if changed:
        raise MediaError(
            f"{folder} holds outputs of another run ({', '.join(changed)} differ); give another folder, "
            "or --overwrite to make them again"
        )
    fresh = [label for label in plan["bundles"] if label not in bundles]
    note = json.dumps({**plan, "bundles": bundles | dict(plan["bundles"])}, indent=1) + "\n"
    return Store(folder, note, fresh if known else ["content", "style", *fresh], flag)


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What `open_store` noted in a folder; None where there is none."""
    try:
        found = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("bundles"), dict) else None


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

    @property
    def evaluations(self) -> int | None:
        """UNet evaluations of one picture, if the folder is that of a bundle's saved outputs."""
        made = (read_plan(self.folder.parent) or {"bundles": {}})["bundles"].get(self.folder.name, {})
        return int(made["evaluations"]) if "evaluations" in made else None

    def read(self, names: Sequence[str], side_px: int) -> tuple[Sequence[Frame], str]:
        """The outputs of those names as squares, each read when asked for, and a note if they are resized.

        Raises UsageError for missing pictures and for those that are not square.
        """
        found = [self._find(name) for name in names]
        paths = [path for path in found if path is not None]
        missing = [name for name, path in zip(names, found, strict=True) if path is None]
        if missing:
            raise UsageError(
                f"--peer {self.label}: {self.folder} lacks {len(missing)} of {len(names)} pictures, such as "
                f"{missing[0]}.png; run it on what --save-outputs FOLDER writes"
            )
        odd = sorted({self._side(path, side_px) for path in dict.fromkeys(paths)} - {side_px})
        sizes = ", ".join(f"{side}x{side}" for side in odd)
        note = f"outputs of {self.label} were resized from {sizes} to {side_px}x{side_px} px" if odd else ""
        return Lazy(len(paths), lambda i: resize(read_picture(paths[i]).frame, (side_px, side_px))), note

    def _side(self, path: Path, side_px: int) -> int:
        with open_picture(path) as picture:
            width, height = picture.size
        if height != width:
            raise UsageError(
                f"--peer {self.label}: {path} is {width}x{height} px, "
                f"but pairs are square; give outputs of {side_px}x{side_px} px"
            )
        return int(width)

    def _find(self, name: str) -> Path | None:
        paths = (self.folder / f"{name}{suffix}" for suffix in _SUFFIXES)
        return next((path for path in paths if path.is_file()), None)
