"""What `std-rt live` does: check, open, present until someone quits, report."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console

from std_rt.cli_stylize import builds_shown, check_size, describe
from std_rt.errors import MediaError, UsageError
from std_rt.live import Session, Settings
from std_rt.live_show import Outputs, Show
from std_rt.media import fit
from std_rt.media.camera import Captured, Source, open_source
from std_rt.media.files import check_output
from std_rt.media.record import Recorder
from std_rt.media.virtual_camera import VirtualCamera
from std_rt.media.window import Window
from std_rt.stream.deck import Deck
from std_rt.stream.keys import help_lines
from std_rt.stream.metrics_file import MetricsWriter
from std_rt.stylizer import Stylizer

__all__ = ["Request", "run"]

Size = tuple[int, int]  # (H, W) in pixels
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
        source = _Peeked(
            open_source(request.camera, size=request.camera_size, fps=request.camera_fps, loop=request.loop)
        )
        stack.callback(source.close)
        stylizer = stack.enter_context(_load(request, console))
        deck = stack.enter_context(closing(_deck(request, stylizer, source, console)))
        session = Session(stylizer, source, deck, _settings(request), mirror=_is_mirrored(request))
        outputs = _outputs(request, session, stylizer, source)
        show = Show(session, outputs, source.first, say=lambda line: _say(console, line))
        stack.callback(show.close)
        stack.enter_context(session)
        console.print(f"[dim]{describe(stylizer)}, {source.name}[/]", highlight=False)
        _present(show, outputs, request, console)
        show.close()
        session.close()
        report = session.report()
        if outputs.metrics is not None:
            outputs.metrics.close()
    typer.echo(json.dumps(report))
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
    for path in (request.record, request.metrics):
        if path is not None:
            check_output(path, overwrite=request.overwrite)
    if not request.snapshots.is_dir():
        raise MediaError(f"{request.snapshots} is no folder; give --snapshots one that exists")


class _Peeked:
    """A source whose first frame was looked at: it tells the size of all that follows."""

    def __init__(self, source: Source) -> None:
        self._source = source
        taken = source.read()
        if taken is None:
            raise MediaError(f"{source.name} gives no frame; give another camera with --camera")
        self._taken: Captured | None = taken
        self.first = taken.frame

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def fps(self) -> float | None:
        return self._source.fps

    @property
    def status(self) -> str:
        return self._source.status

    @property
    def faults(self) -> dict[str, int]:
        return self._source.faults

    def read(self) -> Captured | None:
        """The first frame again, then what follows."""
        taken, self._taken = self._taken, None
        return taken or self._source.read()

    def close(self) -> None:
        self._source.close()


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


def _deck(request: Request, stylizer: Stylizer, source: _Peeked, console: Console) -> Deck:
    """The styles that the session begins with; the engines of its size open meanwhile."""
    check_size(stylizer, request.size)
    prompt, negative = request.prompts
    if prompt is not None:
        stylizer.set_prompt(prompt, negative)
    deck = Deck(stylizer.encode_style, stylizer.bundle, strength=request.strength)
    try:
        deck.cycle(request.cycle_s, min(request.crossfade_s, request.cycle_s))
        with builds_shown(console, stylizer.backend):
            level = stylizer.level(source.first.shape[0], source.first.shape[1])
            stylizer.prepare_levels([level], stream_batch=request.stream_batch)
            deck.fill(request.styles)
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


def _is_mirrored(request: Request) -> bool:
    """A camera faces its user, who expects a mirror; a file does not."""
    return not Path(request.camera).is_file() if request.mirror is None else request.mirror


def _outputs(request: Request, session: Session, stylizer: Stylizer, source: _Peeked) -> Outputs:
    height, width = source.first.shape[:2]
    fps = source.fps or _USUAL_FPS

    def new_recorder(path: Path) -> Recorder:
        return Recorder(path, fps=fps, overwrite=request.overwrite)

    outputs = Outputs(
        snapshots=request.snapshots,
        record_to=request.record or Path(f"std-rt-{datetime.now():%Y%m%d-%H%M%S}.mp4"),
        new_recorder=new_recorder,
    )
    try:
        if request.virtual:
            outputs.virtual = VirtualCamera((height, width), fps, request.virtual_device)
        if request.record is not None:
            outputs.recorder = new_recorder(request.record)
        if request.metrics is not None:
            outputs.metrics = MetricsWriter(request.metrics, session.meter, overwrite=request.overwrite)
        if request.window:
            size = fit.result_size((height, width), stylizer.working_size(height, width))
            outputs.window = Window(
                f"std-rt - {source.name}", size=size, fullscreen=request.fullscreen, help_lines=help_lines()
            )
    except BaseException:
        for output in (outputs.virtual, outputs.recorder, outputs.metrics):
            if output is not None:
                output.close()
        raise
    return outputs


def _present(show: Show, outputs: Outputs, request: Request, console: Console) -> None:
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

    before = {kind: signal.getsignal(kind) for kind in kinds}
    for kind in kinds:
        signal.signal(kind, ask)
    try:
        yield lambda: asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _say(console: Console, line: str) -> None:
    console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
