"""`std-rt stylize`: check everything, open, work through the jobs, say what was done."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from std_rt.core.errors import MediaError, StdRtError, UsageError
from std_rt.media import fit
from std_rt.media.image import Picture, read_picture, write_picture
from std_rt.media.sources import Job, plan_outputs
from std_rt.pipeline.style_file import encode_styles, open_styles
from std_rt.pipeline.stylizer import Stylizer

__all__ = ["Request", "run"]

INTERRUPTED = 130


@dataclass(frozen=True)
class Request:
    """The command as parsed; ``size`` is a side or (H, W) in pixels, ``styles`` are (path, weight)."""

    inputs: list[Path]
    styles: list[tuple[Path, float]]
    out: Path | None
    overwrite: bool
    strength: float
    seed: int
    bundle: str | None
    size: int | tuple[int, int] | None
    steps: int | None
    backend: str
    precision: str
    prompts: tuple[str | None, str | None] = (None, None)  # prompt, negative prompt
    guidance: tuple[float | None, str | None] = (None, None)  # scale, mode
    build_in_background: bool = False
    temporal: str = "off"


class RateColumn(ProgressColumn):
    """Finished items a second: fps of a clip."""

    def render(self, task: Task) -> Text:
        """``12.3 fps``, or nothing before the first item."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:5.1f} {task.fields['unit']}" if speed else "")


def run(request: Request) -> int:
    """Do it; returns the exit code: 0, 2 where an input failed, 130 where Ctrl-C ended a clip early.

    Everything that can be known before is checked before any work: inputs, outputs, styles, bundle,
    backend. An input that fails later is reported, the others are done.
    """
    jobs = plan_outputs(request.inputs, request.out, overwrite=request.overwrite)
    prompt, negative = request.prompts
    if negative is not None and prompt is None:
        raise UsageError("--negative-prompt goes with --prompt; give both")
    console = Console(stderr=True)

    def said(line: str) -> None:
        console.print(f"note: {line}", style="dim", markup=False, highlight=False)

    loaded = Stylizer.load(
        request.bundle,
        backend=request.backend,
        size=request.size,
        steps=request.steps,
        precision=request.precision,
        guidance=request.guidance[0],
        guidance_mode=request.guidance[1],
        meanwhile=said if request.build_in_background else None,
    )
    with loaded as stylizer:
        check_size(stylizer, request.size)
        styles = open_styles(request.styles, stylizer.bundle)
        if prompt is not None:
            stylizer.set_prompt(prompt, negative)
        work = Work(stylizer, request, console)
        with builds_shown(console, stylizer.backend):
            work.look_ahead(jobs)
            style = encode_styles(stylizer.encode_style, styles, stylizer.bundle)
            stylizer.use_style(style, request.strength)
            console.print(f"[dim]{describe(stylizer)}[/]", highlight=False)
            return work.all(jobs)


@contextmanager
def builds_shown(console: Console, backend: str) -> Iterator[None]:
    """Say, at every tenth, how far engines are that TensorRT builds: minutes, the first time."""
    if backend not in ("tensorrt", "rtx"):
        yield
        return
    from std_rt.engines.tensorrt.engine_builder import progress_to

    said: dict[str, int] = {}

    def show(graph: str, share: float) -> None:
        tenths = int(share * 10)
        if tenths > said.get(graph, -1):
            said[graph] = tenths
            console.print(f"building the engine of {graph}: {10 * tenths} %", style="dim", highlight=False)

    with progress_to(show):
        yield


def check_size(stylizer: Stylizer, size: int | tuple[int, int] | None) -> None:
    """Raise UsageError where ``size`` is outside what the bundle can do."""
    low, high = stylizer.bundle.size_range
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and not all(low <= side <= high for side in sides):
        asked = f"{sides[1]}x{sides[0]}"
        raise UsageError(
            f"bundle '{stylizer.bundle.name}' works at {low} to {high} px a side, not {asked}; change --size"
        )


def describe(stylizer: Stylizer) -> str:
    """One line: bundle, steps, backend and why."""
    bundle = stylizer.bundle
    return f"{bundle.name}, {stylizer.steps} steps, {stylizer.backend} ({stylizer.reason})"


class Work:
    """The jobs of one command on one stylizer."""

    def __init__(self, stylizer: Stylizer, request: Request, console: Console) -> None:
        self._stylizer, self._request, self._console = stylizer, request, console
        self._stopped = False
        self._read_ahead: dict[Path, Picture] = {}

    def look_ahead(self, jobs: list[Job]) -> None:
        """Begin to open, while the style is encoded, the engines that the first input will need."""
        job = jobs[0]
        try:
            if job.is_video:
                from std_rt.media.video.clip import probe

                info = probe(job.source)
                self._stylizer.prepare(info.height, info.width)
                return
            picture = self._read_ahead[job.source] = read_picture(job.source)
            self._stylizer.prepare(*picture.frame.shape[:2])
        except MediaError:
            if len(jobs) == 1:
                raise
            # Among many, it is read again and reported when its turn comes.

    def all(self, jobs: list[Job]) -> int:
        """Every job; an input that fails is reported and the next one begun."""
        failed: list[StdRtError] = []
        with self._progress() as bar:
            pictures = [job for job in jobs if not job.is_video]
            whole = bar.add_task("pictures", total=len(pictures), unit="/s", visible=len(pictures) > 1)
            for job in jobs:
                if self._stopped:
                    break
                try:
                    self._one(job, bar)
                except StdRtError as error:
                    if len(jobs) == 1:
                        raise
                    failed.append(error)
                    self._console.print(
                        f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
                    )
                bar.advance(whole, 0 if job.is_video else 1)
        if failed:
            done = len(jobs) - len(failed)
            self._console.print(
                f"{len(failed)} of {len(jobs)} inputs failed (above); {done} done", style="red"
            )
        return INTERRUPTED if self._stopped else 2 if failed else 0

    def _one(self, job: Job, bar: Progress) -> None:
        started = time.perf_counter()
        if job.is_video:
            self._clip(job, bar)
        else:
            height, width = self._picture(job)
            _say(f"{job.sink} ({width}x{height}, {time.perf_counter() - started:.2f} s)")

    def _picture(self, job: Job) -> tuple[int, int]:
        picture = self._read_ahead.pop(job.source, None) or read_picture(job.source)
        styled = self._stylizer.stylize(picture.frame, self._request.seed)
        write_picture(job.sink, styled, _alpha(picture, styled.shape[:2]))
        return styled.shape[0], styled.shape[1]

    def _clip(self, job: Job, bar: Progress) -> None:
        from std_rt.media.video.transcode import transcode_stream
        from std_rt.streaming.frame_stream import GROUPED, FrameStream
        from std_rt.streaming.temporal import TemporalFilter

        temporal = TemporalFilter(self._request.temporal)
        stream = FrameStream(self._stylizer, batching=GROUPED, temporal=temporal, seed=self._request.seed)
        task = bar.add_task(job.source.name, total=None, unit="fps")

        def shown(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=None if total is None else max(total, done))

        with _interruptible() as interrupted:
            report = transcode_stream(
                job.source,
                job.sink,
                stream.frames,
                overwrite=self._request.overwrite,
                progress=shown,
                should_stop=interrupted,
            )
        self._stopped = report.stopped
        for note in report.notes:
            self._console.print(
                f"note: {job.source.name}: {note}", style="dim", markup=False, highlight=False
            )
        if report.stopped and not report.frames:
            return
        fps = report.frames / report.seconds if report.seconds else 0.0
        early = ", stopped early, playable" if report.stopped else ""
        _say(
            f"{report.output} ({report.width}x{report.height}, {report.frames} frames, {fps:.1f} fps{early})"
        )

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(),
        )
        return Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )


def _alpha(picture: Picture, size: tuple[int, ...]) -> Any:
    """The picture's alpha at the size of the result."""
    if picture.alpha is None or picture.alpha.shape == size:
        return picture.alpha
    return np.ascontiguousarray(fit.resize(picture.alpha, (size[0], size[1])))


def _say(line: str) -> None:
    typer.echo(line)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks the clip to end well, a second one ends at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
