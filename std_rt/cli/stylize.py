"""`std-rt stylize`: pictures, clips and folders, in the style of a picture.

Exits with 2 if an input failed (the others are still processed), with 130 if Ctrl-C, SIGTERM or SIGHUP ended
a clip early; the partial clip is playable.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from typer import Argument, BadParameter, Option

from std_rt.cli.options import StylizerFlags, TemporalOption, parse_size, parse_style
from std_rt.cli.terminal import builds_shown, note, progress_lines, say
from std_rt.core.errors import MediaError, StdRtError, UsageError, counted
from std_rt.core.files import check_input
from std_rt.core.signals import ended_as_by_ctrl_c, interruptible

if TYPE_CHECKING:
    from rich.progress import Progress

    from std_rt.media.image import Picture
    from std_rt.media.sources import Job
    from std_rt.pipeline.mask import Mask
    from std_rt.pipeline.stylizer import Stylizer

__all__ = ["StylizeRequest", "describe", "open_stylizer", "stylize"]

_INTERRUPTED = 130
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
_WHOLE = 0.98  # of a clip's frames, whose number is an estimate in some containers


@dataclass(frozen=True, kw_only=True)
class StylizeRequest(StylizerFlags):
    """What ``std-rt stylize`` was asked to do."""

    inputs: Annotated[
        list[Path],
        Argument(
            metavar="INPUT...",
            help="Pictures (HEIC and JPEG XL: extra photos), clips or folders; - is stdin.",
        ),
    ]
    style: Annotated[
        list[str],
        Option(
            "--style", "-s", metavar="PICTURE[:WEIGHT]", help="Picture or style file; several are blended."
        ),
    ]
    output: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER",
            help="Default: NAME_styled next to each input. Without extension: a folder; -: stdout.",
        ),
    ] = None
    skip_existing: Annotated[
        bool, Option("--skip-existing", help="Keep results that exist and make the others.")
    ] = False
    upscale: Annotated[
        bool, Option("--upscale", help="Bring results back to the size of their input, along its edges.")
    ] = False
    temporal: TemporalOption = "full"  # docs/results.md has what it costs and gains
    mask: Annotated[
        Path | None,
        Option(
            "--mask",
            metavar="PICTURE",
            help="Paint where this picture is white, keep the input where it is black; grey mixes.",
        ),
    ] = None
    sound: Annotated[
        str,
        Option(
            metavar="auto|copy|convert|drop",
            help="Sound of clips. auto: copied, or AAC (WebM: Opus) where the output cannot hold it.",
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = ("auto", "copy", "convert", "drop")
        if self.sound not in modes:
            raise BadParameter(f"--sound must be one of {', '.join(modes)}, got {self.sound!r}")
        if self.skip_existing and self.overwrite:
            raise UsageError("--skip-existing and --overwrite exclude each other; give one of them")

    @property
    def to_stdout(self) -> bool:
        """The result goes to stdout, which must carry nothing else."""
        return self.output == Path("-")


def stylize(request: StylizeRequest) -> int:
    """Stylize pictures, folders and clips.

    std-rt stylize photo.jpg --style art.png

    std-rt stylize clip.mp4 -s art.png:0.7 -s ink.png:0.3 -o styled.mp4 --size 512

    std-rt stylize photo.jpg -s art.png --mask sky.png -o styled.png
    """
    from std_rt.media.sources import is_stream, plan_outputs, spooled_inputs, spooled_output
    from std_rt.pipeline.mask import Mask, unless_whole

    weights = [parse_style(text) for text in request.style]
    if request.output is None and any(map(is_stream, request.inputs)):
        raise UsageError(
            "stdin and pipes have no name to derive another from; give -o FILE, or -o - for stdout"
        )
    console = Console(stderr=True)

    def tell(line: str) -> None:
        note(console, f"note: {line}")

    for path, _ in weights:  # before a word on outputs
        if not is_stream(path):
            check_input(path)
    paths, count = [*request.inputs, *(path for path, _ in weights)], len(request.inputs)
    with spooled_inputs(paths) as found, spooled_output(request.output) as output:
        jobs = plan_outputs(
            found[:count],
            output,
            overwrite=request.overwrite,
            skip_existing=request.skip_existing,
            sound=request.sound,
            say=tell,
            needed=[*found[count:], *([request.mask] if request.mask else [])],
        )
        styles = [(path, weight) for path, (_, weight) in zip(found[count:], weights, strict=True)]
        mask = None if request.mask is None else unless_whole(Mask.read(request.mask))
        return _stylize(request, jobs, styles, mask, console)


def _stylize(
    request: StylizeRequest,
    jobs: Sequence[Job],
    weights: list[tuple[Path, float]],
    mask: Mask | None,
    console: Console,
) -> int:
    from std_rt.pipeline.style_file import encode_styles, open_styles

    if request.to_stdout and len(jobs) > 1:
        raise UsageError(f"-o - takes one input, got {len(jobs)}; give a folder, such as -o out")
    todo = _without_done(jobs, console)
    if not todo:
        return 0
    with ended_as_by_ctrl_c("SIGTERM", "SIGHUP"), open_stylizer(request, console) as stylizer:
        styles = open_styles(
            weights, stylizer.bundle, request.stroke_size, say=lambda line: note(console, f"note: {line}")
        )
        if request.prompt is not None:
            stylizer.set_prompt(request.prompt, request.negative_prompt)
        work = _Work(stylizer, request, console, mask)
        with builds_shown(console, stylizer.backend):
            work.prepare(todo)
            style = encode_styles(stylizer.encode_style, styles, stylizer.bundle, request.stroke_size)
            stylizer.use_style(style, request.style_strength, keep_colours=request.keep_colours)
            note(console, describe(stylizer))
            return work.run(todo)


def _without_done(jobs: Sequence[Job], console: Console) -> list[Job]:
    """The jobs still to do; a line about the others, and about clips among them that were stopped early."""
    from std_rt.media.video.clip import probe

    done = [job for job in jobs if job.is_done]
    if done:
        note(console, f"{len(done)} of {len(jobs)} results exist already and stay (--skip-existing)")
    for job in done:
        with suppress(MediaError):
            there, wanted = (
                (probe(path).frames for path in (job.sink, job.source)) if job.is_video else (0, 0)
            )
            if there and wanted and there < _WHOLE * wanted:
                note(
                    console,
                    f"note: {job.sink} has {there} of {wanted} frames; delete it to make it again",
                )
    return [job for job in jobs if not job.is_done]


@contextmanager
def open_stylizer(flags: StylizerFlags, console: Console, *, live: bool = False) -> Iterator[Stylizer]:
    """The stylizer that the flags describe. Raises StdRtError if the bundle does not support them."""
    from std_rt.core.bundle import load_bundle
    from std_rt.pipeline.stylizer import Stylizer

    size, bundle = parse_size(flags.size), load_bundle(flags.bundle)
    with Stylizer.load(
        bundle,
        backend=flags.backend,
        size=size,
        steps=flags.steps,
        precision=flags.precision,
        guidance=flags.guidance,
        guidance_mode=flags.guidance_mode,
        vae=bundle.choose_vae(flags.vae, live=live),
        meanwhile=(lambda line: note(console, f"note: {line}")) if flags.build_in_background else None,
    ) as stylizer:
        if stylizer.guidance.mode != "none" and bundle.guidance["mode"] == "none":
            line = (
                f"note: bundle '{bundle.name}' was made for pictures without guidance; with it "
                "they can come out as noise: leave out --guidance"
            )
            note(console, line)
        yield stylizer


def describe(stylizer: Stylizer) -> str:
    """One line: bundle, steps, backend and why it was chosen."""
    steps = counted(stylizer.steps, "step")
    return f"{stylizer.bundle.name}, {steps}, {stylizer.backend} ({stylizer.reason})"


class _Work:
    """The jobs of one command on one stylizer."""

    def __init__(
        self, stylizer: Stylizer, request: StylizeRequest, console: Console, mask: Mask | None
    ) -> None:
        self._stylizer, self._request, self._console, self._mask = stylizer, request, console, mask
        self._interrupted = False
        self._first: Picture | None = None
        self._lines = progress_lines(console)
        self._bars = _progress(console)
        self._has_told_size = request.upscale

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
        with self._bars:
            whole = self._bars.add_task("pictures", total=pictures, unit="/s", visible=pictures > 1)
            for index, job in enumerate(jobs):
                self._lines("inputs", index, len(jobs))
                try:
                    if job.is_video:
                        self._clip(job)
                    else:
                        self._picture(job)
                except StdRtError as error:
                    if len(jobs) == 1:
                        raise
                    failed += 1
                    which = "" if job.source.name in str(error) else f"{job.source}: "
                    self._console.print(
                        f"error: {which}{error}", style="red", markup=False, highlight=False, soft_wrap=True
                    )
                except KeyboardInterrupt:
                    self._tell_stop(index, len(jobs))
                    raise
                self._bars.advance(whole, 0 if job.is_video else 1)
                if self._interrupted:
                    self._tell_stop(index, len(jobs))
                    break
        if failed:
            summary = f"{failed} of {len(jobs)} inputs failed (above); {len(jobs) - failed} done"
            self._console.print(summary, style="red")
        return _INTERRUPTED if self._interrupted else 2 if failed else 0

    def _tell_stop(self, index: int, count: int) -> None:
        if count > 1:
            line = (
                f"stopped at input {index + 1} of {count}; --skip-existing keeps the results that are there"
            )
            note(self._console, line)

    def _picture(self, job: Job) -> None:
        from std_rt.media.image import not_stored, painted, read_picture, write_picture

        started = time.perf_counter()
        picture, self._first = self._first or read_picture(job.source), None
        for line in (*picture.notes, *not_stored(picture, job.sink)):
            note(self._console, f"note: {job.source.name}: {line}")
        self._tell_size(job, picture.frame.shape[0], picture.frame.shape[1])
        done = painted(
            picture,
            lambda frame: self._stylizer.stylize(frame, self._request.seed, mask=self._mask),
            upscale=self._request.upscale,
        )
        height, width = done.frame.shape[:2]
        write_picture(job.sink, done.frame, done.alpha, exif=done.exif)
        self._report(job.sink, (width, height), f"{time.perf_counter() - started:.2f} s")

    def _report(self, result: Path, size: tuple[int, int], what: str) -> None:
        """A line on a result; on stderr if stdout has the result itself."""
        line = f"({size[0]}x{size[1]}, {what})"
        if self._request.to_stdout:
            note(self._console, f"stdout {line}")
        else:
            say(f"{result} {line}", self._bars)

    def _tell_size(self, job: Job, height_px: int, width_px: int) -> None:
        """Once, before the work: that a result will be smaller than its input, and what changes that."""
        from std_rt.media import fit

        working = self._stylizer.working_size(height_px, width_px)
        h, w = fit.result_size((height_px, width_px), working)
        if self._has_told_size or height_px * width_px <= h * w:
            return
        self._has_told_size = True
        if job.is_video:
            h, w = h + h % 2, w + w % 2  # as 4:2:0 needs them
        result = f" and its result {w}x{h}" if self._mask is None else ""
        more = ", --upscale brings results back to their input's size" if self._mask is None else ""
        note(
            self._console,
            f"note: {job.source.name} is {width_px}x{height_px}{result}; the model works at "
            f"{working[1]}x{working[0]}: --size sets that (up to {self._stylizer.bundle.size_range[1]} px)"
            f"{more}",
        )

    def _clip(self, job: Job) -> None:
        from std_rt.media import fit
        from std_rt.media.video.clip import probe
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
        if not self._has_told_size:
            info = probe(job.source)
            self._tell_size(job, info.height, info.width)
        task = self._bars.add_task(job.source.name, total=None, unit="fps")

        def show(done: int, total: int | None) -> None:
            self._bars.update(task, completed=done, total=None if total is None else max(total, done))
            self._lines(f"{job.source.name}, frames", done, total)

        told: list[str] = []

        def tell(line: str) -> None:
            told.append(line)
            note(self._console, f"note: {job.source.name}: {line}")

        with interruptible(*_ENDING) as interrupted, ExitStack() as stack:
            stack.callback(self._bars.remove_task, task)
            report = transcode_stream(
                job.source,
                job.sink,
                fit.upscaling(stream.frames) if self._request.upscale else stream.frames,
                overwrite=self._request.overwrite,
                progress=show,
                sound=self._request.sound,
                announce=tell,
                should_stop=interrupted,
            )
        self._interrupted = report.stopped
        for line in report.notes[len(told) :]:
            tell(line)
        if report.stopped and not report.frames:
            return
        fps = report.frames / report.seconds if report.seconds else 0.0
        early = ", stopped early, playable" if report.stopped else ""
        if report.output != job.sink:
            early += f"; {job.sink} {'is as it was' if report.stopped else 'was made by another program'}"
        size = (report.width, report.height)
        self._report(report.output, size, f"{report.frames} frames, painted at {fps:.1f} a second{early}")


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
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_interactive
    )
