"""Comparison of bundles with other programs and baselines, on the same pairs and clips.

Bundles run one after the other, each at every number of steps, through the product's own path. Baselines are
Reinhard colour transfer, OpenCV's ``stylization`` filter and the photo itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from std_rt.core.bundle import Bundle, load_bundle
from std_rt.evaluation import outputs
from std_rt.evaluation.measures import Frame, reinhard
from std_rt.evaluation.outputs import BASELINES, Peer
from std_rt.evaluation.picture_quality import (
    Clip,
    Judge,
    Pair,
    draw_pairs,
    paint_clip,
    paint_picture,
    read_clips,
    write_sheet,
)
from std_rt.pipeline.stylizer import Stylizer

__all__ = ["Contender", "Material", "PeerOutputs", "Results", "contenders", "save_material"]

TEMPORAL_OFF = ", temporal off"  # behind the label of a clip without temporal filter


@dataclass(frozen=True)
class Contender:
    """A bundle at a number of steps; ``label`` names it in tables, on sheets and as a folder."""

    label: str
    bundle: Bundle
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"bundle": self.bundle.name, "digest": self.bundle.digest, "steps": self.steps}


def contenders(asked: Iterable[str | None], steps: Sequence[int]) -> list[Contender]:
    """Every bundle (NAME, FOLDER or LABEL=...; None: the built-in one) at every number of steps.

    Without ``steps``, at the bundle's own. Raises BundleError for an unknown bundle or number of steps.
    """
    found = []
    for text in asked:
        label, source = outputs.split(text) if text else ("", None)
        bundle = load_bundle(source)
        for count in steps or [bundle.default_steps]:
            bundle.coefficients(count)
            found.append(Contender(f"{label or bundle.name}-{count}-step", bundle, count))
    return found


@dataclass(frozen=True, eq=False)
class Material:
    """What all candidates are judged on; ``names`` are those of the pairs (`outputs.pair_names`)."""

    names: list[str]
    pairs: list[Pair]
    clips: list[Clip]

    @classmethod
    def read(
        cls, files: Sequence[tuple[Path, Path]], side_px: int, clips: Sequence[Path], frames: int
    ) -> Material:
        """Squares of ``side_px``, and the first ``frames`` of each clip."""
        pairs = draw_pairs(files, side_px)
        return cls(outputs.pair_names(files), pairs, read_clips(clips, files, pairs, frames))


@dataclass(frozen=True, eq=False)
class PeerOutputs:
    """What another program made of the pairs, and of some of the clips; ``notes`` say what was resized."""

    label: str
    pictures: list[Frame]
    clips: list[tuple[Clip, list[Frame]]]
    notes: list[str]

    @classmethod
    def read(cls, peer: Peer, material: Material) -> PeerOutputs:
        """Raises UsageError for what is missing or not square; a clip may be missing as a whole."""
        side = len(material.pairs[0][0])
        pictures, note = peer.read(material.names, side)
        clips, notes = [], [note]
        for clip in filter(peer.has, material.clips):
            frames, note = peer.read(outputs.frame_names(clip), side)
            clips.append((clip, frames))
            notes.append(note)
        return cls(peer.label, pictures, clips, [line for line in dict.fromkeys(notes) if line])


class Results:
    """Outputs of all candidates by label, in the order in which they are added, and their scores.

    ``steady``: clip -> label -> warping error and sharpness; empty for a clip of nothing but cuts.
    """

    def __init__(self, material: Material) -> None:
        self.material = material
        self.pictures: dict[str, list[Frame]] = {}
        self.steady: dict[str, dict[str, dict[str, float]]] = {str(clip.path): {} for clip in material.clips}
        for clip in material.clips:
            self._add_clip("source", clip, clip.frames)

    def _add_clip(self, label: str, clip: Clip, frames: Sequence[Frame]) -> None:
        found = clip.meter.judge(frames)
        if found:
            self.steady[str(clip.path)][label] = found

    def add_bundle(
        self, contender: Contender, stylizer: Stylizer, folder: Path | None, told: Callable[[str], None]
    ) -> None:
        """Paint all pairs and clips, and say what is under way. ``folder``: where to save them, too.

        Clips are rendered with ``--temporal full``, the default of `std-rt stylize`, and without.
        """
        label, material = contender.label, self.material
        told(f"{label}: pictures")
        self.pictures[label] = [paint_picture(stylizer, *pair) for pair in material.pairs]
        if folder is not None:
            outputs.save(folder / label, dict(zip(material.names, self.pictures[label], strict=True)))
        for clip in material.clips:
            told(f"{label}: {clip.path.name}")
            stylizer.set_style(clip.style)
            frames = paint_clip(stylizer, clip.frames, "full")
            self._add_clip(label, clip, frames)
            self._add_clip(label + TEMPORAL_OFF, clip, paint_clip(stylizer, clip.frames, "off"))
            if folder is not None:
                outputs.save(folder / label, dict(zip(outputs.frame_names(clip), frames, strict=True)))

    def add_peer(self, peer: PeerOutputs) -> None:
        """Take what was read before."""
        self.pictures[peer.label] = peer.pictures
        for clip, frames in peer.clips:
            self._add_clip(peer.label, clip, frames)

    def add_baselines(self) -> None:
        """Reinhard colour transfer, OpenCV's filter, the photo."""
        makers: tuple[Callable[[Frame, Frame], Frame], ...] = (reinhard, _stylization, lambda photo, _: photo)
        for name, make in zip(BASELINES, makers, strict=True):
            self.pictures[name] = [make(*pair) for pair in self.material.pairs]
            for clip in self.material.clips:
                if name != "photo":  # the clip itself is ``source``
                    self._add_clip(name, clip, [make(frame, clip.style) for frame in clip.frames])

    def scores(self, judge: Judge, told: Callable[[str], None]) -> dict[str, dict[str, dict[str, float]]]:
        """Every measure of every output: label -> name of the pair -> numbers."""
        found: dict[str, dict[str, dict[str, float]]] = {label: {} for label in self.pictures}
        for i, (name, pair) in enumerate(zip(self.material.names, self.material.pairs, strict=True)):
            told(f"judging: {i} of {len(self.material.pairs)} pairs")
            for label, frames in self.pictures.items():
                found[label][name] = judge(frames[i], *pair, None)
        return found

    def clip_figures(self, name: str) -> dict[str, dict[str, float]]:
        """``warping`` or ``sharpness``: clip -> label -> figure."""
        return {clip: {label: row[name] for label, row in rows.items()} for clip, rows in self.steady.items()}

    def write_sheet(self, path: Path) -> list[str]:
        """One row per pair: content, style, all candidates; the headings."""
        shown = [label for label in self.pictures if label != "photo"]
        rows = [
            [*pair, *(self.pictures[label][i] for label in shown)]
            for i, pair in enumerate(self.material.pairs)
        ]
        headings = ["content", "style", *shown]
        write_sheet(path, rows, names=dict(enumerate(headings)))
        return headings


def save_material(folder: Path, material: Material) -> None:
    """What other programs are to be run on: ``content`` and ``style`` of all pairs and clips."""
    for kind, column in (("content", 0), ("style", 1)):
        frames = {name: pair[column] for name, pair in zip(material.names, material.pairs, strict=True)}
        outputs.save(folder / kind, frames)
    for clip in material.clips:
        outputs.save(folder / "content", dict(zip(outputs.frame_names(clip), clip.frames, strict=True)))
        outputs.save(folder / "style", {clip.name: clip.style})


def _stylization(content: Frame, _: Frame) -> Frame:
    return np.asarray(cv2.stylization(content), np.uint8)
