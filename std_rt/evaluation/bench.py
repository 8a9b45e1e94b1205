"""`std-rt bench`: time per stage of a frame.

Frames of exactly the working size are stylized one by one by a `FrameStream`, as in a live session. Warm-up
frames are not counted; medians and 95th percentiles are over the rest; fps is 1000 / median frame time. Runs
that are compared take turns, a few frames each, so that a slow spell of the machine affects all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from std_rt.core.arrays import Frame, Size
from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import UsageError, one_line
from std_rt.core.machine import describe_machine, fastest_arithmetic, peak_memory_mb, require
from std_rt.engines.registry import GPU_BACKENDS
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.frame_stream import FramePacket, FrameStream

__all__ = [
    "AGAINST",
    "STAGES",
    "Settings",
    "Timing",
    "diffusers_step",
    "load",
    "measure",
    "run",
    "run_first_frame",
    "sample_frame",
    "stage_times",
    "stream_step",
]

STAGES = ("convert", "vae_encoder", "unet", "scheduler", "vae_decoder", "total")
# A program that a GPU replays as one CUDA graph cannot be taken apart.
WHOLE_FRAME = ("convert", "frame", "total")
ENGINES = ("vae_encoder", "unet", "vae_decoder", "frame")  # stages that call engines
AGAINST = ("diffusers", "compile")
_TURN = 10  # frames in a row if several runs take turns; one more before them is not counted
_STARTS = 3  # processes whose start is timed
Step = Callable[[], Mapping[str, float]]  # stylize one frame -> milliseconds by stage


@dataclass(frozen=True)
class Settings:
    """``size`` is a side or (H, W) in pixels; None means the bundle's own. ``against``: keys of `AGAINST`."""

    bundle: str | None = None
    size: int | Size | None = None
    steps: int | None = None
    backend: str = "auto"
    precision: str = "auto"
    frames: int = 60
    warmup: int = 10
    against: tuple[str, ...] = ()
    vae: str = "auto"


@dataclass(frozen=True)
class Timing:
    """Milliseconds per frame by stage; ``outside``: share of a frame spent outside the engines, 0..1."""

    median_ms: dict[str, float]
    p95_ms: dict[str, float] = field(default_factory=dict)
    outside: float = 0.0

    @classmethod
    def of(cls, frames: list[dict[str, float]]) -> Timing:
        """Medians and 95th percentiles over frames."""
        stages = WHOLE_FRAME if any("frame" in frame for frame in frames) else STAGES
        columns = {stage: [frame.get(stage, 0.0) for frame in frames] for stage in stages}
        median = {stage: float(np.median(values)) for stage, values in columns.items()}
        p95 = {stage: float(np.percentile(values, 95)) for stage, values in columns.items()}
        shares = [1 - sum(frame.get(stage, 0.0) for stage in ENGINES) / frame["total"] for frame in frames]
        return cls(median, p95, float(np.median(shares)))

    @property
    def fps(self) -> float:
        """Frames per second at the median."""
        return 1000 / self.median_ms["total"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, rounded."""
        return {
            "fps": round(self.fps, 2),
            "stages_ms": {stage: round(value, 3) for stage, value in self.median_ms.items()},
            "p95_ms": {stage: round(value, 3) for stage, value in self.p95_ms.items()},
        }


def sample_frame(height_px: int, width_px: int, seed: int = 0) -> Frame:
    """A frame uint8 [H, W, 3] with soft shapes and some grain; content does not change the time."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height_px, :width_px]
    waves = [
        np.sin(x / rng.uniform(5, 60) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(5, 60)) for _ in range(3)
    ]
    noisy = np.stack(waves, -1) * 90 + 128 + rng.normal(0, 6, (height_px, width_px, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def stage_times(
    paint: Callable[[Callable[[str], None]], object], now: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Milliseconds by stage of ``paint(mark)``, which calls ``mark(stage)`` whenever a stage ends."""
    stages: dict[str, float] = defaultdict(float)
    last = now()

    def mark(stage: str) -> None:
        nonlocal last
        before, last = last, now()
        stages[stage] += (last - before) * 1000

    paint(mark)
    return stages


def stream_step(stylizer: Stylizer, size: Size) -> Step:
    """A step that stylizes one frame of a stream at a working size (H, W)."""
    stylizer.prepare(*size)
    stylizer.set_style(sample_frame(stylizer.bundle.style_px, stylizer.bundle.style_px, seed=1))
    frame, stream = sample_frame(*size), FrameStream(stylizer)

    def step() -> Mapping[str, float]:
        (packet,) = stream.run([FramePacket(frame)])
        return packet.stages_ms

    return step


def diffusers_step(
    bundle: Bundle,
    steps: int,
    size: Size,
    guidance: float | None = None,
    **how: Any,
) -> Step:
    """The same frame, style and weights through `DiffusersLoop`; takes its arguments."""
    from std_rt.evaluation.diffusers_baseline import DiffusersLoop

    loop = DiffusersLoop(bundle, steps, size, guidance, **how)
    loop.set_style(sample_frame(bundle.style_px, bundle.style_px, seed=1))
    frame = sample_frame(*size)
    return lambda: stage_times(lambda mark: loop.step(frame, mark=mark))


def measure(steps: dict[str, Step], frames: int, warmup: int, *, silent: bool = False) -> dict[str, Timing]:
    """Time ``frames`` calls of every step after ``warmup`` uncounted ones, a few calls of each in turn.

    ``silent`` shows no progress bar.
    """
    taken: dict[str, list[dict[str, float]]] = {title: [] for title in steps}
    console = Console(stderr=True)
    turns = [warmup] + [min(_TURN, frames - done) for done in range(0, frames, _TURN)]
    rounds = [(title, count, i) for i, count in enumerate(turns) for title in steps]
    for title, count, i in track(
        rounds, "timing", console=console, transient=True, disable=silent or not console.is_terminal
    ):
        again = 1 if i and len(steps) > 1 else 0  # the other runs have filled the caches
        for k in range(again + count):
            begun = time.perf_counter()
            stages = steps[title]()
            total = (time.perf_counter() - begun) * 1000
            if i and k >= again:
                taken[title].append({**stages, "total": total})
    return {title: Timing.of(rows) for title, rows in taken.items()}


def run(settings: Settings) -> None:
    """Measure, then print a table and one JSON line."""
    if settings.against:
        what = f"--against {settings.against[0]}"
        require(what, "export", "torch", "diffusers", "transformers", "safetensors")
    typer.echo(str(describe_machine()))
    with load(settings) as stylizer:
        size = _size(stylizer)
        steps = {"std-rt": stream_step(stylizer, size)}
        steps["std-rt"]()
        peak_mb = peak_memory_mb()  # before torch adds its own
        titles = {name: title_of(name, stylizer.backend) for name in settings.against}
        steps |= {name: _against(stylizer, size, name) for name in settings.against}
        timings = measure(steps, settings.frames, settings.warmup)
        ours = timings.pop("std-rt")
        result = _result(stylizer, size, ours, peak_mb)
    if timings:
        result["against"] = {
            name: timing.as_dict() | {"title": titles[name], "ratio": round(ours.fps / timing.fps, 2)}
            for name, timing in timings.items()
        }
    titled = {titles[name]: timing for name, timing in timings.items()}
    _print(result, {f"std-rt ({result['backend']}, {result['precision']})": ours, **titled})


def load(settings: Settings, *, live: bool = False) -> Stylizer:
    """The stylizer that the settings name."""
    bundle = load_bundle(settings.bundle)
    return Stylizer.load(
        bundle,
        backend=settings.backend,
        size=settings.size,
        steps=settings.steps,
        precision=settings.precision,
        vae=bundle.choose_vae(settings.vae, live=live),
    )


def _size(stylizer: Stylizer) -> Size:
    side = stylizer.size
    return stylizer.working_size(*((side, side) if isinstance(side, int) else side))


def title_of(name: str, backend: str) -> str:
    """What one of `AGAINST` runs in beside a backend, for people."""
    on_gpu, how = backend in GPU_BACKENDS, "torch.compile" if name == "compile" else "eager"
    return f"diffusers ({how} {_against_precision(name, backend)}{', GPU' if on_gpu else ''})"


def _against_precision(name: str, backend: str) -> str:
    if backend in GPU_BACKENDS:
        return "fp16"
    # Compiled at its best: processors without bf16 units emulate it, several times slower than fp32.
    if name == "compile" and fastest_arithmetic(describe_machine())[0] == "bf16":
        return "bf16"
    return "fp32"


def _against(stylizer: Stylizer, size: Size, name: str) -> Step:
    """The step of one of `AGAINST`, where std-rt runs: on the GPU too if the backend is for GPUs."""
    on_gpu = stylizer.backend in GPU_BACKENDS
    compiled = name == "compile"
    how = {"precision": _against_precision(name, stylizer.backend), "compiled": compiled}
    step = diffusers_step(
        stylizer.bundle,
        stylizer.steps,
        size,
        stylizer.guidance.scale,
        **how,
        device="cuda" if on_gpu else "cpu",
    )
    slow = " (compiling takes a minute or two)" if compiled else ""
    with Console(stderr=True).status(f"{title_of(name, stylizer.backend)}: first frame{slow}"):
        try:
            step()
        except RuntimeError as error:
            if not compiled:
                raise
            raise UsageError(
                f"torch.compile failed, leave --against compile out: {one_line(error, 200)}"
            ) from None
    return step


def run_first_frame(settings: Settings) -> None:
    """Time from process start to the first frame, in new processes with warm engine caches."""
    asked = {
        name: getattr(settings, name) for name in ("bundle", "size", "steps", "backend", "precision", "vae")
    }
    code = "import sys; from std_rt.evaluation.bench import first_frame; first_frame(sys.argv[1])"
    seconds, told = [], {}
    for _ in range(_STARTS + 1):  # the first one fills the cache
        begun = time.time()
        command = [sys.executable, "-c", code, json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        if done.returncode:
            reasons = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
            raise UsageError(f"no first frame: {reasons[-1]}")
        told = json.loads(done.stdout.splitlines()[-1])
        seconds.append(told.pop("at") - begun)
    median = float(np.median(seconds[1:]))
    typer.echo(f"first frame {median:.2f} s after process start, {seconds[0]:.2f} s the first time")
    typer.echo(json.dumps({"first_frame_s": round(median, 3), "cold_s": round(seconds[0], 3), **told}))


def first_frame(asked: str) -> None:
    """In the timed process: stylize a frame; print JSON of when (``at``, seconds since 1970) and by what."""
    given = json.loads(asked)
    size = given.pop("size")
    with load(Settings(size=tuple(size) if isinstance(size, list) else size, **given)) as stylizer:
        stream_step(stylizer, _size(stylizer))()
        typer.echo(json.dumps({"at": time.time(), **_facts(stylizer, _size(stylizer))}))


def _result(stylizer: Stylizer, size: Size, timing: Timing, peak_mb: float | None) -> dict[str, Any]:
    return {
        **timing.as_dict(),
        "outside_engines": round(timing.outside, 4),
        "peak_memory_mb": None if peak_mb is None else round(peak_mb, 1),
        **_facts(stylizer, size),
    }


def _facts(stylizer: Stylizer, size: Size) -> dict[str, Any]:
    return {
        "bundle": stylizer.bundle.name,
        "digest": stylizer.bundle.digest,
        "backend": stylizer.backend,
        "precision": stylizer.precision,
        "precision_reason": stylizer.precision_reason,
        "size": [size[1], size[0]],
        "steps": stylizer.steps,
        "vae": stylizer.vae,
        "machine": str(describe_machine()),
    }


def _print(result: dict[str, Any], timings: dict[str, Timing]) -> None:
    width, height = result["size"]
    typer.echo(f"{result['bundle']}, {width}x{height}, {result['steps']} steps, batch 1")
    typer.echo(result["precision_reason"])
    table = Table(box=None, pad_edge=False)
    table.add_column("ms per frame")
    for name in timings:
        table.add_column(f"{name}\nmedian", justify="right")
        table.add_column("\np95", justify="right")
    for stage in dict.fromkeys((*STAGES[:-1], *WHOLE_FRAME)):
        both = [values.get(stage) for each in timings.values() for values in (each.median_ms, each.p95_ms)]
        if any(ms is not None for ms in both):
            cells = ("-" if ms is None else f"{ms:.2f}" for ms in both)
            table.add_row(stage, *cells, style="bold" if stage == "total" else "")
    rates = [cell for timing in timings.values() for cell in (f"{timing.fps:.1f}", "")]
    table.add_row("fps", *rates, style="bold")
    Console().print(table)
    if result["peak_memory_mb"] is not None:
        typer.echo(f"peak memory {result['peak_memory_mb']:.0f} MB")
    typer.echo(f"{100 * result['outside_engines']:.1f} % of each frame is spent outside the engines")
    for row in result.get("against", {}).values():
        typer.echo(f"{row['ratio']:.1f}x the frame rate of {row['title']}")
    typer.echo(json.dumps(result))
