"""Comparison of bundles with other programs and baselines, on the same pairs and clips.

Bundles run one after the other, each at every number of steps, through the product's own path. Baselines are
Reinhard colour transfer, OpenCV's ``stylization`` filter and the photo itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import BundleError
from std_rt.evaluation import outputs
from std_rt.evaluation.measures import Frame, reinhard
from std_rt.evaluation.outputs import BASELINES, Lazy, Peer, Store
from std_rt.evaluation.picture_quality import (
    Clip,
    Describe,
    Judge,
    Pair,
    check_side,
    draw_pair,
    judge_clip,
    paint_clip,
    paint_picture,
    read_clips,
    time_slice,
    weight_free,
    write_sheet,
)
from std_rt.pipeline.stylizer import Stylizer

__all__ = ["Contender", "Material", "PeerOutputs", "Results", "contenders"]

TEMPORAL_OFF = ", temporal off"  # behind the label of a clip without temporal filter

Told = Callable[[str, int, int], None]  # (what, number done, number of all)


@dataclass(frozen=True)
class Contender:
    """A bundle at a number of steps; ``label`` names it in tables, on sheets and as a folder."""

    label: str
    bundle: Bundle
    steps: int

    @property
    def evaluations(self) -> int:
        """UNet evaluations of a picture."""
        return _evaluations(self.bundle, self.steps)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        known = {"bundle": self.bundle.name, "digest": self.bundle.digest, "steps": self.steps}
        return known | {"evaluations": self.evaluations}


def _evaluations(bundle: Bundle, steps: int) -> int:
    """Full guidance costs two evaluations a step, residual guidance one more a picture."""
    return {"full": 2 * steps, "residual": steps + 1}.get(bundle.guidance["mode"], steps)


def _steps_for(bundle: Bundle, evaluations: int) -> int:
    """The steps that cost so many evaluations. Raises BundleError."""
    costs = {_evaluations(bundle, steps): steps for steps in bundle.steps_allowed}
    if evaluations not in costs:
        raise BundleError(
            f"bundle '{bundle.name}' cannot make {evaluations} UNet evaluations a picture (guidance "
            f"{bundle.guidance['mode']}); use --evaluations with one of {', '.join(map(str, sorted(costs)))}"
        )
    return costs[evaluations]


def contenders(
    asked: Iterable[str | None], steps: Sequence[int], evaluations: Sequence[int] = ()
) -> list[Contender]:
    """Every bundle (NAME, FOLDER or LABEL=...; None: the built-in one) at every number of steps.

    ``evaluations`` are numbers of UNet evaluations instead. Without either, at the bundle's own steps.
    Raises BundleError for an unknown bundle or number.
    """
    found = []
    for text in asked:
        label, source = outputs.split(text) if text else ("", None)
        bundle = load_bundle(source)
        counts = [_steps_for(bundle, number) for number in evaluations] or steps or [bundle.default_steps]
        for count in counts:
            bundle.coefficients(count)
            found.append(Contender(f"{label or bundle.name}-{count}-step", bundle, count))
    return found


@dataclass(frozen=True, eq=False)
class Material:
    """What all candidates are judged on; ``names`` are those of the pairs (`outputs.pair_names`).

    ``pairs`` are squares of ``side_px``, each drawn once and kept in ``store``.
    """

    names: list[str]
    pairs: Sequence[Pair]
    clips: list[Clip]
    side_px: int
    store: Store = field(default_factory=Store)

    @classmethod
    def read(
        cls,
        files: Sequence[tuple[Path, Path]],
        side_px: int,
        clips: Sequence[Path],
        frames: int,
        store: Store | None = None,
    ) -> Material:
        """Nothing is read yet but the first ``frames`` of each clip."""
        check_side(side_px)
        kept, names = store or Store(), outputs.pair_names(files)

        def pair(i: int) -> Pair:
            kinds, name = ("content", "style"), names[i]
            if not all(kept.has(kind, name) for kind in kinds):
                for kind, frame in zip(kinds, draw_pair(*files[i], side_px), strict=True):
                    kept.put(kind, name, frame)
            return kept.get("content", name), kept.get("style", name)

        # Clips take their style from the files: the store may not be written to yet.
        styles = Lazy(len(files), lambda i: draw_pair(*files[i], side_px))
        return cls(names, Lazy(len(files), pair), read_clips(clips, files, styles, frames), side_px, kept)

    def prepare(self, told: Told) -> None:
        """Read all that can be damaged, before any work; keep what other programs are to be run on."""
        frames = [name for clip in self.clips for name in outputs.frame_names(clip)]
        self.store.begin([*self.names, *frames, *map(_without_filter, frames)])
        for i in range(len(self.pairs)):
            told("reading pictures", i, len(self.pairs))
            _ = self.pairs[i]
        for clip in self.clips:
            for name, frame in zip(outputs.frame_names(clip), clip.frames, strict=True):
                self.store.put("content", name, frame)
            self.store.put("style", clip.name, clip.style)


@dataclass(frozen=True, eq=False)
class PeerOutputs:
    """What another program made of the pairs, and of some of the clips; ``notes`` say what was resized."""

    label: str
    pictures: Sequence[Frame]
    clips: list[tuple[Clip, Sequence[Frame]]]
    notes: list[str]
    evaluations: int | None = None

    @classmethod
    def read(cls, peer: Peer, material: Material) -> PeerOutputs:
        """Raises UsageError for what is missing or not square; a clip may be missing as a whole."""
        pictures, note = peer.read(material.names, material.side_px)
        clips, notes = [], [note]
        for clip in filter(peer.has, material.clips):
            frames, note = peer.read(outputs.frame_names(clip), material.side_px)
            clips.append((clip, frames))
            notes.append(note)
        shown = [line for line in dict.fromkeys(notes) if line]
        return cls(peer.label, pictures, clips, shown, peer.evaluations)


class Results:
    """Outputs of all candidates by label, in the order in which they are added, and their scores.

    ``steady``: clip -> label -> what `judge_clip` finds; empty for a clip of nothing but cuts.
    ``slices``: clip -> label -> `time_slice`. ``evaluations``: label -> UNet evaluations of a picture, where
    known.
    """

    def __init__(self, material: Material, judge: Judge = weight_free) -> None:
        self.material, self.judge = material, judge
        self.pictures: dict[str, Sequence[Frame]] = {}
        self.evaluations: dict[str, int] = {}
        self.steady: dict[str, dict[str, dict[str, float]]] = {str(clip.path): {} for clip in material.clips}
        self.slices: dict[str, dict[str, Frame]] = {name: {} for name in self.steady}
        for clip in material.clips:
            self._add_clip("source", clip, clip.frames)

    def _add_clip(self, label: str, clip: Clip, frames: Sequence[Frame]) -> None:
        """Judge it now: of hundreds of clips' frames, memory holds one clip's."""
        shown, name = list(frames), str(clip.path)
        self.slices[name][label] = time_slice(shown)
        found = judge_clip(clip, shown, self.judge)
        if found:
            self.steady[name][label] = found

    def add_bundle(
        self, contender: Contender, opened: Callable[[], AbstractContextManager[Stylizer]], told: Told
    ) -> None:
        """Paint all pairs and clips that the material's store does not hold yet, and say what is under way.

        ``opened`` opens the bundle, if there is anything to paint. Clips are rendered with
        ``--temporal full``, the default of `std-rt stylize`, and without.
        """
        label, material, store = contender.label, self.material, self.material.store
        self.evaluations[label] = contender.evaluations
        with ExitStack() as stack:
            stylizer = cache(lambda: stack.enter_context(opened()))
            todo = [i for i, name in enumerate(material.names) if not store.has(label, name)]
            for k, i in enumerate(todo):
                told(label, k, len(todo))
                store.put(label, material.names[i], paint_picture(stylizer(), *material.pairs[i]))
            for clip in material.clips:
                told(f"{label}: {clip.path.name}", 0, 2)
                self._add_clip(label, clip, self._clip_painted(label, clip, "full", stylizer))
                told(f"{label}: {clip.path.name}", 1, 2)
                plain = self._clip_painted(label, clip, "off", stylizer)
                self._add_clip(label + TEMPORAL_OFF, clip, plain)
        self.pictures[label] = store.all(label, material.names)

    def _clip_painted(
        self, label: str, clip: Clip, temporal: str, stylizer: Callable[[], Stylizer]
    ) -> Sequence[Frame]:
        """All frames of a clip, painted together or not at all: the filter carries over between them."""
        store, names = self.material.store, outputs.frame_names(clip)
        if temporal == "off":
            names = [_without_filter(name) for name in names]
        if not all(store.has(label, name) for name in names):
            stylizer().set_style(clip.style)
            frames = paint_clip(stylizer(), clip.frames, temporal)
            for name, frame in zip(names, frames, strict=True):
                store.put(label, name, frame)
        return store.all(label, names)

    def add_peer(self, peer: PeerOutputs) -> None:
        """Take what was checked before."""
        self.pictures[peer.label] = peer.pictures
        if peer.evaluations is not None:
            self.evaluations[peer.label] = peer.evaluations
        for clip, frames in peer.clips:
            self._add_clip(peer.label, clip, frames)

    def add_baselines(self) -> None:
        """Reinhard colour transfer, OpenCV's filter, the photo: made when they are judged."""
        makers: tuple[Callable[[Frame, Frame], Frame], ...] = (reinhard, _stylization, lambda photo, _: photo)
        for name, make in zip(BASELINES, makers, strict=True):
            self.pictures[name] = self._made(make)
            for clip in self.material.clips:
                if name != "photo":  # the clip itself is ``source``
                    self._add_clip(name, clip, [make(frame, clip.style) for frame in clip.frames])

    def _made(self, make: Callable[[Frame, Frame], Frame]) -> Sequence[Frame]:
        pairs = self.material.pairs
        return Lazy(len(pairs), lambda i: make(*pairs[i]))

    def scores(
        self, told: Told, describe: Mapping[str, Describe] | None = None
    ) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, NDArray[np.float32]]]]:
        """Every measure of every output: label -> name of the pair -> numbers; and the features asked for.

        Of those: name of the feature -> label -> ``[N, D]``, where ``style`` is the style pictures'.
        """
        numbers: dict[str, dict[str, dict[str, float]]] = {label: {} for label in self.pictures}
        vectors: dict[str, dict[str, list[NDArray[np.float32]]]] = {
            kind: {label: [] for label in (*self.pictures, "style")} for kind in describe or {}
        }
        for i, name in enumerate(self.material.names):
            told("judging pairs", i, len(self.material.names))
            pair = self.material.pairs[i]
            shown = {label: frames[i] for label, frames in self.pictures.items()}
            for label, frame in shown.items():
                numbers[label][name] = self.judge(frame, *pair, None)
            for kind, of in (describe or {}).items():
                for label, frame in {**shown, "style": pair[1]}.items():
                    vectors[kind][label].append(of(frame))
        stacked = {
            kind: {label: np.stack(rows) for label, rows in columns.items()}
            for kind, columns in vectors.items()
        }
        return numbers, stacked

    def clip_figures(self, name: str) -> dict[str, dict[str, float]]:
        """``warping`` or ``sharpness``: clip -> label -> figure."""
        return {clip: {label: row[name] for label, row in rows.items()} for clip, rows in self.steady.items()}

    def write_sheet(self, path: Path, chosen: Sequence[int] | None = None) -> list[str]:
        """One row per pair (of those ``chosen``): content, style, all candidates; the headings."""
        shown = [label for label in self.pictures if label != "photo"]
        rows = [
            [*self.material.pairs[i], *(self.pictures[label][i] for label in shown)]
            for i in (range(len(self.material.pairs)) if chosen is None else chosen)
        ]
        headings = ["content", "style", *shown]
        write_sheet(path, rows, names=dict(enumerate(headings)))
        return headings

    def write_slices(self, path: Path) -> list[str]:
        """One row per clip: its slice over time, then all candidates'; the headings."""
        labels = list(dict.fromkeys(label for rows in self.slices.values() for label in rows))
        empty = {clip: np.full_like(rows["source"], 255) for clip, rows in self.slices.items()}
        rows = [[of.get(label, empty[clip]) for label in labels] for clip, of in self.slices.items()]
        write_sheet(path, rows, names=dict(enumerate(labels)))
        return labels


def _without_filter(name: str) -> str:
    """Where a frame without temporal filter is: ``CLIP--STYLE/off/0000``."""
    clip, _, frame = name.rpartition("/")
    return f"{clip}/off/{frame}"


def _stylization(content: Frame, _: Frame) -> Frame:
    return np.asarray(cv2.stylization(content), np.uint8)
