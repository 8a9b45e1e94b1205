"""`std-rt evaluate`: a bundle beside two baselines, or LoRAs beside their teacher.

Without ``--teacher`` it judges a bundle and needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from std_rt.cli.options import BackendOption, BundleOption, OverwriteOption, SizeOption, parse_size
from std_rt.core.errors import UsageError

if TYPE_CHECKING:
    from std_rt.evaluation.candidates import Candidate
    from std_rt.evaluation.measures import Frame, Mask
    from std_rt.evaluation.picture_quality import Judge, Pair
    from std_rt.evaluation.students import Comparison, Row, Setting

__all__ = ["evaluate"]

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
_WIDE = 200

_option = typer.Option
_students = partial(typer.Option, rich_help_panel="Students beside their teacher")
_weights = partial(typer.Option, rich_help_panel="Scores that need weights")


@dataclass(frozen=True)
class _Request:
    """The command as parsed: the parameters of `evaluate`."""

    contents: Path
    styles: Path
    sheet: Path
    table: Path | None
    pairs: int
    size: str | None
    steps: list[int] | None
    video: list[Path] | None
    frames: int
    precision: str
    overwrite: bool
    bundle: str | None
    backend: str
    teacher: Path | None
    lora: list[Path] | None
    guidance: list[float] | None
    schedule: str
    reference_steps: int
    reference_guidance: float | None
    eta: float
    prompt: str
    mask: Path | None
    seed: int
    batch: int
    device: str
    clip: Path | None
    dino: Path | None
    csd: Path | None
    aesthetic: Path | None


def evaluate(
    contents: Annotated[
        Path, typer.Argument(metavar="CONTENTS", help="Folder of pictures; clips are judged for flicker too.")
    ],
    styles: Annotated[Path, typer.Argument(metavar="STYLES", help="Folder of style pictures.")],
    sheet: Annotated[Path, _option("--output", "-o", metavar="FILE", help="The sheet.")] = Path("eval.png"),
    table: Annotated[
        Path | None, _option("--table", metavar="OUT.json", help="Also write all numbers there.")
    ] = None,
    pairs: Annotated[int, _option("--pairs", help="Pairs, spread evenly over both folders.")] = 12,
    size: SizeOption = None,
    steps: Annotated[
        list[int] | None, _option("--steps", help="Denoising steps; with --teacher repeatable.")
    ] = None,
    video: Annotated[
        list[Path] | None, _option("--video", metavar="FILE", help="A clip to judge for flicker; repeatable.")
    ] = None,
    frames: Annotated[int, _option("--frames", min=2, help="Frames to judge of a clip.")] = 48,
    precision: Annotated[str, _option("--precision", help="auto, fp32 or bf16.")] = "auto",
    overwrite: OverwriteOption = False,
    bundle: BundleOption = None,
    backend: BackendOption = "auto",
    teacher: Annotated[Path | None, _students("--teacher", metavar="FOLDER", help="The base.")] = None,
    lora: Annotated[
        list[Path] | None, _students("--lora", metavar="FILE", help="A student; repeatable, seeds group.")
    ] = None,
    guidance: Annotated[
        list[float] | None, _students("--guidance", help="Scale; repeatable. 1: half the cost.")
    ] = None,
    schedule: Annotated[
        str, _students("--schedule", help="aligned (from tau) or diffusers (its img2img cut).")
    ] = "aligned",
    reference_steps: Annotated[int, _students("--reference-steps", help="Of a full schedule.")] = 50,
    reference_guidance: Annotated[
        float | None,
        _students("--reference-guidance", help="Default: the middle of the LoRA's trained range, or 2."),
    ] = None,
    eta: Annotated[float, _students("--eta", help="Start of a teacher without LoRA.")] = 0.75,
    prompt: Annotated[str, _students("--prompt", help="Where there are text encoders.")] = "",
    mask: Annotated[
        Path | None, _students("--mask", metavar="FILE", help="Stylize where it is white only.")
    ] = None,
    seed: Annotated[int, _students("--seed", min=0, help="Of the noise.")] = 0,
    batch: Annotated[int, _students("--batch", min=1, help="Pictures at a time.")] = 4,
    device: Annotated[str, _students("--device", help="auto, cpu, cuda or cuda:1.")] = "auto",
    clip: Annotated[Path | None, _weights("--clip", metavar="FOLDER", help="A CLIPModel.")] = None,
    dino: Annotated[Path | None, _weights("--dino", metavar="FOLDER", help="A Dinov2Model.")] = None,
    csd: Annotated[Path | None, _weights("--csd", metavar="FILE", help="The CSD checkpoint.")] = None,
    aesthetic: Annotated[
        Path | None, _weights("--aesthetic", metavar="FILE", help="LAION's predictor; needs --clip.")
    ] = None,
) -> None:
    """Judge a bundle, or LoRAs beside their teacher: a sheet, a table, and JSON as the last line.

    std-rt evaluate photos paintings --bundle engines/mine

    std-rt evaluate photos paintings --teacher FOLDER --lora runs/std-0/lora.safetensors --steps 2 --steps 4

    --teacher and scores with weights need: pip install '.\\[train]'
    """
    request = _Request(**locals())
    from std_rt.core.files import check_output, write_text, writing

    (_check_bundle if teacher is None else _check_students)(request)
    for path in (sheet, table):
        if path is not None:
            check_output(path, overwrite=overwrite)
    found, details = (_judge_bundle if teacher is None else _judge_students)(request)
    if table is not None:
        with writing(table):
            write_text(table, json.dumps(found | details, indent=2) + "\n")
    typer.echo(json.dumps(found))


def _judge_with(request: _Request, device: str = "cpu") -> Judge:
    """The weight-free measures, and after them the scores whose weights are given (these need torch)."""
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


def _clips(request: _Request, pairs: list[Pair], side_px: int) -> dict[str, list[Pair]]:
    """Frames of each clip as squares, all with one style: that of the pair in its turn."""
    from std_rt.evaluation.picture_quality import clip_frames, clips_among
    from std_rt.pipeline.conditioning import square

    return {
        str(path): [
            (square(frame, side_px), pairs[i % len(pairs)][1]) for frame in clip_frames(path, request.frames)
        ]
        for i, path in enumerate(clips_among(request.contents, request.video or ()))
    }


def _check_bundle(request: _Request) -> None:
    """Raise UsageError for what only goes with --teacher."""
    given = {
        "--lora": request.lora,
        "--mask": request.mask,
        "--guidance": request.guidance,
        "--schedule": request.schedule != "aligned",
        "--reference-guidance": request.reference_guidance,
        "--prompt": request.prompt,
    }
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} needs --teacher FOLDER")
    if len(request.steps or ()) > 1:
        asked = " ".join(f"--steps {count}" for count in request.steps or ())
        raise UsageError(f"a bundle is judged at one step count, got {asked}")


def _judge_bundle(request: _Request) -> tuple[Found, Found]:
    """Mean scores by method and the warping errors of clips, printed and for JSON; and nothing more."""
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
        scores = judge_pictures(stylizer, pairs, request.sheet, judge)
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
            _print_table([title, *names], ([name, *row] for name, row in zip(rows, cells, strict=True)))
    typer.echo(f"sheet (content | style | std-rt | baselines): {request.sheet}")
    return {"scores": scores, "warping": warping, "pairs": len(pairs), "size_px": side, **described}, {}


def _print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column is a name, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = _WIDE  # a file or a pipe has no edge to wrap at
    console.print(table)


def _check_students(request: _Request) -> None:
    """Raise UsageError for what no teacher can do, or what is not installed."""
    from std_rt.core.machine import require
    from std_rt.core.schedule import GRID_POINTS

    if request.bundle is not None:
        raise UsageError("--bundle and --teacher are two ways to judge; give one of them")
    if isinstance(parse_size(request.size), tuple):
        raise UsageError(
            f"--size {request.size}: with --teacher pictures are square; give one side, such as 256"
        )
    if request.schedule not in ("aligned", "diffusers"):
        raise UsageError(f"--schedule must be one of aligned and diffusers, got {request.schedule!r}")
    if request.precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision must be auto, fp32 or bf16 with --teacher, got {request.precision!r}")
    for count in request.steps or ():
        if not 1 <= count <= GRID_POINTS:
            raise UsageError(f"--steps must be in 1..{GRID_POINTS}, got {count}")
    for scale in (*(request.guidance or ()), request.reference_guidance):
        if scale is not None and not 0 < scale < 100:
            raise UsageError(f"guidance must be a scale above 0 (1: none), got {scale:g}")
    if request.mask is not None and request.video:
        raise UsageError("--mask is for pictures, --video for clips; give one of them")
    require("std-rt evaluate --teacher", "train", "torch", "diffusers", "peft", "safetensors")


def _judge_students(request: _Request) -> tuple[Found, Found]:
    """Every candidate at every setting: printed, grouped by seeds for JSON, and all rows for the table."""
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
    _write_sheet(request.sheet, pairs, rows)
    groups = aggregate(rows)
    _print_groups(groups)
    for name, value in floor.items():
        typer.echo(f"warping error of {name} itself: {value:.4f}")
    typer.echo(f"sheet: {request.sheet}")
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
    request: _Request, pairs: list[Pair], side_px: int
) -> tuple[Comparison, list[Candidate], dict[str, float]]:
    """Everything loaded and encoded; and the warping errors of the clips themselves."""
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
    """One row a pair: content, style, the teacher's reference, and the first seed of each label."""
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
    """A table; ``scale`` is the guidance, ``evals`` counts UNet evaluations a picture."""
    names = [name for name in _COLUMNS if name in groups[0]["mean"]]
    headings = ["run", "steps", "scale", "evals", "seeds", *(_COLUMNS[name] for name in names)]
    rows = []
    for group in groups:
        counts = (group["steps"], f"{group['guidance']:g}", group["evaluations"], len(group["seeds"]))
        rows.append([group["label"], *map(str, counts), *(_cell(group, name) for name in names)])
    _print_table(headings, rows)


def _cell(group: Found, name: str) -> str:
    digits = 2 if name in ("psnr_db", "aesthetic") else 3
    mean = f"{group['mean'][name]:.{digits}f}"
    return mean if group["spread"] is None else f"{mean} ± {group['spread'][name]:.{digits}f}"
