"""`std-rt evaluate`: the command as parsed, and which of its two halves runs it.

Without ``--teacher`` it judges a bundle and needs no torch; with it, LoRAs beside their teacher.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from std_rt.cli.options import BackendOption, BundleOption, OverwriteOption, SizeOption, parse_size
from std_rt.core.errors import UsageError

if TYPE_CHECKING:
    from std_rt.evaluation.bundles import Judge
    from std_rt.evaluation.measures import Frame, Mask

__all__ = ["Common", "ScorerFiles", "evaluate", "judge_with", "write_table"]

_STUDENTS = "Students beside their teacher"
_WEIGHTS = "Scores that need weights"


@dataclass(frozen=True)
class ScorerFiles:
    """Where the weights of optional scores are, if anywhere."""

    clip: Path | None = None
    dino: Path | None = None
    csd: Path | None = None
    aesthetic: Path | None = None

    @property
    def any(self) -> bool:
        return any((self.clip, self.dino, self.csd, self.aesthetic))


@dataclass(frozen=True)
class Common:
    """What both halves are asked."""

    contents: Path
    styles: Path
    sheet: Path
    table: Path | None
    pairs: int
    videos: tuple[Path, ...]
    frames: int
    precision: str
    overwrite: bool
    scorers: ScorerFiles


def evaluate(
    contents: Annotated[
        Path, typer.Argument(metavar="CONTENTS", help="Folder of pictures; clips are judged for flicker too.")
    ],
    styles: Annotated[Path, typer.Argument(metavar="STYLES", help="Folder of style pictures.")],
    sheet: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The sheet.")] = Path(
        "eval.png"
    ),
    table: Annotated[
        Path | None, typer.Option("--table", metavar="OUT.json", help="Also write all numbers there.")
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", help="Pairs, spread evenly over both folders.")] = 12,
    size: SizeOption = None,
    steps: Annotated[
        list[int] | None, typer.Option("--steps", help="Denoising steps; with --teacher repeatable.")
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option("--video", metavar="FILE", help="A clip to judge for flicker; repeatable."),
    ] = None,
    frames: Annotated[int, typer.Option("--frames", min=2, help="Frames to judge of a clip.")] = 48,
    precision: Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16.")] = "auto",
    overwrite: OverwriteOption = False,
    bundle: BundleOption = None,
    backend: BackendOption = "auto",
    teacher: Annotated[
        Path | None,
        typer.Option("--teacher", metavar="FOLDER", help="The base.", rich_help_panel=_STUDENTS),
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option(
            "--lora", metavar="FILE", help="A student; repeatable, seeds group.", rich_help_panel=_STUDENTS
        ),
    ] = None,
    guidance: Annotated[
        list[float] | None,
        typer.Option("--guidance", help="Scale; repeatable. 1: half the cost.", rich_help_panel=_STUDENTS),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            help="aligned (from tau) or diffusers (its img2img cut).",
            rich_help_panel=_STUDENTS,
        ),
    ] = "aligned",
    reference_steps: Annotated[
        int, typer.Option("--reference-steps", help="Of a full schedule.", rich_help_panel=_STUDENTS)
    ] = 50,
    reference_guidance: Annotated[
        float | None,
        typer.Option(
            "--reference-guidance",
            help="Default: the middle of what the LoRA was trained for, or 2.",
            rich_help_panel=_STUDENTS,
        ),
    ] = None,
    eta: Annotated[
        float, typer.Option("--eta", help="Start of a teacher without LoRA.", rich_help_panel=_STUDENTS)
    ] = 0.75,
    prompt: Annotated[
        str, typer.Option("--prompt", help="Where there are text encoders.", rich_help_panel=_STUDENTS)
    ] = "",
    mask: Annotated[
        Path | None,
        typer.Option(
            "--mask", metavar="FILE", help="Stylize where it is white only.", rich_help_panel=_STUDENTS
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise.", rich_help_panel=_STUDENTS)] = 0,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Pictures at a time.", rich_help_panel=_STUDENTS)
    ] = 4,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda or cuda:1.", rich_help_panel=_STUDENTS)
    ] = "auto",
    clip: Annotated[
        Path | None,
        typer.Option("--clip", metavar="FOLDER", help="A CLIPModel.", rich_help_panel=_WEIGHTS),
    ] = None,
    dino: Annotated[
        Path | None,
        typer.Option("--dino", metavar="FOLDER", help="A Dinov2Model.", rich_help_panel=_WEIGHTS),
    ] = None,
    csd: Annotated[
        Path | None,
        typer.Option("--csd", metavar="FILE", help="The CSD checkpoint.", rich_help_panel=_WEIGHTS),
    ] = None,
    aesthetic: Annotated[
        Path | None,
        typer.Option(
            "--aesthetic", metavar="FILE", help="LAION's predictor; needs --clip.", rich_help_panel=_WEIGHTS
        ),
    ] = None,
) -> None:
    """Judge a bundle, or LoRAs beside their teacher: a sheet, a table, and JSON as the last line.

    std-rt evaluate photos paintings --bundle engines/mine

    std-rt evaluate photos paintings --teacher FOLDER --lora runs/std-0/lora.safetensors --steps 2 --steps 4

    --teacher and scores with weights need: pip install 'std-rt\\[train]'
    """
    common = Common(
        contents,
        styles,
        sheet,
        table,
        pairs,
        tuple(video or ()),
        frames,
        precision,
        overwrite,
        ScorerFiles(clip, dino, csd, aesthetic),
    )
    working = parse_size(size)
    if teacher is None:
        students = {
            "--lora": lora,
            "--mask": mask,
            "--guidance": guidance,
            "--schedule": schedule != "aligned",
            "--reference-guidance": reference_guidance,
            "--prompt": prompt,
        }
        _refuse(students, "--teacher FOLDER")
        from std_rt.cli.evaluate_bundle import run_bundle

        run_bundle(common, bundle, working, _only(steps), backend)
        return
    if bundle is not None:
        raise UsageError("--bundle and --teacher are two ways to judge; give one of them")
    if isinstance(working, tuple):
        raise UsageError(f"--size {size}: with --teacher pictures are square; give one side, such as 256")
    from std_rt.cli.evaluate_teacher import TeacherRequest, run_teacher

    run_teacher(
        TeacherRequest(
            common,
            teacher,
            tuple(lora or ()),
            tuple(steps or (4,)),
            tuple(guidance or (1.0,)),
            schedule,
            reference_steps,
            reference_guidance,
            eta,
            prompt,
            mask,
            seed,
            batch,
            device,
            256 if working is None else working,
        )
    )


def _refuse(options: Mapping[str, Any], needed: str) -> None:
    for name, value in options.items():
        if value:
            raise UsageError(f"{name} needs {needed}")


def _only(steps: Sequence[int] | None) -> int | None:
    if steps and len(steps) > 1:
        raise UsageError(
            f"a bundle is judged at one step count, got --steps {' --steps '.join(map(str, steps))}"
        )
    return steps[0] if steps else None


def judge_with(files: ScorerFiles, device: str = "cpu") -> Judge:
    """The weight-free measures, and after them the scores whose weights are given (these need torch)."""
    from std_rt.evaluation.bundles import weight_free

    if not files.any:
        return weight_free
    from std_rt.core.machine import require

    require("std-rt evaluate with --clip, --dino or --csd", "train", "torch", "transformers", "safetensors")
    from std_rt.evaluation.scorers import load_scorers

    scorers = load_scorers(
        clip=files.clip, dino=files.dino, csd=files.csd, aesthetic=files.aesthetic, device=device
    )

    def judge(frame: Frame, content: Frame, style: Frame, mask: Mask | None) -> dict[str, float]:
        found = weight_free(frame, content, style, mask)
        for scorer in scorers:
            found |= scorer(frame, content, style)
        return found

    return judge


def write_table(path: Path | None, found: Mapping[str, Any]) -> None:
    """Everything that was measured, as JSON for people to keep; nothing where ``path`` is None."""
    from std_rt.core.files import write_text, writing

    if path is not None:
        with writing(path):
            write_text(path, json.dumps(found, indent=2) + "\n")
