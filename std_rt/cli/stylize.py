"""`std-rt stylize`: pictures, clips and folders, in the style of a picture.

Exits with 2 if an input failed (the others are still processed), with 130 if Ctrl-C ended a clip early; the
partial clip is playable.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer import Argument, Option

from std_rt.cli.options import StylizerFlags, TemporalOption, parse_size, parse_style
from std_rt.cli.terminal import builds_shown, interruptible, note
from std_rt.core.errors import MediaError, StdRtError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from std_rt.media.image import Picture
    from std_rt.media.sources import Job
    from std_rt.pipeline.mask import Mask
    from std_rt.pipeline.stylizer import Stylizer

__all__ = ["StylizeRequest", "check_size", "describe", "open_stylizer", "stylize"]

_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class StylizeRequest(StylizerFlags):
    """What ``std-rt stylize`` was asked to do."""

    inputs: Annotated[list[Path], Argument(metavar="INPUT...", help="Pictures, clips or folders.")]
    style: Annotated[
        list[str],
        Option(
            "--style", "-s", metavar="PICTURE[:WEIGHT]", help="Picture or style file; several are blended."
        ),
    ]
    output: Annotated[
        Path | None,
        Option("--output", "-o", metavar="FILE|FOLDER", help="Default: NAME_styled next to each input."),
    ] = None
    temporal: TemporalOption = "full"  # docs/results.md has what it costs and gains
    mask: Annotated[
        Path | None,
        Option(
            "--mask",
            metavar="PICTURE",
            help="Paint where this picture is white, keep the input where it is black; grey mixes.",
        ),
    ] = None


def stylize(request: StylizeRequest) -> int:
    """Stylize pictures, folders and clips.

    std-rt stylize photo.jpg --style art.png

    std-rt stylize clip.mp4 -s art.png:0.7 -s ink.png:0.3 -o styled.mp4 --size 512

    std-rt stylize photo.jpg -s art.png --mask sky.png -o styled.png
    """
    from std_rt.media.sources import plan_outputs
    from std_rt.pipeline.mask import Mask, unless_whole
    from std_rt.pipeline.style_file import encode_styles, open_styles

    weights = [parse_style(text) for text in request.style]
    jobs = plan_outputs(request.inputs, request.output, overwrite=request.overwrite)
    mask = None if request.mask is None else unless_whole(Mask.read(request.mask))
    console = Console(stderr=True)
    with open_stylizer(request, console) as stylizer:
        styles = open_styles(weights, stylizer.bundle)
        if request.prompt is not None:
            stylizer.set_prompt(request.prompt, request.negative_prompt)
        work = _Work(stylizer, request, console, mask)
        with builds_shown(console, stylizer.backend):
            work.prepare(jobs)
            style = encode_styles(stylizer.encode_style, styles, stylizer.bundle)
            stylizer.use_style(style, request.style_strength)
            note(console, describe(stylizer))
            return work.run(jobs)


@contextmanager
def open_stylizer(flags: StylizerFlags, console: Console) -> Iterator[Stylizer]:
    """The stylizer that the flags describe. Raises StdRtError if the bundle does not support them."""
    from std_rt.pipeline.stylizer import Stylizer

    size = parse_size(flags.size)
    with Stylizer.load(
        flags.bundle,
        backend=flags.backend,
        size=size,
        steps=flags.steps,
        precision=flags.precision,
        guidance=flags.guidance,
        guidance_mode=flags.guidance_mode,
        meanwhile=(lambda line: note(console, f"note: {line}")) if flags.build_in_background else None,
    ) as stylizer:
        check_size(stylizer, size)
        yield stylizer


def check_size(stylizer: Stylizer, size: int | tuple[int, int] | None) -> None:
    """Raise UsageError if the bundle does not support ``size``, a side or (H, W) in px."""
    low, high = stylizer.bundle.size_range
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and not all(low <= side <= high for side in sides):
        raise UsageError(
            f"bundle '{stylizer.bundle.name}' works at {low} to {high} px per side, not at "
            f"{sides[1]}x{sides[0]}; change --size"
        )


def describe(stylizer: Stylizer) -> str:
    """One line: bundle, steps, backend and why it was chosen."""
    return f"{stylizer.bundle.name}, {stylizer.steps} steps, {stylizer.backend} ({stylizer.reason})"


class _Work:
    """The jobs of one command on one stylizer."""

    def __init__(
        self, stylizer: Stylizer, request: StylizeRequest, console: Console, mask: Mask | None
    ) -> None:
        self._stylizer, self._request, self._console, self._mask = stylizer, request, console, mask
        self._interrupted = False
        self._first: Picture | None = None

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Start opening the engines that the first input needs, while the style is encoded."""
        from std_rt.media.image import read_picture
        from std_rt.media.video.clip import probe

        # An unreadable input among many is reported when its turn comes.
        with suppress(MediaError) if len(jobs) > 1 else nullcontext():
            if jobs[0].is_video:
                info = probe(jobs[0].source)
                self._stylizer.prepare(info.height, info.width, masked=self._mask is not None)
            else:
                self._first = read_picture(jobs[0].source)
                self._stylizer.prepare(*self._first.frame.shape[:2], masked=self._mask is not None)

    def run(self, jobs: Sequence[Job]) -> int:
        """Do every job and return the exit code; among several, one that fails is reported and skipped."""
        failed, pictures = 0, sum(not job.is_video for job in jobs)
        with _progress(self._console) as bar:
            whole = bar.add_task("pictures", total=pictures, unit="/s", visible=pictures > 1)
            for job in jobs:
                try:
                    if job.is_video:
                        self._clip(job, bar)
                    else:
                        self._picture(job)
                except StdRtError as error:
                    if len(jobs) == 1:
                        raise
                    failed += 1
                    self._console.print(
                        f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
                    )
                bar.advance(whole, 0 if job.is_video else 1)
                if self._interrupted:
                    break
        if failed:
            summary = f"{failed} of {len(jobs)} inputs failed (above); {len(jobs) - failed} done"
            self._console.print(summary, style="red")
        return _INTERRUPTED if self._interrupted else 2 if failed else 0

    def _picture(self, job: Job) -> None:
        import numpy as np

        from std_rt.media import fit
        from std_rt.media.image import read_picture, write_picture

        started = time.perf_counter()
        picture, self._first = self._first or read_picture(job.source), None
        styled = self._stylizer.stylize(picture.frame, self._request.seed, mask=self._mask)
        height, width = styled.shape[:2]
        alpha = picture.alpha
        if alpha is not None and alpha.shape != (height, width):
            alpha = np.ascontiguousarray(fit.resize(alpha, (height, width)))
        write_picture(job.sink, styled, alpha)
        typer.echo(f"{job.sink} ({width}x{height}, {time.perf_counter() - started:.2f} s)")

    def _clip(self, job: Job, bar: Progress) -> None:
        from std_rt.media.video.transcode import transcode_stream
        from std_rt.streaming.frame_stream import GROUPED, FrameStream
        from std_rt.streaming.temporal import TemporalFilter

        stream = FrameStream(
            self._stylizer,
            batching=GROUPED,
            temporal=TemporalFilter(self._request.temporal),
            mask=self._mask,
            seed=self._request.seed,
        )
        task = bar.add_task(job.source.name, total=None, unit="fps")

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=None if total is None else max(total, done))

        with interruptible("SIGINT") as interrupted:
            report = transcode_stream(
                job.source,
                job.sink,
                stream.frames,
                overwrite=self._request.overwrite,
                progress=show,
                should_stop=interrupted,
            )
        self._interrupted = report.stopped
        for line in report.notes:
            note(self._console, f"note: {job.source.name}: {line}")
        if report.stopped and not report.frames:
            return
        fps = report.frames / report.seconds if report.seconds else 0.0
        early = ", stopped early, playable" if report.stopped else ""
        typer.echo(
            f"{report.output} ({report.width}x{report.height}, {report.frames} frames, {fps:.1f} fps{early})"
        )


def _progress(console: Console) -> Progress:
    """Progress bars with a rate: frames or pictures per second."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(TextColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:5.1f} {task.fields['unit']}" if speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(""))
    return Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    )
