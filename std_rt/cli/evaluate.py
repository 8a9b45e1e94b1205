"""`std-rt evaluate`: compares bundles with baselines and other programs, or LoRAs with their teacher.

Without ``--teacher`` it judges bundles and needs no torch, except for scores with weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from std_rt.cli.options import (
    BackendOption,
    DeviceOption,
    OverwriteOption,
    PrecisionOption,
    SizeOption,
    parse_size,
    use_device,
)
from std_rt.cli.terminal import counting, print_table, progress_lines
from std_rt.core.errors import UsageError

if TYPE_CHECKING:
    from std_rt.evaluation.bundle_comparison import Contender, Material, PeerOutputs, Results
    from std_rt.evaluation.candidates import Candidate
    from std_rt.evaluation.measures import Frame, Mask
    from std_rt.evaluation.outputs import Peer
    from std_rt.evaluation.picture_quality import Clip, Describe, Judge, Pair
    from std_rt.evaluation.students import Comparison, Row, Setting
    from std_rt.evaluation.summary import Summary

__all__ = ["EvaluateRequest", "evaluate"]

Found = dict[str, Any]  # for JSON

_WEIGHTS = ("clip", "dino", "csd", "aesthetic", "vgg", "artfid")

_students = partial(Option, rich_help_panel="Comparing students with their teacher")
_weights = partial(Option, rich_help_panel="Scores that need model weights")
_others = partial(Option, rich_help_panel="Other programs, and judging by eye")


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """What ``std-rt evaluate`` was asked to do. Raises UsageError for flags that do not fit together."""

    contents: Annotated[
        Path, Argument(metavar="CONTENTS", help="Folder of pictures; clips are judged for flicker too.")
    ]
    styles: Annotated[Path, Argument(metavar="STYLES", help="Folder of style pictures.")]
    output: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER",
            help="Contact sheet to write (eval.png); with --protocol the folder for everything (protocol).",
        ),
    ] = None
    protocol: Annotated[
        str | None,
        Option(
            metavar="std",
            help="All measures with intervals over up to 800 pairs, plots, blind sheet and voting page, in "
            "the folder -o; run again, it goes on where it was. Subfolders are searched, too.",
        ),
    ] = None
    table: Annotated[Path | None, Option(metavar="OUT.json", help="Also write all numbers there.")] = None
    pairs: Annotated[
        int | None,
        Option(
            help="Pairs, spread evenly over both folders; always the same ones. Default: 12; with --protocol "
            "all, but at most 800."
        ),
    ] = None
    size: SizeOption = None
    steps: Annotated[list[int] | None, Option(help="Denoising steps; repeatable.")] = None
    evaluations: Annotated[
        list[int] | None,
        Option(
            help="Instead of --steps, UNet evaluations per picture: bundles with and without guidance at "
            "equal cost; repeatable."
        ),
    ] = None
    video: Annotated[
        list[Path] | None, Option(metavar="FILE", help="A clip to judge for flicker; repeatable.")
    ] = None
    frames: Annotated[int, Option(min=2, help="Frames to judge per clip.")] = 48
    slices: Annotated[
        Path | None,
        Option(
            metavar="SLICES.png",
            help="Also a sheet of the clips' middle rows, frame below frame, side by side: flicker is seen "
            "as stripes across.",
        ),
    ] = None
    precision: PrecisionOption = "auto"
    overwrite: OverwriteOption = False
    bundle: Annotated[
        list[str] | None,
        Option("--bundle", "-b", metavar="[LABEL=]NAME|FOLDER", help="A model to judge; repeatable."),
    ] = None
    backend: BackendOption = "auto"
    peer: Annotated[
        list[str] | None,
        _others(metavar="NAME=FOLDER", help="Another program's outputs, CONTENT--STYLE.png; repeatable."),
    ] = None
    save_outputs: Annotated[
        Path | None,
        _others(metavar="FOLDER", help="Write the pairs and the bundles' outputs, as --peer reads them."),
    ] = None
    blind: Annotated[
        Path | None,
        _others(
            metavar="SHEET.png",
            help="Also a sheet without names, shuffled row by row by --seed, and its key.",
        ),
    ] = None
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
    seed: Annotated[int, Option(min=0, help="Seed of the students' noise, and of --blind's order.")] = 0
    batch: Annotated[int, _students(min=1, help="Pictures at a time.")] = 4
    device: DeviceOption = None  # with --teacher also cpu, for torch
    clip: Annotated[Path | None, _weights(metavar="FOLDER", help="A CLIPModel.")] = None
    dino: Annotated[Path | None, _weights(metavar="FOLDER", help="A Dinov2Model.")] = None
    csd: Annotated[Path | None, _weights(metavar="FILE", help="The CSD checkpoint.")] = None
    aesthetic: Annotated[Path | None, _weights(metavar="FILE", help="LAION's predictor; needs --clip.")] = (
        None
    )
    vgg: Annotated[Path | None, _weights(metavar="FILE", help="VGG-19: style and content distance.")] = None
    artfid: Annotated[
        Path | None,
        _weights(
            metavar="FOLDER",
            help="LPIPS, and with --protocol ArtFID: art_inception.pth, alexnet-owt-7be5be79.pth, alex.pth.",
        ),
    ] = None

    @property
    def sheet(self) -> Path:
        """The contact sheet, without --protocol."""
        return self.output or Path("eval.png")

    @property
    def pair_count(self) -> int:
        """Pairs, without --protocol."""
        return 12 if self.pairs is None else self.pairs

    def __post_init__(self) -> None:
        if self.evaluations and self.steps:
            raise UsageError("--evaluations and --steps are mutually exclusive; give one of the two")
        if self.teacher is None:  # torch takes the name itself
            use_device(self.device)
        if self.protocol is not None:
            self._check_protocol_flags()
        if self.teacher is None:
            self._check_bundle_flags()
        else:
            self._check_student_flags()

    def _check_protocol_flags(self) -> None:
        if self.protocol != "std":
            raise UsageError(f"--protocol must be std, got {self.protocol!r}")
        _refuse({"--teacher": self.teacher}, "compares networks in torch; with --protocol give --bundle")
        within = {"--save-outputs": self.save_outputs, "--blind": self.blind, "--table": self.table}
        within["--slices"] = self.slices
        _refuse(within, "is part of --protocol; -o FOLDER says where")

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
        _refuse(given, "needs --teacher FOLDER")

    def _check_student_flags(self) -> None:
        from std_rt.core.schedule import GRID_POINTS

        others: dict[str, object] = {"--bundle": self.bundle, "--evaluations": self.evaluations}
        others |= {"--peer": self.peer, "--save-outputs": self.save_outputs, "--blind": self.blind}
        others["--slices"] = self.slices
        _refuse(others, "and --teacher are mutually exclusive; give one of the two")
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


def _refuse(flags: Mapping[str, object], reason: str) -> None:
    """Raise UsageError for the first flag that was given."""
    for name, value in flags.items():
        if value:
            raise UsageError(f"{name} {reason}")


def evaluate(request: EvaluateRequest) -> None:
    """Judge bundles, or LoRAs against their teacher: a sheet, a table, and JSON as the last line.

    std-rt evaluate photos paintings --bundle engines/mine --steps 2 --steps 4 --peer MicroAST=pairs/microast

    std-rt evaluate coco wikiart --protocol std --bundle engines/a --bundle engines/b --evaluations 8

    std-rt evaluate photos paintings --teacher FOLDER --lora runs/std-0/lora.safetensors --steps 2 --steps 4

    --teacher and scores with weights need the extra \\[train]: std-rt doctor says how to install it.
    """
    from std_rt.core.files import check_output, write_text, writing

    if request.protocol is not None:
        typer.echo(json.dumps(_run_protocol(request, request.output or Path("protocol"))))
        return
    for path in (request.sheet, request.table, request.slices):
        if path is not None:
            check_output(path, overwrite=request.overwrite)
    found, details = _judge_bundles(request) if request.teacher is None else _judge_students(request)
    if request.table is not None:
        with writing(request.table):
            write_text(request.table, json.dumps(found | details, indent=2) + "\n")
    typer.echo(json.dumps(found))


def _describe_with(request: EvaluateRequest, side_px: int) -> Mapping[str, Describe]:
    """What measures of a whole set need of each picture; `_judge_with` has checked that torch is there."""
    given = {name: getattr(request, name) for name in ("csd", "artfid") if getattr(request, name)}
    if not given:
        return {}
    from std_rt.evaluation.scorers import load_features

    return load_features(**given, side_px=side_px)


def _judge_with(request: EvaluateRequest, device: str = "cpu") -> Judge:
    """The weight-free measures, then the scores whose weights are given (these need torch)."""
    from std_rt.core.machine import require
    from std_rt.evaluation.picture_quality import weight_free

    files = {name: getattr(request, name) for name in _WEIGHTS}
    given = " ".join(f"--{name}" for name, path in files.items() if path)
    if not given:
        return weight_free
    require(f"std-rt evaluate with {given}", "train", "torch", "transformers", "safetensors")
    from std_rt.evaluation.scorers import load_scorers

    scorers = load_scorers(**files, device=device)

    def judge(frame: Frame, content: Frame, style: Frame, mask: Mask | None) -> dict[str, float]:
        found = weight_free(frame, content, style, mask)
        for scorer in scorers:
            found |= scorer(frame, content, style)
        return found

    return judge


@dataclass(frozen=True, eq=False)
class _Run:
    """Bundles and peers on their pairs; ``place`` is a folder that keeps the outputs, named by ``flag``."""

    request: EvaluateRequest
    bundles: list[Contender]
    peers: list[Peer]
    files: list[tuple[Path, Path]]
    clips: list[Path]
    place: Path | None
    flag: str = "--save-outputs"

    @property
    def size(self) -> int | tuple[int, int]:
        """As bundles are to work."""
        return parse_size(self.request.size) or self.bundles[0].bundle.size_default

    @property
    def side_px(self) -> int:
        """Of the squares that are judged."""
        return max(self.size) if isinstance(self.size, tuple) else self.size

    @property
    def labels(self) -> list[str]:
        """Of all candidates but the baselines."""
        return [*(one.label for one in self.bundles), *(peer.label for peer in self.peers)]

    def plan(self) -> Found:
        """What must not change for the saved outputs to be used again."""
        how = {
            "size": self.request.size,
            "precision": self.request.precision,
            "backend": self.request.backend,
        }
        pairs = [[f"{path.name} {path.stat().st_size}" for path in pair] for pair in self.files]
        clips = [f"{path.name} {path.stat().st_size}" for path in self.clips]
        return {
            "side_px": self.side_px,
            "frames": self.request.frames,
            "pairs": pairs,
            "clips": clips,
            "bundles": {one.label: one.as_dict() | how for one in self.bundles},
        }


def _pairs_of(request: EvaluateRequest) -> list[tuple[Path, Path]]:
    """The files of the pairs to judge; a note where there are fewer than asked for."""
    from std_rt.evaluation.picture_quality import pair_files

    files = pair_files(request.contents, request.styles, request.pair_count)
    if request.pairs is not None and len(files) < request.pairs:
        only = f"note: only {len(files)} distinct pairs exist; --pairs {request.pairs} was reduced to that"
        typer.echo(only, err=True)
    return files


def _judge_bundles(request: EvaluateRequest) -> tuple[Found, Found]:
    """Mean scores by candidate and figures of clips, printed and for JSON; all pairs for the table."""
    from rich.console import Console

    from std_rt.evaluation.blind import key_path, write_blind
    from std_rt.evaluation.measures import means
    from std_rt.evaluation.picture_quality import clips_among

    files = _pairs_of(request)
    clips = clips_among([request.contents], request.video or ())
    run = _Run(request, *_candidates(request), files, clips, request.save_outputs)
    _check_plan(run)
    with counting(Console(stderr=True), "reading pictures") as told:
        results = _paint(run, _judge_with(request), told)
        if request.blind is not None:
            write_blind(request.blind, results.material.pairs, results.pictures, request.seed)
        results.add_baselines()
        headings = results.write_sheet(request.sheet)
        lines = [] if request.slices is None else [_write_slices(results, request.slices)]
        by_pair, _ = results.scores(told)
    scores = {label: means(list(rows.values())) for label, rows in by_pair.items()}
    _print_scores(scores)
    _print_clips(results.steady)
    for line in (f"sheet ({' | '.join(headings)}): {request.sheet}", *lines):
        typer.echo(line)
    if request.blind is not None:
        typer.echo(f"blind sheet: {request.blind}; its key: {key_path(request.blind)}")
    return _found(run, results) | {"scores": scores}, {"by_pair": by_pair}


def _run_protocol(request: EvaluateRequest, folder: Path) -> Found:
    """Everything in ``folder``; what is printed last."""
    from rich.console import Console

    from std_rt.evaluation.picture_quality import clips_among
    from std_rt.evaluation.protocol import check_folder, protocol_files
    from std_rt.evaluation.summary import summarise

    check_folder(folder, overwrite=request.overwrite)
    files = protocol_files(request.contents, request.styles, request.pairs)
    clips = clips_among(list(dict.fromkeys(content for content, _ in files)), request.video or ())
    run = _Run(request, *_candidates(request), files, clips, folder / "outputs", "-o")
    _check_plan(run)
    with counting(Console(stderr=True), "reading pictures") as told:
        judge, describe = _judge_with(request), _describe_with(request, run.side_px)
        results = _paint(run, judge, told)
        told("sheets and voting page", 0, 1)
        lines = _write_pictures(run, results, folder)
        by_pair, features = results.scores(told, describe)
        told("intervals", 0, 1)
        summary = summarise(by_pair, features, results.steady)
    lines = [*_write_summary(summary, results, folder), *lines]
    found = _found(run, results) | {"protocol": request.protocol, **summary.as_dict()}
    _write(folder / "results.json", json.dumps(found | {"by_pair": by_pair}, indent=1) + "\n")
    for line in [*lines, f"all numbers: {folder / 'results.json'}"]:
        typer.echo(line)
    return {name: found[name] for name in found if name != "differences"}


def _write_pictures(run: _Run, results: Results, folder: Path) -> list[str]:
    """Sheet, blind sheet and voting page; lines that say where, and what was left as it was."""
    from std_rt.evaluation.blind import write_blind
    from std_rt.evaluation.outputs import Lazy
    from std_rt.evaluation.protocol import rows_shown
    from std_rt.evaluation.voting import KEY, PAGE, write_page

    pairs, seed, runners = results.material.pairs, run.request.seed, dict(results.pictures)
    results.add_baselines()
    chosen = rows_shown(len(pairs), len(results.pictures) + 2, run.side_px)
    headings = results.write_sheet(folder / "sheet.png", chosen)
    lines = [f"sheet ({' | '.join(headings)}): {folder / 'sheet.png'}"]
    if run.clips:
        lines.append(_write_slices(results, folder / "slices.png"))
    if len(runners) < 2:
        return [
            *lines,
            "no blind sheet or voting page of one candidate; add --peer, --bundle or more --steps",
        ]

    def some(frames: Sequence[Frame]) -> Sequence[Frame]:
        return Lazy(len(chosen), lambda i: frames[chosen[i]])

    shown = {label: some(frames) for label, frames in runners.items()}
    write_blind(folder / "blind.png", [pairs[i] for i in chosen], shown, seed)
    lines.append(f"blind sheet: {folder / 'blind.png'}")
    if not write_page(folder, pairs, runners, seed):
        why = "is of other candidates and was kept; for a new one remove it, or give another folder with -o"
        return [*lines, f"note: {folder / KEY} {why}"]
    return [*lines, f"voting page: {folder / PAGE} (count votes: std-rt tally {folder / KEY} VOTES.csv ...)"]


def _write_slices(results: Results, path: Path) -> str:
    """A line that says what is on the sheet."""
    headings, clips = results.write_slices(path), ", ".join(Path(clip).stem for clip in results.slices)
    return f"slices over time, downwards, of {clips} ({' | '.join(headings)}): {path}"


def _write_summary(summary: Summary, results: Results, folder: Path) -> list[str]:
    """The table, printed and as a file, and the plots; lines that say what is not there."""
    from std_rt.evaluation.plots import plots
    from std_rt.evaluation.protocol import cells, markdown
    from std_rt.evaluation.statistics import LEVEL, RESAMPLES

    headings, rows = cells(summary, results.evaluations)
    print_table(rows, headings, numeric=True)
    missing = [f"{', '.join(titles)} ({option})" for option, titles in summary.missing().items()]
    count = len(results.material.names)
    notes = [
        f"±: half the {LEVEL:.0%} interval, bootstrap ({RESAMPLES:,} resamples) over {count} pairs; "
        "*: the best, or not significantly different from it.",
        *([f"Not measured: {'; '.join(missing)}."] if missing else []),
    ]
    _write(folder / "table.md", markdown(headings, rows, notes))
    _write(folder / "plots.svg", plots(summary, results.evaluations))
    return [*notes, f"table: {folder / 'table.md'}", f"plots: {folder / 'plots.svg'}"]


def _write(path: Path, text: str) -> None:
    from std_rt.core.files import write_text, writing

    with writing(path):
        write_text(path, text)


def _found(run: _Run, results: Results) -> Found:
    """What both kinds of comparison say of themselves in JSON."""
    return {
        "warping": results.clip_figures("warping"),
        "sharpness": results.clip_figures("sharpness"),
        "clips": results.steady,
        "bundles": {one.label: one.as_dict() for one in run.bundles},
        "evaluations": results.evaluations,
        "pairs": len(run.files),
        "size_px": run.side_px,
    }


def _candidates(request: EvaluateRequest) -> tuple[list[Contender], list[Peer]]:
    from std_rt.evaluation.bundle_comparison import contenders
    from std_rt.evaluation.outputs import Peer

    bundles = contenders(request.bundle or [None], request.steps or [], request.evaluations or [])
    return bundles, [Peer.parse(text) for text in request.peer or ()]


def _check_plan(run: _Run) -> None:
    """Refuse, before any work, names that clash and outputs that cannot be written."""
    from std_rt.core.files import check_output
    from std_rt.evaluation.blind import check_count, key_path
    from std_rt.evaluation.outputs import check_labels

    check_labels(run.labels)
    if run.request.slices is not None and not run.clips:
        raise UsageError("--slices is for clips, and there are none among CONTENTS; add --video FILE")
    blind, overwrite = run.request.blind, run.request.overwrite
    if blind is not None or (run.request.protocol and len(run.labels) > 1):
        check_count(len(run.labels))
    if blind is not None:
        for path in (blind, key_path(blind)):
            check_output(path, overwrite=overwrite, flag="--blind")


def _paint(run: _Run, judge: Judge, told: Callable[[str, int, int], None]) -> Results:
    """All candidates' outputs: every bundle in turn, opened with its number of steps, then the peers."""
    from std_rt.evaluation.bundle_comparison import Material, Results
    from std_rt.evaluation.outputs import Store, open_store
    from std_rt.pipeline.stylizer import Stylizer

    request = run.request
    store = Store()
    if run.place is not None:
        store = open_store(run.place, run.plan(), overwrite=request.overwrite, flag=run.flag)
    results = Results(Material.read(run.files, run.side_px, run.clips, request.frames, store), judge)
    ready = _read_peers(run.peers, results.material)
    results.material.prepare(told)
    how: dict[str, Any] = {"backend": request.backend, "size": run.size, "precision": request.precision}
    for one in run.bundles:
        results.add_bundle(one, partial(Stylizer.load, one.bundle, steps=one.steps, **how), told)
    for outputs in ready:
        results.add_peer(outputs)
    return results


def _read_peers(peers: list[Peer], material: Material) -> list[PeerOutputs]:
    from rich.console import Console

    from std_rt.cli.terminal import note
    from std_rt.evaluation.bundle_comparison import PeerOutputs

    found = [PeerOutputs.read(peer, material) for peer in peers]
    for line in [line for outputs in found for line in outputs.notes]:
        note(Console(stderr=True), line)
    return found


def _print_scores(scores: dict[str, dict[str, float]]) -> None:
    from std_rt.evaluation.summary import MEASURES

    names = [name for name in MEASURES if name in next(iter(scores.values()))]
    rows = [[label, *(f"{row[name]:.3f}" for name in names)] for label, row in scores.items()]
    print_table(rows, ["mean score", *(MEASURES[name].title for name in names)], numeric=True)


def _print_clips(steady: dict[str, dict[str, dict[str, float]]]) -> None:
    """A table per clip: warping error and sharpness, which belong together, then the other measures."""
    from std_rt.evaluation.summary import MEASURES

    for clip, rows in steady.items():
        if rows:
            others = [
                name for name in MEASURES if name in rows["source"] and name not in ("warping", "sharpness")
            ]
            table = [
                [label, f"{row['warping']:.4f}", *(f"{row[name]:.3f}" for name in ("sharpness", *others))]
                for label, row in rows.items()
            ]
            headings = ("sharpness", *(MEASURES[name].title for name in others))
            print_table(table, [f"clip {Path(clip).stem}", "warping error", *headings], numeric=True)


def _judge_students(request: EvaluateRequest) -> tuple[Found, Found]:
    """Every candidate at every setting: printed, grouped by seeds for JSON, and all rows for the table."""
    from std_rt.core.machine import require

    require("std-rt evaluate --teacher", "train", "torch", "diffusers", "peft", "safetensors")
    from std_rt.evaluation.picture_quality import check_side, clips_among, draw_pair, read_clips
    from std_rt.evaluation.students import Setting, aggregate

    side = parse_size(request.size) or 256
    assert isinstance(side, int)
    check_side(side)
    files = _pairs_of(request)
    pairs = [draw_pair(*pair, side) for pair in files]
    settings = [
        Setting(steps, guidance, request.schedule)
        for steps in request.steps or [4]
        for guidance in request.guidance or [1.0]
    ]
    clips = []
    if request.mask is None:
        clips = read_clips(clips_among([request.contents], request.video or ()), files, pairs, request.frames)
    comparison, candidates = _prepare(request, pairs, clips)
    floor = {str(clip.path): clip.meter.floor for clip in clips if clip.meter.floor is not None}
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
    request: EvaluateRequest, pairs: list[Pair], clips: list[Clip]
) -> tuple[Comparison, list[Candidate]]:
    """Everything loaded and encoded."""
    from std_rt.evaluation.candidates import read_candidate, teachers
    from std_rt.evaluation.picture_quality import read_mask
    from std_rt.evaluation.students import Comparison
    from std_rt.training.distil.base import load_base
    from std_rt.training.distil.sampling import encode_scene
    from std_rt.training.run.precision import choose_device

    assert request.teacher is not None
    device = choose_device(request.device or "auto", "--device cpu")
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
    mask = None if request.mask is None else read_mask(request.mask, len(pairs[0][0]))

    def steadiness(clip: Clip, outputs: Sequence[Frame]) -> dict[str, float]:
        found = clip.meter.judge(outputs)
        return {"warping": found["warping"], "clip_sharpness": found["sharpness"]} if found else {}

    scenes = [encode([(frame, clip.style) for frame in clip.frames], one_noise=True) for clip in clips]
    comparison = Comparison(
        base,
        encode(pairs, mask=mask),
        judge,
        [(scene, partial(steadiness, clip)) for scene, clip in zip(scenes, clips, strict=True)],
        request.reference_steps,
        request.reference_guidance,
        request.batch,
        request.precision == "bf16",
    )
    return comparison, [*teachers(loras, request.eta), *loras]


def _run(comparison: Comparison, candidates: list[Candidate], settings: list[Setting]) -> list[Row]:
    """All rows; frames are kept for the references and the first setting, which the sheet shows."""
    from rich.console import Console
    from rich.progress import Progress

    from std_rt.evaluation.students import compare

    shown = (settings[0].steps, settings[0].guidance)
    rows, console = [], Console(stderr=True)
    lines = progress_lines(console)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("comparing", total=len(candidates) * len(settings) + 1)
        for row in compare(comparison, candidates, settings):
            keep = row.label == "reference" or (row.steps, row.guidance) == shown
            rows.append(row if keep else replace(row, frames=[]))
            progress.update(task, advance=1, description=f"{row.label}, {row.steps} steps")
            lines("settings", len(rows), len(candidates) * len(settings) + 1)
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
    from std_rt.evaluation.summary import MEASURES

    names = [name for name in MEASURES if name in groups[0]["mean"]]
    headings = ["run", "steps", "scale", "evals", "seeds", *(MEASURES[name].title for name in names)]
    rows = []
    for group in groups:
        counts = (group["steps"], f"{group['guidance']:g}", group["evaluations"], len(group["seeds"]))
        rows.append([group["label"], *map(str, counts), *(_cell(group, name) for name in names)])
    print_table(rows, headings, numeric=True)


def _cell(group: Found, name: str) -> str:
    digits = 2 if name in ("psnr_db", "aesthetic") else 3
    mean = f"{group['mean'][name]:.{digits}f}"
    return mean if group["spread"] is None else f"{mean} ± {group['spread'][name]:.{digits}f}"
