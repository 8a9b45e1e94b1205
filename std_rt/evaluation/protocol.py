"""The protocol ``std``: which pairs are judged, and what is written where.

Styles as of wikiArt, contents as of COCO, or the public test set of Single Trajectory Distillation (Xu et
al., arXiv 2412.18945): folders that the user names, with or without subfolders. All pairs of them, or, of
large sets, as many as were asked for, spread evenly.

    FOLDER/outputs/         the pairs and all outputs (`evaluation.outputs`); what is there is not made again
    FOLDER/results.json     every number: figures with intervals, differences, and those of every pair
    FOLDER/table.md         measures by candidates
    FOLDER/plots.svg        the same to look at
    FOLDER/sheet.png        pictures of some pairs, and with shuffled columns blind.png and its key
    FOLDER/slices.png       the clips' slices over time, if there are clips
    FOLDER/vote/            a page for blind votes, and its key beside it (`evaluation.voting`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from std_rt.core.errors import MediaError
from std_rt.evaluation.outputs import read_plan
from std_rt.evaluation.picture_quality import pair_up
from std_rt.evaluation.statistics import Estimate
from std_rt.evaluation.summary import MEASURES, Summary
from std_rt.media.sources import expand_inputs

__all__ = ["cells", "check_folder", "markdown", "pictures_below", "protocol_files", "rows_shown"]

MOST_PAIRS = 800  # 20 contents in 40 styles, as in much of the literature
_SHEET_PIXELS = 20_000_000
_ARROWS = {1: "↑", -1: "↓", 0: ""}


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a folder of something else (unless ``overwrite``). Raises MediaError."""
    if folder.is_file():
        raise MediaError(f"-o {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and read_plan(folder / "outputs") is None and not overwrite:
        raise MediaError(
            f"-o {folder} is not empty, and not of an earlier run; add --overwrite to write into it, or name "
            "another folder"
        )


def protocol_files(contents: Path, styles: Path, number: int | None = None) -> list[tuple[Path, Path]]:
    """The pairs (content, style): all, but at most ``number`` (default 800); the same for the same files."""
    a, b = pictures_below(contents), pictures_below(styles)
    count = min(len(a) * len(b), MOST_PAIRS if number is None else number)
    return pair_up(a, _spread(b, count), count)


def _spread(files: Sequence[Path], count: int) -> list[Path]:
    """At most ``count`` of them, evenly spaced: of wikiArt's folders, each as many as its share."""
    number = max(1, min(len(files), count))
    return [files[i * len(files) // number] for i in range(number)]


def pictures_below(folder: Path) -> list[Path]:
    """All pictures and clips in a folder and its subfolders, hidden ones left out. Raises MediaError."""
    if not folder.is_dir():
        return expand_inputs([folder])
    below = sorted(path for path in folder.rglob("*") if path.is_dir())
    found: list[Path] = []
    for each in (folder, *below):
        if any(part.startswith(".") for part in each.relative_to(folder).parts):
            continue
        try:
            found += expand_inputs([each])
        except MediaError:  # none in this one
            continue
    if not found:
        raise MediaError(f"{folder} and its subfolders hold no picture that can be read; give another folder")
    return found


def rows_shown(pairs: int, columns: int, side_px: int) -> list[int]:
    """The pairs on a sheet: all, or as many, evenly spaced, as fit into twenty megapixels."""
    number = max(1, min(pairs, _SHEET_PIXELS // (columns * side_px**2)))
    return [i * pairs // number for i in range(number)]


def cells(summary: Summary, evaluations: Mapping[str, int]) -> tuple[list[str], list[list[str]]]:
    """The table: headings, and a row for each measure with a cell for each candidate.

    ``0.451 ±.012*``: half the width of the interval; the star is for the best candidate and for those that
    do not differ from it significantly.
    """
    labels = summary.labels
    rows = (
        [["UNet evaluations", *(str(evaluations.get(label, "")) for label in labels)]] if evaluations else []
    )
    for name, found in summary.estimates.items():
        best, measure = summary.best(name), MEASURES[name]
        title = f"{measure.title} {_ARROWS[measure.better]}".strip()
        marks = ("*" if label in best else "" for label in labels)
        figures = (_figure(found.get(label)) for label in labels)
        rows.append([title, *(a + b for a, b in zip(figures, marks, strict=True))])
    return ["", *labels], rows


def _figure(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    digits = 3 if abs(estimate.value) < 10 else 1
    figure = f"{estimate.value:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return figure
    return f"{figure} ±{(estimate.high - estimate.low) / 2:.{digits}f}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """The table as text for a page, with notes below it."""
    ruled = [list(headings), ["---", *["---:"] * (len(headings) - 1)], *rows]
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in ruled]
    return "\n".join([*lines, "", *notes, ""])
