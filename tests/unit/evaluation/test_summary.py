"""The summary of a comparison: what its rows, stars, plots and comparisons come from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from support.cli_support import picture

from std_rt.core.errors import MediaError
from std_rt.evaluation.plots import plots
from std_rt.evaluation.protocol import cells, pictures_below, protocol_files, rows_shown
from std_rt.evaluation.statistics import csls, frechet_distance
from std_rt.evaluation.summary import MEASURES, Summary, summarise
from std_rt.evaluation.voting import MOST_ROWS, plan_rows

N = 40
LABELS = ("a-1-step", "a-4-step", "other", "photo")
Numbers = dict[str, dict[str, dict[str, float]]]


def _scores() -> Numbers:
    """``other`` is a hair better in texture than ``a-4-step``, both far better than ``a-1-step``."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0.5, 0.1, N)
    level = {"a-1-step": 0.1, "a-4-step": 0.0, "other": -1e-4, "photo": -0.3}
    rows: Numbers = {label: {} for label in LABELS}
    for label in LABELS:
        noise = rng.normal(0, 0.02, N)
        for i in range(N):
            rows[label][f"{i}"] = {
                "texture": hard[i] + noise[i] + level[label],
                "ssim": hard[i],
                "lpips": noise[i] ** 2,
            }
    return rows


def _features(seed: int = 1) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    found = {label: rng.normal(i, 1, (N, 6)) for i, label in enumerate((*LABELS, "style"))}
    unit = {label: v / np.linalg.norm(v, axis=1, keepdims=True) for label, v in found.items()}
    return {"artfid": found, "csd_csls": unit}


@pytest.fixture(scope="module")
def summary() -> Summary:
    clip = {"source": {"warping": 0.1, "sharpness": 1.0}, "other": {"warping": 0.2, "sharpness": 0.9}}
    clips = {f"{i}.mp4": dict(clip) for i in range(2)}
    clips["0.mp4"]["a-1-step"] = {"warping": 0.3, "sharpness": 0.8}
    return summarise(_scores(), _features(), {**clips, "cuts.mp4": {}})


def test_the_best_and_what_does_not_differ_from_it(summary: Summary) -> None:
    assert summary.best("texture") == {"a-4-step", "other"}  # the photo would be better: it is no candidate
    assert summary.best("ssim") == set()  # neither more nor less is better
    assert summary.differences["texture"]["a-1-step"]["other"].sign == 1
    assert summary.differences["texture"]["other"]["a-1-step"].sign == -1
    headings, rows = cells(summary, {"a-1-step": 1, "a-4-step": 4})
    assert headings == ["", *LABELS]
    assert rows[0] == ["UNet evaluations", "1", "4", "", ""]
    stars = next(row for row in rows if row[0] == "texture ↓")
    assert [cell.endswith("*") for cell in stars[1:]] == [False, True, True, False]


def test_artfid_is_the_product_of_its_parts(summary: Summary) -> None:
    features, scores = _features()["artfid"], _scores()
    for label in LABELS:
        fid = frechet_distance(features[label], features["style"])
        lpips = np.mean([row["lpips"] for row in scores[label].values()])
        assert summary.estimates["fid"][label].value == pytest.approx(fid)
        found = summary.estimates["artfid"][label]
        assert found.value == pytest.approx((1 + lpips) * (1 + fid))
        assert found.low is not None
        assert found.low < found.value
    # Each label's features are a step nearer to the styles'.
    assert summary.best("artfid") == {"other"}


def test_csls_is_a_mean_over_pairs(summary: Summary) -> None:
    unit = _features()["csd_csls"]
    for label in LABELS:
        assert summary.estimates["csd_csls"][label].value == pytest.approx(
            csls(unit[label], unit["style"]).mean()
        )


def test_clips_are_for_those_that_have_all_of_them(summary: Summary) -> None:
    assert list(summary.estimates["warping"]) == ["other"]
    assert summary.estimates["clip_sharpness"]["other"].value == pytest.approx(0.9)
    missing = summary.missing()
    assert missing["--vgg FILE"] == ["VGG style", "VGG content"]
    assert "--artfid FOLDER" not in missing


def test_the_order_is_that_of_all_tables(summary: Summary) -> None:
    assert list(summary.estimates) == [name for name in MEASURES if name in summary.estimates]
    assert summary.as_dict()["estimates"]["warping"]["other"] == [pytest.approx(0.2)]


def test_plots_show_every_figure_once_and_bundles_over_evaluations(summary: Summary) -> None:
    def marks(evaluations: dict[str, int]) -> Counter[str]:
        root = ElementTree.fromstring(plots(summary, evaluations))
        return Counter(element.tag.rpartition("}")[2] for element in root.iter())

    figures = sum(len(row) for row in summary.estimates.values())
    alone = marks({"a-4-step": 4})
    assert (alone["circle"], alone["polyline"]) == (figures, 0)
    both = marks({"a-1-step": 1, "a-4-step": 4})
    whole = [name for name, row in summary.estimates.items() if "a-1-step" in row]
    assert (both["circle"], both["polyline"]) == (figures + 2 * len(whole), len(whole))


@pytest.mark.parametrize(("pairs", "candidates"), [(3, 2), (500, 2), (500, 5), (40, 20)])
def test_votes_are_on_all_candidates_alike(pairs: int, candidates: int) -> None:
    labels = [f"{i:02d}" for i in range(candidates)]
    rows = plan_rows(pairs, labels, seed=3)
    assert len(set(rows)) == len(rows) <= MOST_ROWS
    matches = Counter(frozenset(row[1:]) for row in rows)
    assert len(set(matches.values())) == 1
    assert len(matches) == min(candidates * (candidates - 1) // 2, MOST_ROWS)
    first = Counter(row[1] < row[2] for row in rows)
    assert abs(first[True] - first[False]) <= 1
    assert rows == plan_rows(pairs, labels, seed=3) != plan_rows(pairs, labels, seed=4)


def test_pairs_of_large_sets_are_spread_over_all_folders(tmp_path: Path) -> None:
    for movement in "abc":
        for i in range(8):
            picture(tmp_path / "styles" / movement / f"{i}.png", 8, 8)
    picture(tmp_path / "styles" / ".hidden" / "x.png", 8, 8)
    for i in range(4):
        picture(tmp_path / "contents" / f"{i}.png", 8, 8)
    few = protocol_files(tmp_path / "contents", tmp_path / "styles", 6)
    assert Counter(style.parent.name for _, style in few) == {"a": 2, "b": 2, "c": 2}
    whole = protocol_files(tmp_path / "contents", tmp_path / "styles")
    assert len(set(whole)) == len(whole) == 4 * 24
    assert len(pictures_below(tmp_path / "styles")) == 24
    with pytest.raises(MediaError, match="does not exist"):
        pictures_below(tmp_path / "none")


def test_a_sheet_has_as_many_rows_as_it_can_hold() -> None:
    assert rows_shown(5, 8, 256) == [0, 1, 2, 3, 4]
    assert rows_shown(800, 10, 1024) == [0]
    assert rows_shown(800, 10, 512) == [i * 800 // 7 for i in range(7)]
