"""Plots of a comparison as one SVG file: every measure of every candidate with its interval.

Candidates are rows, a panel a measure; a dot is the figure, the line through it the interval. Where the
candidates make different numbers of UNet evaluations, the panels below show the measures over these, a line
for each bundle. Written by hand: a plotting library is not among what a runtime needs, and any browser opens
SVG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil

from std_rt.evaluation.statistics import Estimate
from std_rt.evaluation.summary import MEASURES, Summary

__all__ = ["plots"]

_WIDE, _ROW, _TOP, _GAP = 230, 20, 34, 16  # px
_COLUMNS = 4
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#777777", "#000000")
_ARROWS = {1: " ↑", -1: " ↓", 0: ""}
_BELOW = 150  # height of a panel over evaluations


def plots(summary: Summary, evaluations: Mapping[str, int]) -> str:
    """The file's text. ``evaluations``: label -> UNet evaluations of a picture, where known."""
    names = max(len(label) for label in summary.labels) * 7 + 12
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(summary.labels)}
    tall = _TOP + _ROW * len(summary.labels) + _GAP
    above = ceil(len(summary.estimates) / _COLUMNS)
    parts = []
    for i, (measure, row) in enumerate(summary.estimates.items()):
        x, y = names + i % _COLUMNS * (_WIDE + _GAP), i // _COLUMNS * tall
        if i % _COLUMNS == 0:
            parts += _row_names(summary.labels, names, y)
        parts += _dots(measure, row, summary.labels, colours, (x, y))
    height = above * tall
    lines = _lines_of(summary.labels, evaluations)
    if lines:
        for i, (measure, row) in enumerate(summary.estimates.items()):
            x, y = names + i % _COLUMNS * (_WIDE + _GAP), height + i // _COLUMNS * (_BELOW + _TOP + _GAP)
            parts += _over_evaluations(measure, row, lines, evaluations, colours, (x, y))
        height += above * (_BELOW + _TOP + _GAP)
    width = names + min(_COLUMNS, len(summary.estimates)) * (_WIDE + _GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _row_names(labels: Sequence[str], right: int, top: int) -> list[str]:
    return [
        _text(right - 8, top + _TOP + _ROW * k + 14, label, 'text-anchor="end"')
        for k, label in enumerate(labels)
    ]


def _dots(
    measure: str,
    row: Mapping[str, Estimate],
    labels: Sequence[str],
    colours: Mapping[str, str],
    at: tuple[int, int],
) -> list[str]:
    """One panel: a dot and its interval for every candidate that has the measure."""
    x, y = at
    low, high = _range(row)
    parts = _frame(measure, at, _ROW * len(labels))
    parts += [_text(x + 2, y + _TOP + _ROW * len(labels) + 11, f"{low:.3g}", 'fill="#777"')]
    parts += [
        _text(
            x + _WIDE - 2, y + _TOP + _ROW * len(labels) + 11, f"{high:.3g}", 'fill="#777" text-anchor="end"'
        )
    ]

    def place(value: float) -> float:
        return x + 8 + (value - low) / (high - low) * (_WIDE - 16)

    for k, label in enumerate(labels):
        if label not in row:
            continue
        found, middle = row[label], y + _TOP + _ROW * k + 10
        if found.low is not None and found.high is not None:
            ends = f'x1="{place(found.low):.1f}" x2="{place(found.high):.1f}" y1="{middle}" y2="{middle}"'
            parts.append(f'<line {ends} stroke="{colours[label]}" stroke-width="2"/>')
        parts.append(f'<circle cx="{place(found.value):.1f}" cy="{middle}" r="4" fill="{colours[label]}"/>')
    return parts


def _range(row: Mapping[str, Estimate]) -> tuple[float, float]:
    known = [v for e in row.values() for v in (e.value, e.low, e.high) if v is not None]
    low, high = min(known), max(known)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _lines_of(labels: Sequence[str], evaluations: Mapping[str, int]) -> dict[str, list[str]]:
    """Candidates that differ in their evaluations only, by the label less its steps; {} if none has two."""
    found: dict[str, list[str]] = {}
    for label in labels:
        if label in evaluations:
            stem = label.rpartition("-")[0].rpartition("-")[0] if label.endswith("-step") else label
            found.setdefault(stem, []).append(label)
    several = len({evaluations[label] for group in found.values() for label in group}) > 1
    return {k: sorted(v, key=evaluations.__getitem__) for k, v in found.items()} if several else {}


def _over_evaluations(
    measure: str,
    row: Mapping[str, Estimate],
    lines: Mapping[str, Sequence[str]],
    evaluations: Mapping[str, int],
    colours: Mapping[str, str],
    at: tuple[int, int],
) -> list[str]:
    """One panel: the measure over UNet evaluations, evenly spaced, a line a bundle."""
    x, y = at
    shown = {stem: [label for label in labels if label in row] for stem, labels in lines.items()}
    shown = {stem: labels for stem, labels in shown.items() if labels}
    if not shown:
        return []
    counts = sorted({evaluations[label] for labels in shown.values() for label in labels})
    low, high = _range({label: row[label] for labels in shown.values() for label in labels})
    parts = _frame(measure, at, _BELOW)

    def place(label: str, value: float) -> tuple[float, float]:
        step = (counts.index(evaluations[label]) + 0.5) / len(counts)
        return x + step * _WIDE, y + _TOP + 8 + (high - value) / (high - low) * (_BELOW - 16)

    for value, shift in ((high, 14), (low, _BELOW - 6)):
        parts.append(_text(x + 3, y + _TOP + shift, f"{value:.3g}", 'fill="#777"'))
    for k, count in enumerate(counts):
        middle = x + (k + 0.5) / len(counts) * _WIDE
        parts.append(_text(middle, y + _TOP + _BELOW + 12, str(count), 'text-anchor="middle" fill="#777"'))
    parts.append(_text(x + _WIDE, y + _TOP - 6, "UNet evaluations →", 'text-anchor="end" fill="#777"'))
    for stem, labels in shown.items():
        colour = colours[labels[0]]
        points = [place(label, row[label].value) for label in labels]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for label, (a, b) in zip(labels, points, strict=True):
            e = row[label]
            if e.low is not None and e.high is not None:
                top, bottom = place(label, e.high)[1], place(label, e.low)[1]
                ends = f'x1="{a:.1f}" x2="{a:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"'
                parts.append(f'<line {ends} stroke="{colour}" stroke-width="1.5"/>')
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>')
        style = f'fill="{colour}" font-size="9" text-anchor="end"'
        parts.append(_text(points[-1][0] - 6, points[-1][1] - 5, stem, style))
    return parts


def _frame(measure: str, at: tuple[int, int], height: int) -> list[str]:
    x, y = at
    title = MEASURES[measure].title + _ARROWS[MEASURES[measure].better]
    return [
        _text(x, y + _TOP - 6, title, 'font-weight="bold"'),
        f'<rect x="{x}" y="{y + _TOP}" width="{_WIDE}" height="{height}" fill="none" stroke="#ccc"/>',
    ]


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'
