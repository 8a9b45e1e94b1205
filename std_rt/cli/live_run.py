"""What `std-rt live` does: check, open, present until someone quits, report."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from std_rt.cli.stylize import builds_shown, check_size, describe
from std_rt.core.errors import MediaError, UsageError
from std_rt.core.files import check_output
from std_rt.live.keys import help_lines
from std_rt.live.metrics_file import MetricsWriter
from std_rt.live.presenter import Outputs, Presenter
from std_rt.live.session import Session, Settings
from std_rt.live.style_mixer import StyleMixer
from std_rt.media import fit
from std_rt.media.camera.camera import Camera, Source, open_source
from std_rt.media.camera.virtual_camera import VirtualCamera
from std_rt.media.video.record import Recorder
from std_rt.media.video.track import Encoder
from std_rt.media.window.window import Window
from std_rt.pipeline.stylizer import Stylizer

__all__ = ["Request", "run"]

Frame = NDArray[np.uint8]
Size = tuple[int, int]  # (H, W) in pixels
_TICK_S = 0.02
_USUAL_FPS = 30.0


@dataclass(frozen=True)
class Request:
    """The command as parsed; sizes are (H, W) or a side in pixels, ``styles`` are (path, weight)."""

    styles: list[tuple[Path, float | None]]
    camera: str
    camera_size: Size | None
    camera_fps: float | None
    loop: bool
    mirror: bool | None
    bundle: str | None
    size: int | Size | None
    steps: int | None
    backend: str
    precision: str
    prompts: tuple[str | None, str | None]
    guidance: tuple[float | None, str | None]
    build_in_background: bool
    strength: float
    crossfade_s: float
    cycle_s: float
    stream_batch: bool
    temporal: str
    similar: float | None
    target_fps: float | None
    seed: int
    window: bool
    fullscreen: bool
    record: Path | None
    virtual: bool
    virtual_device: str | None
    snapshots: Path
    metrics: Path | None
    duration_s: float | None
    overwrite: bool


def run(request: Request) -> int:
    """Do it; returns the exit code: 0 however it was ended.

    What can be refused is refused before the model is opened. The last line printed is the report.
    """
    console = Console(stderr=True)
    _check(request)
    with ExitStack() as stack:
        source = stack.enter_context(closing(_open_source(request)))
        first = _first_frame(request, source)
        stylizer = stack.enter_context(_load(request, console))
        deck = stack.enter_context(closing(_deck(request, stylizer, first, console)))
        is_mirror = isinstance(source, Camera) if request.mirror is None else request.mirror
        session = Session(stylizer, source, deck, _settings(request), mirror=is_mirror)
        outputs = _outputs(request, session, stylizer, first)
        show = Presenter(session, outputs, first, say=lambda line: _say(console, line))
        stack.enter_context(session)
        stack.callback(show.close)  # first of all, so that nothing can keep a recording from its end
        console.print(f"[dim]{describe(stylizer)}, {source.name}[/]", highlight=False)
        _present(show, outputs, request, console)
        session.metrics.pause("end")  # closing is no running time
        session.report()
    typer.echo(json.dumps(session.report()))
    return 0


def _check(request: Request) -> None:
    """Raise StdRtError for flags that do not fit together and places that cannot be written."""
    if request.prompts[1] is not None and request.prompts[0] is None:
        raise UsageError("--negative-prompt goes with --prompt; give both")
    if request.duration_s is not None and not 0 < request.duration_s < float("inf"):
        raise UsageError(f"--duration is in seconds above 0, got {request.duration_s:g}")
    if request.similar is not None and not 0 <= request.similar < 1:
        raise UsageError(f"--skip-similar is from 0 to below 1, such as 0.98, got {request.similar:g}")
    if request.target_fps is not None and not 0 < request.target_fps <= 1000:
        raise UsageError(f"--target-fps is a rate above 0, such as 15, got {request.target_fps:g}")
    if request.fullscreen and not request.window:
        raise UsageError("--fullscreen needs the window; leave --no-window out")
    if not (0 <= request.crossfade_s < float("inf") and 0 <= request.cycle_s < float("inf")):
        raise UsageError("--crossfade and --cycle are in seconds, 0 or more")
    if 0 < request.cycle_s < request.crossfade_s:
        raise UsageError(
            f"a --crossfade of {request.crossfade_s:g} s does not fit into a --cycle of "
            f"{request.cycle_s:g} s; make it shorter"
        )
    if request.similar is not None and request.stream_batch:
        raise UsageError(
            "--skip-similar does not go with --stream-batch, which has frames inside; leave one out"
        )
    _check_places(request)


def _check_places(request: Request) -> None:
    """Raise StdRtError where an output cannot be written, is another one, or one of the inputs."""
    if not request.snapshots.is_dir():
        raise MediaError(f"{request.snapshots} is no folder; give --snapshots one that exists")
    inputs = [Path(request.camera.strip()).expanduser(), *(path for path, _ in request.styles)]
    named = {"--record": request.record, "--metrics": request.metrics}
    given = {flag: path for flag, path in named.items() if path is not None}
    for flag, path in given.items():
        for source in inputs:
            check_output(path, source=source, overwrite=request.overwrite, flag=flag)
    if len({path.resolve() for path in given.values()}) < len(given):
        raise UsageError(f"--record and --metrics both name {request.record}; give two files")
    if request.record is not None:
        Encoder.for_file(request.record, None, 18, live=True)
    if request.virtual and find_spec("pyvirtualcam") is None:
        raise MediaError("the virtual camera needs pyvirtualcam; run: pip install 'std-rt[live]'")


def _open_source(request: Request) -> Source:
    """The camera, or what stands in for it; UsageError where a file is asked for what only cameras do."""
    size, fps = request.camera_size, request.camera_fps
    source = open_source(request.camera, size=size, fps=fps, loop=request.loop)
    if not isinstance(source, Camera) and (size or fps):
        source.close()
        raise UsageError(
            f"--camera-size and --camera-fps are for cameras, and {source.name} is a file; leave them out"
        )
    return source


def _first_frame(request: Request, source: Source) -> Frame:
    """What is seen first: it tells the size of all that follows.

    A file is opened for it once more, because it begins to play with the first frame that is read.
    """
    if isinstance(source, Camera):
        taken = source.read()
    else:
        with closing(open_source(request.camera)) as other:
            taken = other.read()
    if taken is None:
        raise MediaError(f"{source.name} gives no frame; give another camera with --camera")
    return taken.frame


def _load(request: Request, console: Console) -> Stylizer:
    scale, mode = request.guidance
    return Stylizer.load(
        request.bundle,
        backend=request.backend,
        size=request.size,
        steps=request.steps,
        precision=request.precision,
        guidance=scale,
        guidance_mode=mode,
        meanwhile=(lambda line: _say(console, line)) if request.build_in_background else None,
    )


def _deck(request: Request, stylizer: Stylizer, first: Frame, console: Console) -> StyleMixer:
    """The styles that the session begins with, and the engines of its size, open."""
    check_size(stylizer, request.size)
    prompt, negative = request.prompts
    if prompt is not None:
        stylizer.set_prompt(prompt, negative)
    deck = StyleMixer(stylizer.encode_style, stylizer.bundle, strength=request.strength)
    try:
        deck.cycle(request.cycle_s, request.crossfade_s)
        with builds_shown(console, stylizer.backend):
            quality = stylizer.quality(first.shape[0], first.shape[1])
            stylizer.prepare_qualities([quality], stream_batch=request.stream_batch)
            deck.fill(request.styles)
            # Here, and not with the first frame: a camera that runs meanwhile would only lose frames.
            while not stylizer.ready(quality, stream_batch=request.stream_batch):
                time.sleep(_TICK_S)
    except BaseException:
        deck.close()
        raise
    return deck


def _settings(request: Request) -> Settings:
    return Settings(
        stream_batch=request.stream_batch,
        temporal=request.temporal,
        similar=request.similar,
        target_fps=request.target_fps,
        crossfade_s=request.crossfade_s,
        seed=request.seed,
    )


def _outputs(request: Request, session: Session, stylizer: Stylizer, first: Frame) -> Outputs:
    """All that was asked for; what makes a file comes last, so that a refusal leaves none behind."""
    height, width = first.shape[:2]
    fps = session.source.fps or _USUAL_FPS

    def new_recorder(path: Path) -> Recorder:
        return Recorder(path, fps=fps, overwrite=request.overwrite)

    outputs = Outputs(
        snapshots=request.snapshots,
        record_to=request.record or Path(f"std-rt-{datetime.now():%Y%m%d-%H%M%S}.mp4"),
        new_recorder=new_recorder,
    )
    try:
        if request.window:
            size = fit.result_size((height, width), stylizer.working_size(height, width))
            title = f"std-rt - {session.source.name}"
            outputs.window = Window(title, size=size, fullscreen=request.fullscreen, help_lines=help_lines())
        if request.virtual:
            outputs.virtual = VirtualCamera((height, width), fps, request.virtual_device)
        if request.record is not None:
            outputs.recorder = new_recorder(request.record)
        if request.metrics is not None:
            outputs.metrics = MetricsWriter(request.metrics, session.metrics, overwrite=request.overwrite)
    except BaseException:
        for output in (outputs.window, outputs.virtual, outputs.recorder):
            if output is not None:
                output.close()
        raise
    return outputs


def _present(show: Presenter, outputs: Outputs, request: Request, console: Console) -> None:
    with _interruptible() as interrupted:
        if outputs.window is not None or not console.is_terminal:
            show.run(interrupted, request.duration_s)
            return
        with console.status("opening the engines") as status:
            outputs.status = lambda text: status.update(text)
            show.run(interrupted, request.duration_s)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, or a polite request to end, ends the session well; a second Ctrl-C ends at once."""
    asked = False
    kinds = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP"):  # the terminal was closed
        kinds.append(signal.SIGHUP)

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, before[signal.Signals(number)])

    # Ignored by whoever started us (nohup), or not Python's: it stays so.
    found = {kind: signal.getsignal(kind) for kind in kinds}
    before = {kind: how for kind, how in found.items() if how not in (signal.SIG_IGN, None)}
    for kind in before:
        signal.signal(kind, ask)
    try:
        yield lambda: asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _say(console: Console, line: str) -> None:
    console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
