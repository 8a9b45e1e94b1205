"""`std-rt evaluate`: compares a bundle with two baselines, or LoRAs with their teacher.

Without ``--teacher`` it judges a bundle and needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from std_rt.cli.options import (
    BackendOption,
    BundleOption,
    OverwriteOption,
    PrecisionOption,
    SizeOption,
    parse_size,
)
from std_rt.cli.terminal import print_table
from std_rt.core.errors import UsageError

if TYPE_CHECKING:
    from std_rt.evaluation.candidates import Candidate
    from std_rt.evaluation.measures import Frame, Mask
    from std_rt.evaluation.picture_quality import Judge, Pair
    from std_rt.evaluation.students import Comparison, Row, Setting

__all__ = ["EvaluateRequest", "evaluate"]

Found = dict[str, Any]  # for JSON

# Measure of a student -> heading of its column; the others are in the JSON only.
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

_students = partial(Option, rich_help_panel="Comparing students with their teacher")
_weights = partial(Option, rich_help_panel="Scores that need model weights")


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """What ``std-rt evaluate`` was asked to do. Raises UsageError for flags that do not fit together."""

    contents: Annotated[
        Path, Argument(metavar="CONTENTS", help="Folder of pictures; clips are judged for flicker too.")
    ]
    styles: Annotated[Path, Argument(metavar="STYLES", help="Folder of style pictures.")]
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="Contact sheet to write.")] = Path(
        "eval.png"
    )
    table: Annotated[Path | None, Option(metavar="OUT.json", help="Also write all numbers there.")] = None
    pairs: Annotated[int, Option(help="Pairs, spread evenly over both folders.")] = 12
    size: SizeOption = None
    steps: Annotated[list[int] | None, Option(help="Denoising steps; repeatable with --teacher.")] = None
    video: Annotated[
        list[Path] | None, Option(metavar="FILE", help="A clip to judge for flicker; repeatable.")
    ] = None
    frames: Annotated[int, Option(min=2, help="Frames to judge per clip.")] = 48
    precision: PrecisionOption = "auto"
    overwrite: OverwriteOption = False
    bundle: BundleOption = None
    backend: BackendOption = "auto"
    teacher: Annotated[Path | None, _students(metavar="FOLDER", help="The teacher: a diffusers folder.")] = (
        None
    )
    lora: Annotated[
        list[Path] | None,
        _students(
            metavar="FILE", help="A student LoRA; repeatable. LoRAs that differ only in seed are grouped."
        ),
    ] = None
    guidance: Annotated[
        list[float] | None,
        _students(help="Guidance scale; repeatable. 1 disables guidance and halves the cost."),
    ] = None
    schedule: Annotated[
        str,
        _students(help="aligned (starts at tau) or diffusers (the img2img pipeline's truncated schedule)."),
    ] = "aligned"
    reference_steps: Annotated[int, _students(help="Steps of the teacher's reference run.")] = 50
    reference_guidance: Annotated[
        float | None, _students(help="Default: the middle of the LoRA's trained range, or 2.")
    ] = None
    eta: Annotated[float, _students(help="Where the teacher's trajectory starts if no --lora is given.")] = (
        0.75
    )
    prompt: Annotated[str, _students(help="Prompt, if the teacher has text encoders.")] = ""
    mask: Annotated[Path | None, _students(metavar="FILE", help="Mask: stylize only where it is white.")] = (
        None
    )
    seed: Annotated[int, _students(min=0, help="Noise seed.")] = 0
    batch: Annotated[int, _students(min=1, help="Pictures at a time.")] = 4
    device: Annotated[str, _students(help="auto, cpu, cuda or cuda:1.")] = "auto"
    clip: Annotated[Path | None, _weights(metavar="FOLDER", help="A CLIPModel.")] = None
    dino: Annotated[Path | None, _weights(metavar="FOLDER", help="A Dinov2Model.")] = None
    csd: Annotated[Path | None, _weights(metavar="FILE", help="The CSD checkpoint.")] = None
    aesthetic: Annotated[Path | None, _weights(metavar="FILE", help="LAION's predictor; needs --clip.")] = (
        None
    )

    def __post_init__(self) -> None:
        if self.teacher is None:
            self._check_bundle_flags()
        else:
            self._check_student_flags()

    def _check_bundle_flags(self) -> None:
        parse_size(self.size)
        given = {
            "--lora": self.lora,
            "--mask": self.mask,
            "--guidance": self.guidance,
            "--schedule": self.schedule != "aligned",
            "--reference-guidance": self.reference_guidance,
            "--prompt": self.prompt,
        }
        for name, value in given.items():
            if value:
                raise UsageError(f"{name} needs --teacher FOLDER")
        if len(self.steps or ()) > 1:
            asked = " ".join(f"--steps {count}" for count in self.steps or ())
            raise UsageError(f"a bundle is judged at one step count, got {asked}")

    def _check_student_flags(self) -> None:
        from std_rt.core.schedule import GRID_POINTS

        if self.bundle is not None:
            raise UsageError("--bundle and --teacher are mutually exclusive; give one")
        if isinstance(parse_size(self.size), tuple):
            raise UsageError(
                f"--size {self.size}: with --teacher pictures are square; give one side, such as 256"
            )
        if self.schedule not in ("aligned", "diffusers"):
            raise UsageError(f"--schedule must be aligned or diffusers, got {self.schedule!r}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UsageError(f"--precision must be auto, fp32 or bf16 with --teacher, got {self.precision!r}")
        for count in self.steps or ():
            if not 1 <= count <= GRID_POINTS:
                raise UsageError(f"--steps must be in 1..{GRID_POINTS}, got {count}")
        for scale in (*(self.guidance or ()), self.reference_guidance):
            if scale is not None and not 0 < scale < 100:
                raise UsageError(f"the guidance scale must be above 0 (1 disables guidance), got {scale:g}")
        if self.mask is not None and self.video:
            raise UsageError("--mask is for pictures, --video for clips; give one of them")


def evaluate(request: EvaluateRequest) -> None:
    """Judge a bundle, or LoRAs against their teacher: a sheet, a table, and JSON as the last line.

    std-rt evaluate photos paintings --bundle engines/mine

    std-rt evaluate photos paintings --teacher FOLDER --lora runs/std-0/lora.safetensors --steps 2 --steps 4

    --teacher and scores with weights need: pip install '.\\[train]'
    """
    from std_rt.core.files import check_output, write_text, writing

    for path in (request.output, request.table):
        if path is not None:
            check_output(path, overwrite=request.overwrite)
    found, details = (_judge_bundle(request), {}) if request.teacher is None else _judge_students(request)
    if request.table is not None:
        with writing(request.table):
            write_text(request.table, json.dumps(found | details, indent=2) + "\n")
    typer.echo(json.dumps(found))


def _judge_with(request: EvaluateRequest, device: str = "cpu") -> Judge:
    """The weight-free measures, then the scores whose weights are given (these need torch)."""
    from std_rt.core.machine import require
    from std_rt.evaluation.picture_quality import weight_free

    files = {name: getattr(request, name) for name in ("clip", "dino", "csd", "aesthetic")}
    if not any(files.values()):
        return weight_free
    require("std-rt evaluate with --clip, --dino or --csd", "train", "torch", "transformers", "safetensors")
    from std_rt.evaluation.scorers import load_scorers

    scorers = load_scorers(**files, device=device)

    def judge(frame: Frame, content: Frame, style: Frame, mask: Mask | None) -> dict[str, float]:
        found = weight_free(frame, content, style, mask)
        for scorer in scorers:
            found |= scorer(frame, content, style)
        return found

    return judge


def _clips(request: EvaluateRequest, pairs: list[Pair], side_px: int) -> dict[str, list[Pair]]:
    """Frames of each clip as squares, each clip with the style of the pair at its position."""
    from std_rt.evaluation.picture_quality import clip_frames, clips_among
    from std_rt.pipeline.conditioning import square

    return {
        str(path): [
            (square(frame, side_px), pairs[i % len(pairs)][1]) for frame in clip_frames(path, request.frames)
        ]
        for i, path in enumerate(clips_among(request.contents, request.video or ()))
    }


def _judge_bundle(request: EvaluateRequest) -> Found:
    """Mean scores by method and warping errors of clips, printed and returned."""
    from rich.console import Console

    from std_rt.evaluation.picture_quality import draw_pairs, judge_clip, judge_pictures
    from std_rt.pipeline.stylizer import Stylizer

    judge = _judge_with(request)
    loaded = Stylizer.load(
        request.bundle,
        backend=request.backend,
        size=parse_size(request.size),
        steps=request.steps[0] if request.steps else None,
        precision=request.precision,
    )
    with loaded as stylizer, Console(stderr=True).status("judging pictures") as status:
        side = max(stylizer.size if isinstance(stylizer.size, tuple) else (stylizer.size,))
        pairs = draw_pairs(request.contents, request.styles, request.pairs, side)
        scores = judge_pictures(stylizer, pairs, request.output, judge)
        warping = {}
        for name, clip in _clips(request, pairs, side).items():
            status.update(f"judging {name}")
            warping[name] = judge_clip(stylizer, [frame for frame, _ in clip], clip[0][1])
        described = {
            "bundle": stylizer.bundle.name,
            "digest": stylizer.bundle.digest,
            "steps": stylizer.steps,
        }
    for title, rows in (("mean score", scores), ("warping error", warping)):
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        cells = ([f"{row[name]:.3f}" if name in row else "" for name in names] for row in rows.values())
        if rows:
            table = ([name, *row] for name, row in zip(rows, cells, strict=True))
            print_table(table, [title, *names], numeric=True)
    typer.echo(f"sheet (content | style | std-rt | baselines): {request.output}")
    return {"scores": scores, "warping": warping, "pairs": len(pairs), "size_px": side, **described}


def _judge_students(request: EvaluateRequest) -> tuple[Found, Found]:
    """Every candidate at every setting: printed, grouped by seeds for JSON, and all rows for the table."""
    from std_rt.core.machine import require

    require("std-rt evaluate --teacher", "train", "torch", "diffusers", "peft", "safetensors")
    from std_rt.evaluation.picture_quality import draw_pairs
    from std_rt.evaluation.students import Setting, aggregate

    side = parse_size(request.size) or 256
    assert isinstance(side, int)
    pairs = draw_pairs(request.contents, request.styles, request.pairs, side)
    settings = [
        Setting(steps, guidance, request.schedule)
        for steps in request.steps or [4]
        for guidance in request.guidance or [1.0]
    ]
    comparison, candidates, floor = _prepare(request, pairs, side)
    rows = _run(comparison, candidates, settings)
    _write_sheet(request.output, pairs, rows)
    groups = aggregate(rows)
    _print_groups(groups)
    for name, value in floor.items():
        typer.echo(f"warping error of {name} itself: {value:.4f}")
    typer.echo(f"sheet: {request.output}")
    found = {
        "teacher": str(request.teacher),
        "schedule": request.schedule,
        "pairs": len(pairs),
        "size_px": side,
        "seed": request.seed,
        "warping_of_source": floor,
        "table": groups,
    }
    return found, {"rows": [row.as_dict() for row in rows]}


def _prepare(
    request: EvaluateRequest, pairs: list[Pair], side_px: int
) -> tuple[Comparison, list[Candidate], dict[str, float]]:
    """Everything loaded and encoded, and the warping errors of the clips themselves."""
    from std_rt.evaluation.candidates import read_candidate, teachers
    from std_rt.evaluation.measures import WarpingError
    from std_rt.evaluation.picture_quality import read_mask
    from std_rt.evaluation.students import Comparison, choose_device
    from std_rt.training.distil.base import load_base
    from std_rt.training.distil.sampling import encode_scene

    assert request.teacher is not None
    device = choose_device(request.device)
    judge = _judge_with(request, device)
    base = load_base(request.teacher)
    loras = [read_candidate(path, base) for path in dict.fromkeys(request.lora or ())]
    base.to(device)
    encode = partial(
        encode_scene,
        base,
        seed=request.seed,
        draws=max(request.steps or [4]),
        prompt=request.prompt,
        device=device,
        batch=request.batch,
    )
    mask = None if request.mask is None else read_mask(request.mask, side_px)
    clips = _clips(request, pairs, side_px) if mask is None else {}
    meters = {name: WarpingError([content for content, _ in clip]) for name, clip in clips.items()}

    def warping(meter: WarpingError, outputs: Sequence[Frame]) -> dict[str, float]:
        value = meter.of(outputs)
        return {} if value is None else {"warping": value}

    comparison = Comparison(
        base,
        encode(pairs, mask=mask),
        judge,
        [(encode(clip, one_noise=True), partial(warping, meters[name])) for name, clip in clips.items()],
        request.reference_steps,
        request.reference_guidance,
        request.batch,
        request.precision == "bf16",
    )
    floor = {name: meter.floor for name, meter in meters.items() if meter.floor is not None}
    return comparison, [*teachers(loras, request.eta), *loras], floor


def _run(comparison: Comparison, candidates: list[Candidate], settings: list[Setting]) -> list[Row]:
    """All rows; frames are kept for the references and the first setting, which the sheet shows."""
    from rich.console import Console
    from rich.progress import Progress

    from std_rt.evaluation.students import compare

    shown = (settings[0].steps, settings[0].guidance)
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("comparing", total=len(candidates) * len(settings) + 1)
        for row in compare(comparison, candidates, settings):
            keep = row.label == "reference" or (row.steps, row.guidance) == shown
            rows.append(row if keep else replace(row, frames=[]))
            progress.update(task, advance=1, description=f"{row.label}, {row.steps} steps")
    return rows


def _write_sheet(path: Path, pairs: list[Pair], rows: list[Row]) -> None:
    """One row per pair: content, style, the teacher's reference, and the first seed of each label."""
    from std_rt.evaluation.picture_quality import write_sheet

    chosen: dict[str, Row] = {}
    for row in rows:
        if row.frames:
            chosen.setdefault(row.label, row)
    labels = {"reference": "teacher"}
    headings = (f"{labels.get(label, label)} {row.steps} x{row.guidance:g}" for label, row in chosen.items())
    sheet = [[a, b, *(row.frames[i] for row in chosen.values())] for i, (a, b) in enumerate(pairs)]
    write_sheet(path, sheet, names=dict(enumerate(["content", "style", *headings])))


def _print_groups(groups: list[Found]) -> None:
    """A table; ``scale`` is the guidance, ``evals`` counts UNet evaluations per picture."""
    names = [name for name in _COLUMNS if name in groups[0]["mean"]]
    headings = ["run", "steps", "scale", "evals", "seeds", *(_COLUMNS[name] for name in names)]
    rows = []
    for group in groups:
        counts = (group["steps"], f"{group['guidance']:g}", group["evaluations"], len(group["seeds"]))
        rows.append([group["label"], *map(str, counts), *(_cell(group, name) for name in names)])
    print_table(rows, headings, numeric=True)


def _cell(group: Found, name: str) -> str:
    digits = 2 if name in ("psnr_db", "aesthetic") else 3
    mean = f"{group['mean'][name]:.{digits}f}"
    return mean if group["spread"] is None else f"{mean} ± {group['spread'][name]:.{digits}f}"
