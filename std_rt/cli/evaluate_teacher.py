"""`std-rt evaluate --teacher`: LoRAs beside their teacher, on the same pictures and noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from std_rt.cli.evaluate import Common, judge_with, write_table
from std_rt.core.errors import UsageError
from std_rt.core.files import check_output
from std_rt.core.machine import require
from std_rt.core.schedule import GRID_POINTS
from std_rt.evaluation.bundles import (
    Frame,
    Pair,
    clip_frames,
    clips_among,
    draw_pairs,
    read_mask,
    write_sheet,
)
from std_rt.evaluation.measures import WarpingError
from std_rt.pipeline.conditioning import square

if TYPE_CHECKING:
    from std_rt.evaluation.students import Bench, Candidate, ClipJudge, Row, Setting

__all__ = ["TeacherRequest", "run_teacher"]

# Name of a measure -> heading of its column; what is not here is in the JSON only.
_COLUMNS = {
    "latent_rmse": "latents",
    "psnr_db": "PSNR dB",
    "colour": "colour",
    "texture": "texture",
    "structure": "structure",
    "ssim": "SSIM",
    "warping": "warping",
    "outside_max": "outside",
    "clip_content": "CLIP content",
    "clip_style": "CLIP style",
    "dino_content": "DINO content",
    "csd": "CSD",
    "aesthetic": "aesthetic",
}
_WIDE = 200


@dataclass(frozen=True)
class TeacherRequest:
    """The command as parsed."""

    common: Common
    teacher: Path
    loras: tuple[Path, ...]
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    schedule: str
    reference_steps: int
    reference_guidance: float | None
    eta: float
    prompt: str
    mask: Path | None
    seed: int
    batch: int
    device: str
    side_px: int


def run_teacher(request: TeacherRequest) -> None:
    """Run every candidate at every setting: a table, the sheet, and JSON, which is the last line too.

    In the table ``scale`` is the guidance and ``evals`` counts UNet evaluations a picture.
    """
    common = request.common
    require("std-rt evaluate --teacher", "train", "torch", "diffusers", "peft", "safetensors")
    for path in (common.sheet, common.table):
        if path is not None:
            check_output(path, overwrite=common.overwrite)
    _check(request)
    pairs = draw_pairs(common.contents, common.styles, common.pairs, request.side_px)
    bench, candidates, settings, floor = _prepare(request, pairs)
    rows = _run(bench, candidates, settings)
    _write_sheet(common.sheet, pairs, rows, settings[0])
    _report(request, rows, len(pairs), floor)


def _check(request: TeacherRequest) -> None:
    if request.schedule not in ("aligned", "diffusers"):
        raise UsageError(f"--schedule knows aligned and diffusers, not {request.schedule!r}")
    if request.common.precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision knows auto, fp32 and bf16, not {request.common.precision!r}")
    for count in request.steps:
        if not 1 <= count <= GRID_POINTS:
            raise UsageError(f"--steps must be in 1..{GRID_POINTS}, got {count}")
    asked = request.reference_guidance
    scales = [*request.guidance, *([] if asked is None else [asked])]
    for scale in scales:
        if not 0 < scale < 100:
            raise UsageError(f"guidance is a scale above 0 (1: none), got {scale:g}")
    if request.mask is not None and request.common.videos:
        raise UsageError("--mask is for pictures, --video for clips; give one of them")


def _prepare(
    request: TeacherRequest, pairs: list[Pair]
) -> tuple[Bench, list[Candidate], list[Setting], dict[str, float]]:
    """Everything loaded and encoded; the last are the warping errors of the clips themselves."""
    from std_rt.evaluation.students import (
        Bench,
        Setting,
        choose_device,
        encode_scene,
        read_candidate,
        teachers,
    )
    from std_rt.training.distil.base import load_base

    common, device = request.common, choose_device(request.device)
    judge = judge_with(common.scorers, device)
    base = load_base(request.teacher)
    loras = [read_candidate(path, base) for path in dict.fromkeys(request.loras)]
    base.to(device)
    settings = [Setting(n, g, request.schedule) for n in request.steps for g in request.guidance]

    def encode(which: Sequence[Pair], **options: Any) -> Any:
        return encode_scene(
            base,
            which,
            seed=request.seed,
            draws=max(request.steps),
            prompt=request.prompt,
            device=device,
            batch=request.batch,
            **options,
        )

    mask = None if request.mask is None else read_mask(request.mask, request.side_px)
    clips = {} if request.mask is not None else _clips(request, pairs)
    meters = {name: WarpingError([content for content, _ in clip]) for name, clip in clips.items()}
    bench = Bench(
        base,
        encode(pairs, mask=mask),
        judge,
        [(encode(clip, one_noise=True), _judge_clip(meters[name])) for name, clip in clips.items()],
        request.reference_steps,
        request.reference_guidance,
        request.batch,
        common.precision == "bf16",
    )
    floor = {name: meter.floor for name, meter in meters.items() if meter.floor is not None}
    return bench, [*teachers(loras, request.eta), *loras], settings, floor


def _clips(request: TeacherRequest, pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Frames of each clip as squares, every one with the same style: that of the pair in its turn."""
    found = {}
    for i, path in enumerate(clips_among(request.common.contents, request.common.videos)):
        style = pairs[i % len(pairs)][1]
        frames = clip_frames(path, request.common.frames)
        found[str(path)] = [(square(frame, request.side_px), style) for frame in frames]
    return found


def _judge_clip(meter: WarpingError) -> ClipJudge:
    def judge(outputs: Sequence[Frame]) -> dict[str, float]:
        value = meter.of(outputs)
        return {} if value is None else {"warping": value}

    return judge


def _run(bench: Bench, candidates: list[Candidate], settings: list[Setting]) -> list[Row]:
    """All rows; frames are kept for the sheet's setting and the yardsticks only."""
    from std_rt.evaluation.students import compare

    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("comparing", total=len(candidates) * len(settings) + 1)
        for row in compare(bench, candidates, settings):
            shown = row.label == "reference" or (row.steps, row.guidance) == (
                settings[0].steps,
                settings[0].guidance,
            )
            rows.append(row if shown else replace(row, frames=[]))
            progress.update(task, advance=1, description=f"{row.label}, {row.steps} steps")
    return rows


def _write_sheet(path: Path, pairs: list[Pair], rows: list[Row], first: Setting) -> None:
    """One row a pair: content, style, the teacher's yardstick, and the first seed of each label."""
    chosen: dict[str, Row] = {}
    for row in rows:
        if row.frames:
            chosen.setdefault(row.label, row)
    names = ["content", "style", *(_heading(row) for row in chosen.values())]
    sheet = [[a, b, *(row.frames[i] for row in chosen.values())] for i, (a, b) in enumerate(pairs)]
    write_sheet(path, sheet, names=dict(enumerate(names)))


def _heading(row: Row) -> str:
    label = "teacher" if row.label == "reference" else row.label
    return f"{label} {row.steps} x{row.guidance:g}"


def _report(request: TeacherRequest, rows: list[Row], pairs: int, floor: dict[str, float]) -> None:
    from std_rt.evaluation.students import aggregate

    groups = aggregate(rows)
    _print(groups)
    for name, value in floor.items():
        typer.echo(f"warping error of {name} itself: {value:.4f}")
    typer.echo(f"sheet: {request.common.sheet}")
    found = {
        "teacher": str(request.teacher),
        "schedule": request.schedule,
        "pairs": pairs,
        "size_px": request.side_px,
        "seed": request.seed,
        "warping_of_source": floor,
        "table": groups,
    }
    write_table(request.common.table, {**found, "rows": [row.as_dict() for row in rows]})
    typer.echo(json.dumps(found))


def _print(groups: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("run")
    for name in ("steps", "scale", "evals", "seeds"):
        table.add_column(name, justify="right", no_wrap=True)
    names = [name for name in _COLUMNS if name in groups[0]["mean"]]
    for name in names:
        table.add_column(_COLUMNS[name], justify="right", no_wrap=True)
    for group in groups:
        counts = (str(group["steps"]), f"{group['guidance']:g}", str(group["evaluations"]))
        cells = [_cell(group, name) for name in names]
        table.add_row(group["label"], *counts, str(len(group["seeds"])), *cells)
    console = Console()
    if not console.is_terminal:
        console.width = _WIDE  # a file or a pipe has no edge to wrap at
    console.print(table)


def _cell(group: dict[str, Any], name: str) -> str:
    digits = 2 if name in ("psnr_db", "aesthetic") else 3
    mean = f"{group['mean'][name]:.{digits}f}"
    return mean if group["spread"] is None else f"{mean} ± {group['spread'][name]:.{digits}f}"
