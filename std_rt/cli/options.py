"""What flags mean: sizes, weighted styles, and the options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from std_rt.core.errors import UsageError

__all__ = [
    "TEMPORAL_MODES",
    "BackendOption",
    "BundleOption",
    "GuidanceModeOption",
    "GuidanceOption",
    "OverwriteOption",
    "PrecisionOption",
    "SizeOption",
    "StepsOption",
    "TemporalOption",
    "check_temporal",
    "parse_size",
    "parse_style",
    "split_number",
]

Size = tuple[int, int]  # (H, W) in pixels

TEMPORAL_MODES = ("off", "noise", "full")
# By the trade-off in docs/results.md: a file can wait for steadiness, a camera has frames to lose.
_TEMPORAL = {"live": "off", "file": "full"}

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def parse_size(text: str | None) -> int | Size | None:
    """``512`` -> 512, ``512x384`` (WIDTHxHEIGHT) -> (384, 512). Raises BadParameter on anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})(?:[xX](\d{1,6}))?", text.strip())
    if match is None or int(match[1]) == 0 or (match[2] and int(match[2]) == 0):
        raise typer.BadParameter(
            f"{text!r} is no size; use pixels such as 512 or WIDTHxHEIGHT such as 512x384"
        )
    return (int(match[2]), int(match[1])) if match[2] else int(match[1])


def split_number(text: str) -> tuple[str, float | None]:
    """``name:0.7`` -> ("name", 0.7); ("name", None) without a number.

    A colon in a file name or a drive letter is no separator: only a number behind the last colon counts,
    and only if no file has the whole text as its name.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or not head or not _NUMBER.fullmatch(tail) or Path(text).exists():
        return text, None
    return head, float(tail)


def parse_style(text: str) -> tuple[Path, float]:
    """``art.png`` or ``art.png:0.7`` -> (path, weight). Raises UsageError where the weight is not above 0."""
    head, weight = split_number(text)
    if weight is None:
        return Path(head), 1.0
    if not 0 < weight < float("inf"):
        raise UsageError(
            f"the weight of style {head} must be above 0, got {weight:g}; leave a style out instead"
        )
    return Path(head), weight


def check_temporal(asked: str | None, where: str) -> str:
    """``asked`` itself, or the default of ``where`` (live, file). Raises BadParameter on an unknown mode."""
    if asked is None:
        return _TEMPORAL[where]
    if asked not in TEMPORAL_MODES:
        raise typer.BadParameter(f"--temporal knows {', '.join(TEMPORAL_MODES)}, not {asked!r}")
    return asked


BundleOption = Annotated[
    str | None,
    typer.Option("--bundle", "-b", metavar="NAME|FOLDER", help="The model; see `std-rt bundles list`."),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="PX|WxH", help="Working size: the side of a square, or WIDTHxHEIGHT, of that area."
    ),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps, among those the bundle allows.")
]
BackendOption = Annotated[
    str, typer.Option("--backend", help="auto, cpu, or one that `std-rt doctor` lists: rtx, openvino, ...")
]
GuidanceOption = Annotated[
    float | None, typer.Option("--guidance", help="Scale, 1 is none; default: the bundle's.")
]
GuidanceModeOption = Annotated[
    str | None,
    typer.Option("--guidance-mode", help="full (twice the work) or residual (a call more a frame)."),
]
TemporalOption = Annotated[
    str | None,
    typer.Option("--temporal", metavar="off|noise|full", help="How much frames hold on to the last ones."),
]
PrecisionOption = Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
