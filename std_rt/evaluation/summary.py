"""Summary of a comparison: every measure of every candidate with its interval, and what differs.

Intervals and differences are those of the bootstrap over pairs, or over clips for the measures of clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from std_rt.evaluation.outputs import BASELINES
from std_rt.evaluation.statistics import (
    FEWEST,
    Estimate,
    Resampled,
    bootstrap,
    csls,
    frechet_distance,
    resampled_rows,
)

__all__ = ["MEASURES", "Measure", "Summary", "summarise"]

Rows = Mapping[str, Mapping[str, float]]  # name of a pair, or clip -> measure -> number
Features = Mapping[str, Mapping[str, NDArray[np.float32]]]  # feature -> label, or ``style`` -> [N, D]

_FID_RESAMPLES = 100  # each costs a singular value decomposition of [N, N]


@dataclass(frozen=True)
class Measure:
    """``better``: 1 higher, -1 lower, 0 neither. ``brought_by``: the option without which it is not there."""

    title: str
    better: int = 0
    brought_by: str = ""


_CLIP_INPUT = "a clip among CONTENTS, or --video FILE"
MEASURES: dict[str, Measure] = {
    "latent_rmse": Measure("latents", -1),
    "psnr_db": Measure("PSNR dB", 1),
    "csd": Measure("CSD", 1, "--csd FILE"),
    "csd_csls": Measure("CSD CSLS", 1, "--csd FILE"),
    "aesthetic": Measure("aesthetic", 1, "--clip FOLDER --aesthetic FILE"),
    "vgg_style": Measure("VGG style", -1, "--vgg FILE"),
    "vgg_content": Measure("VGG content", -1, "--vgg FILE"),
    "artfid": Measure("ArtFID", -1, "--artfid FOLDER"),
    "fid": Measure("FID to styles", -1, "--artfid FOLDER"),
    "lpips": Measure("LPIPS to content", -1, "--artfid FOLDER"),
    "clip_content": Measure("CLIP content", 1, "--clip FOLDER"),
    "clip_style": Measure("CLIP style", 1, "--clip FOLDER"),
    "dino_content": Measure("DINO content", 1, "--dino FOLDER"),
    "colour": Measure("colour", -1),
    "texture": Measure("texture", -1),
    "structure": Measure("structure", 1),
    "ssim": Measure("SSIM"),
    "lattice": Measure("lattice", -1),
    "sharpness": Measure("sharpness"),
    "warping": Measure("warping", -1, _CLIP_INPUT),
    "clip_sharpness": Measure("clip sharpness", 0, _CLIP_INPUT),
    "outside_max": Measure("outside", -1),
}
"""Measure -> its heading, in the order of tables."""


@dataclass(frozen=True, eq=False)
class Summary:
    """``estimates``: measure -> label -> figure with interval. ``differences``: measure -> label -> another
    label -> the first's figure less the other's. Both in the order of `MEASURES` and of the candidates."""

    labels: list[str]
    estimates: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, dict[str, Estimate]]]

    def best(self, measure: str) -> set[str]:
        """The best candidate by a measure, and those not significantly different from it; no baselines."""
        better, row = MEASURES[measure].better, self.estimates[measure]
        runners = [label for label in row if label not in BASELINES]
        if better == 0 or len(runners) < 2:
            return set()
        first = max(runners, key=lambda label: better * row[label].value)
        others = self.differences[measure][first]
        return {label for label in runners if label == first or others[label].sign == 0}

    def missing(self) -> dict[str, list[str]]:
        """What is not there -> the measures it would bring."""
        found: dict[str, list[str]] = {}
        for name, measure in MEASURES.items():
            if measure.brought_by and name not in self.estimates:
                found.setdefault(measure.brought_by, []).append(measure.title)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``[value, low, high]``, without the last two where there are too few rows."""
        return {
            "estimates": {m: {a: _numbers(e) for a, e in row.items()} for m, row in self.estimates.items()},
            "differences": {
                m: {a: {b: _numbers(e) for b, e in others.items()} for a, others in row.items()}
                for m, row in self.differences.items()
            },
        }


def _numbers(estimate: Estimate) -> list[float]:
    found = (estimate.value, estimate.low, estimate.high)
    return [number for number in found if number is not None]


def summarise(
    by_pair: Mapping[str, Rows], features: Features, clips: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> Summary:
    """Everything that was measured.

    ``by_pair``: label -> pair -> measure -> number. ``features``: ``csd_csls`` and ``artfid`` as
    `scorers.load_features` gives them. ``clips``: clip -> label -> ``warping`` and ``sharpness``.
    """
    labels = list(by_pair)
    columns = {
        name: _table(by_pair, labels, name) for name in next(iter(next(iter(by_pair.values())).values()))
    }
    if "csd_csls" in features:
        of = features["csd_csls"]
        columns["csd_csls"] = np.stack([csls(of[label], of["style"]) for label in labels], 1)
    together, k = bootstrap(np.concatenate(list(columns.values()), 1)), len(labels)
    found = {name: (labels, together.part(i * k, (i + 1) * k)) for i, name in enumerate(columns)}
    if "artfid" in features and len(columns["lpips"]) > 1:
        fid, artfid = _artfid([features["artfid"][label] for label in labels], features, columns["lpips"])
        found |= {"fid": (labels, fid), "artfid": (labels, artfid)}
    steady = {label: {clip: rows[label] for clip, rows in clips.items() if label in rows} for label in labels}
    judged = [clip for clip, rows in clips.items() if rows]
    whole = [label for label in labels if judged and len(steady[label]) == len(judged)]
    if whole:
        for name, figure in (("warping", "warping"), ("clip_sharpness", "sharpness")):
            found[name] = (whole, bootstrap(_table(steady, whole, figure)))
    ordered = {name: found[name] for name in MEASURES if name in found}
    return Summary(
        labels,
        {name: {a: r.column(i) for i, a in enumerate(known)} for name, (known, r) in ordered.items()},
        {name: _differences(known, r) for name, (known, r) in ordered.items()},
    )


def _table(rows: Mapping[str, Rows], labels: Sequence[str], name: str) -> NDArray[np.float64]:
    """One measure ``[N, K]``."""
    return np.array([[row[name] for row in rows[label].values()] for label in labels]).T


def _differences(labels: Sequence[str], of: Resampled) -> dict[str, dict[str, Estimate]]:
    return {a: {b: of.difference(i, k) for k, b in enumerate(labels) if k != i} for i, a in enumerate(labels)}


def _artfid(
    outputs: Sequence[NDArray[np.float32]], features: Features, lpips: NDArray[np.float64], seed: int = 0
) -> tuple[Resampled, Resampled]:
    """FID of outputs and styles, and ``(1 + LPIPS) (1 + FID)`` (Wright and Ommer, arXiv 2207.12280).

    The FID of resampled pairs is too large, as that of few pairs is: intervals are about the figure, by the
    deviation over resamples.
    """
    styles, n = features["artfid"]["style"], len(lpips)
    rng = np.random.default_rng(seed)
    counts = resampled_rows(rng, n, _FID_RESAMPLES) if n >= FEWEST else np.empty((0, n), np.int64)
    once = np.ones((1, n), np.int64)
    every = np.concatenate([once, counts])
    fid = np.array([[frechet_distance(rows, styles, c) for rows in outputs] for c in every])
    both = (1 + every @ lpips / n) * (1 + fid)
    return tuple(Resampled(v[0], v[1:], centred=True) for v in (fid, both))  # type: ignore[return-value]
