"""`std-rt live`: a camera, or a clip in its place, stylized in a window until the user quits.

The last line on stdout is the report, as JSON. The exit code is 0 however the session ends.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer import Option

from std_rt.cli.options import StylizerFlags, parse_frame_size
from std_rt.cli.styles import expand_styles
from std_rt.cli.stylize import describe, open_stylizer
from std_rt.cli.terminal import builds_shown, note
from std_rt.core.errors import MediaError, UsageError
from std_rt.core.machine import install_hint
from std_rt.core.signals import interruptible

if TYPE_CHECKING:
    from std_rt.core.arrays import Frame
    from std_rt.live.presenter import Outputs, Presenter
    from std_rt.live.session import Session, Settings
    from std_rt.live.style_mixer import StyleMixer
    from std_rt.media.camera.frame_source import Source
    from std_rt.media.video.record import Recorder
    from std_rt.pipeline.stylizer import Stylizer

__all__ = ["LiveRequest", "live"]

_TICK_S = 0.02
_USUAL_FPS = 30.0
_CYCLE_S = 10.0  # of a folder of styles


@dataclass(frozen=True, kw_only=True)
class LiveRequest(StylizerFlags):
    """What ``std-rt live`` was asked to do. Raises UsageError for flags that do not fit together."""

    style: Annotated[
        list[str],
        Option(
            "--style",
            "-s",
            metavar="PICTURE[:WEIGHT]|FOLDER",
            help="Picture, style file, or a folder of them; repeatable. With weights, starts with a blend.",
        ),
    ]
    camera: Annotated[
        str,
        Option(
            "--camera",
            "-c",
            metavar="N|DEVICE|FILE",
            help="Camera index or device, or a clip or picture to use as one.",
        ),
    ] = "0"
    crossfade: Annotated[float, Option(metavar="SECONDS", help="Duration of a style change.")] = 1.0
    cycle: Annotated[
        float | None,
        Option(
            metavar="SECONDS",
            help="Time per style; 0 disables cycling. Default: 10 if a folder is given, else 0.",
        ),
    ] = None
    stream_batch: Annotated[
        bool,
        Option("--stream-batch", help="Share UNet calls between frames: higher frame rate, higher latency."),
    ] = False
    skip_similar: Annotated[
        float | None, Option(metavar="0..1", help="Skip frames more similar than this, such as 0.98.")
    ] = None
    target_fps: Annotated[
        float | None, Option(help="Frame rate to maintain by lowering steps, then resolution.")
    ] = None
    mirror: Annotated[bool | None, Option(help="Default: cameras are mirrored, files are not.")] = None
    window: Annotated[bool, Option(help="Show a window.")] = True
    fullscreen: Annotated[bool, Option("--fullscreen", help="Start in full screen.")] = False
    record: Annotated[Path | None, Option(metavar="CLIP", help="Record from the start, like key R.")] = None
    virtual_camera: Annotated[
        bool,
        Option(
            "--virtual-camera",
            help="Also send frames to a virtual camera (for calls). Extra \\[live]: see std-rt doctor.",
        ),
    ] = False
    virtual_device: Annotated[
        str | None, Option(metavar="DEVICE", help="The virtual camera; default: the first one.")
    ] = None
    snapshots: Annotated[Path, Option(metavar="FOLDER", help="Where key S saves pictures.")] = Path()
    metrics: Annotated[
        Path | None, Option(metavar="FILE", help="Write metrics once per second, as JSON lines.")
    ] = None
    duration: Annotated[float | None, Option(metavar="SECONDS", help="End after this long.")] = None
    camera_size: Annotated[str | None, Option(metavar="WxH", help="Requested capture size.")] = None
    camera_fps: Annotated[float | None, Option(help="Requested capture rate.")] = None
    loop: Annotated[bool, Option("--loop/--once", help="Whether a clip restarts at its end.")] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_frame_size(self.camera_size)
        if self.duration is not None and not 0 < self.duration < math.inf:
            raise UsageError(f"--duration must be above 0 seconds, got {self.duration:g}")
        if self.skip_similar is not None and not 0 <= self.skip_similar < 1:
            raise UsageError(f"--skip-similar must be 0 to below 1, such as 0.98, got {self.skip_similar:g}")
        if self.target_fps is not None and not 0 < self.target_fps <= 1000:
            raise UsageError(f"--target-fps must be a rate above 0, such as 15, got {self.target_fps:g}")
        if self.fullscreen and not self.window:
            raise UsageError("--fullscreen needs the window; leave out --no-window")
        if not (0 <= self.crossfade < math.inf and 0 <= self.cycle_s < math.inf):
            raise UsageError("--crossfade and --cycle must be 0 seconds or more")
        if 0 < self.cycle_s < self.crossfade:
            times = f"--crossfade {self.crossfade:g} does not fit into --cycle {self.cycle_s:g}"
            raise UsageError(f"{times}; make the crossfade shorter")
        if self.skip_similar is not None and self.stream_batch:
            raise UsageError("--skip-similar does not work with --stream-batch; leave one out")

    @property
    def wants_virtual_camera(self) -> bool:
        """True if --virtual-camera or --virtual-device was given."""
        return self.virtual_camera or self.virtual_device is not None

    @property
    def cycle_s(self) -> float:
        """Seconds until the next style; 0: never."""
        if self.cycle is not None:
            return self.cycle
        return _CYCLE_S if any(Path(text).is_dir() for text in self.style) else 0.0


def live(request: LiveRequest) -> None:
    """Stylize a camera live. In the window, H shows the keys.

    A video-to-video bundle paints windows of frames together, so a frame is shown T - overlap - 1 frames and
    the time of a window after it was captured; the start says how long that is.

    std-rt live --style art.png

    std-rt live -s paintings/ --camera clip.mp4 --stream-batch --record out.mp4
    """
    from std_rt.live.presenter import Presenter
    from std_rt.live.session import Session

    styles = expand_styles(request.style)
    _check_outputs(request, [path for path, _ in styles])
    settings = _settings(request)
    console = Console(stderr=True)
    with ExitStack() as stack:
        source = stack.enter_context(closing(_open_source(request)))
        first = source.first_frame()
        if first is None:
            raise MediaError(f"{source.name} delivers no frames; name another camera with --camera")
        stylizer = stack.enter_context(open_stylizer(request, console, live=True))
        settings.check(stylizer.bundle)
        if request.prompt is not None:
            stylizer.set_prompt(request.prompt, request.negative_prompt)
        stylizer.keep_colours = request.keep_colours
        mixer = stack.enter_context(closing(_mixer(request, stylizer)))
        with builds_shown(console, stylizer.backend):
            quality = stylizer.quality(first.shape[0], first.shape[1])
            stylizer.prepare_qualities([quality], stream_batch=request.stream_batch)
            mixer.fill(styles)
            # Before the session starts: meanwhile a camera would only lose frames.
            while not stylizer.ready(quality, stream_batch=request.stream_batch):
                time.sleep(_TICK_S)
        mirror = source.is_camera if request.mirror is None else request.mirror
        session = Session(stylizer, source, mixer, settings, mirror=mirror)
        outputs = _outputs(request, session, stylizer, first)
        presenter = Presenter(session, outputs, first, say=lambda line: note(console, line))
        stack.enter_context(session)
        # Closed first, so that nothing can prevent a recording from being finished.
        stack.callback(presenter.close)
        note(console, f"{describe(stylizer)}, {source.name}")
        if stylizer.bundle.window is not None:
            note(console, _latency(stylizer.bundle.window, source.fps or _USUAL_FPS))
        _present(presenter, outputs, request.duration, console)
        session.metrics.pause("end")  # the time that closing takes does not count
        session.report()
    typer.echo(json.dumps(session.report()))


def _settings(request: LiveRequest) -> Settings:
    from std_rt.live.session import Settings

    return Settings(
        stream_batch=request.stream_batch,
        temporal=request.temporal,
        similar=request.skip_similar,
        target_fps=request.target_fps,
        crossfade_s=request.crossfade,
        seed=request.seed,
    )


def _latency(window: tuple[int, int], fps: float) -> str:
    """What a video-to-video bundle costs in time, in one line."""
    frames, new = window[0], window[0] - window[1]
    return (
        f"video-to-video: windows of {frames} frames, {new} of them new, so a frame is shown {new - 1} "
        f"frames ({(new - 1) / fps:.2f} s at {fps:g} fps) and the time of a window after it was captured"
    )


def _mixer(request: LiveRequest, stylizer: Stylizer) -> StyleMixer:
    from std_rt.live.style_mixer import StyleMixer

    mixer = StyleMixer(
        stylizer.encode_style,
        stylizer.bundle,
        strength=request.style_strength,
        stroke_size=request.stroke_size,
    )
    mixer.cycle(request.cycle_s, request.crossfade)
    return mixer


def _check_outputs(request: LiveRequest, styles: list[Path]) -> None:
    """Raise StdRtError if an output cannot be written, or names an input or the other output."""
    from std_rt.core.files import check_output
    from std_rt.media.video.encoder import Encoder

    if not request.snapshots.is_dir():
        raise MediaError(f"{request.snapshots} is not a folder; give --snapshots one that exists")
    named = {"--record": request.record, "--metrics": request.metrics}
    outputs = {flag: path for flag, path in named.items() if path is not None}
    for flag, path in outputs.items():
        for source in (Path(request.camera.strip()).expanduser(), *styles):
            check_output(path, source=source, overwrite=request.overwrite, flag=flag)
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise UsageError(f"--record and --metrics both name {request.record}; give two files")
    if request.record is not None:
        Encoder.for_file(request.record, None, 18, live=True)
    if request.wants_virtual_camera and find_spec("pyvirtualcam") is None:
        raise MediaError(f"the virtual camera needs pyvirtualcam; run: {install_hint('live')}")


def _open_source(request: LiveRequest) -> Source:
    """The camera, or a file to play as one. Raises UsageError if camera flags are given for a file."""
    from std_rt.media.camera.camera import open_source

    size, fps = parse_frame_size(request.camera_size), request.camera_fps
    source = open_source(request.camera, size=size, fps=fps, loop=request.loop)
    if (size or fps) and not source.is_camera:
        source.close()
        raise UsageError(
            f"--camera-size and --camera-fps are for cameras, and {source.name} is a file; leave them out"
        )
    return source


def _present(presenter: Presenter, outputs: Outputs, seconds: float | None, console: Console) -> None:
    """Present until the session ends; without a window, statistics are shown on the terminal."""
    with interruptible("SIGINT", "SIGTERM", "SIGHUP") as interrupted:
        if outputs.window is not None or not console.is_terminal:
            presenter.run(interrupted, seconds)
            return
        with console.status("opening the engines") as status:
            outputs.status = lambda text: status.update(text)
            presenter.run(interrupted, seconds)


def _outputs(request: LiveRequest, session: Session, stylizer: Stylizer, first: Frame) -> Outputs:
    """The requested outputs; those that create a file come last, so that a refusal leaves none behind."""
    from std_rt.live.keys import help_lines
    from std_rt.live.metrics_file import MetricsWriter
    from std_rt.live.presenter import Outputs
    from std_rt.media import fit
    from std_rt.media.camera.virtual_camera import VirtualCamera
    from std_rt.media.video.record import Recorder
    from std_rt.media.window.window import Window

    height, width = first.shape[:2]
    fps = session.source.fps or _USUAL_FPS

    def new_recorder(path: Path) -> Recorder:
        return Recorder(path, fps=fps, overwrite=request.overwrite)

    outputs = Outputs(
        snapshots=request.snapshots,
        record_to=request.record or Path(f"std-rt-{datetime.now():%Y%m%d-%H%M%S}.mp4"),
        new_recorder=new_recorder,
    )
    with ExitStack() as undo:
        if request.window:
            size = fit.result_size((height, width), stylizer.working_size(height, width))
            title = f"std-rt - {session.source.name}"
            window = Window(title, size=size, fullscreen=request.fullscreen, help_lines=help_lines())
            outputs.window = undo.enter_context(closing(window))
        if request.wants_virtual_camera:
            virtual = VirtualCamera((height, width), fps, request.virtual_device)
            outputs.virtual = undo.enter_context(closing(virtual))
        if request.record is not None:
            outputs.recorder = undo.enter_context(closing(new_recorder(request.record)))
        if request.metrics is not None:
            outputs.metrics = MetricsWriter(request.metrics, session.metrics, overwrite=request.overwrite)
        undo.pop_all()
    return outputs
