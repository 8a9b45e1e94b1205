"""`std-rt bench`: where the time of a frame goes.

Frames of exactly the working size run through `Stylizer.step`, as a stream does. Warm-up frames are not
counted; medians and 95th percentiles are over the rest; fps is 1000 / median of the whole step. What is
compared runs in turn, a few frames each, so that a machine that is slower for a while is so for all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import BundleError, UsageError
from std_rt.core.machine import describe_machine, peak_memory_mb, require
from std_rt.pipeline.stylizer import Stylizer

__all__ = [
    "AGAINST",
    "STAGES",
    "Settings",
    "StageClock",
    "Timing",
    "load",
    "measure",
    "measure_in_turn",
    "run",
    "run_first_frame",
    "sample_frame",
]

STAGES = ("convert", "vae_encoder", "unet", "scheduler", "vae_decoder", "total")
ENGINES = ("vae_encoder", "unet", "vae_decoder")  # stages that are calls of engines
# name -> (title, precision, whether torch.compile)
AGAINST = {
    "diffusers": ("diffusers (eager fp32)", "fp32", False),
    "compile": ("diffusers (torch.compile bf16)", "bf16", True),
}
_TURN = 10  # frames in a row, of what is compared; one more before them is not counted
_STARTS = 3  # processes whose start is timed
Frame = NDArray[np.uint8]
Size = tuple[int, int]  # (H, W) in pixels
Mark = Callable[[str], None]


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


class StageClock:
    """Called with a stage's name when it ends; `finish` ends a frame."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.frames: list[dict[str, float]] = []
        self.start()

    def start(self) -> None:
        """Begin a frame."""
        self._stages: dict[str, float] = defaultdict(float)
        self._begun = self._last = self._now()

    def __call__(self, stage: str) -> None:
        now = self._now()
        self._stages[stage] += (now - self._last) * 1000
        self._last = now

    def finish(self) -> None:
        """End a frame: what each stage took, and the whole, in ms."""
        self.frames.append({**self._stages, "total": (self._now() - self._begun) * 1000})


@dataclass(frozen=True)
class Timing:
    """Milliseconds a frame, by stage; ``outside`` is the share of a frame that no engine takes."""

    median_ms: dict[str, float]
    p95_ms: dict[str, float] = field(default_factory=dict)
    outside: float = 0.0

    @classmethod
    def of(cls, frames: list[dict[str, float]]) -> Timing:
        """Medians and 95th percentiles over frames."""
        columns = {stage: [frame.get(stage, 0.0) for frame in frames] for stage in STAGES}
        median = {stage: float(np.median(values)) for stage, values in columns.items()}
        p95 = {stage: float(np.percentile(values, 95)) for stage, values in columns.items()}
        shares = [1 - sum(frame.get(stage, 0.0) for stage in ENGINES) / frame["total"] for frame in frames]
        return cls(median, p95, float(np.median(shares)))

    @property
    def fps(self) -> float:
        """Frames a second at the median."""
        return 1000 / self.median_ms["total"]


def sample_frame(height_px: int, width_px: int, seed: int = 0) -> Frame:
    """A frame with soft shapes and some grain; content does not change the time."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height_px, :width_px]
    waves = [
        np.sin(x / rng.uniform(5, 60) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(5, 60)) for _ in range(3)
    ]
    noisy = np.stack(waves, -1) * 90 + 128 + rng.normal(0, 6, (height_px, width_px, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


Step = Callable[[Mark], Any]


def measure(step: Step, frames: int, warmup: int, *, silent: bool = False) -> Timing:
    """Time ``step(mark)`` for ``frames`` calls after ``warmup`` uncounted ones; ``silent`` shows no bar."""
    return measure_in_turn({"": step}, frames, warmup, silent=silent)[""]


def measure_in_turn(
    steps: dict[str, Step], frames: int, warmup: int, *, silent: bool = False
) -> dict[str, Timing]:
    """Time every step for ``frames`` calls after ``warmup`` uncounted ones, a few calls of each in turn."""
    clocks = {title: StageClock() for title in steps}
    console = Console(stderr=True)
    turns = [warmup] + [min(_TURN, frames - done) for done in range(0, frames, _TURN)]
    rounds = [(title, count, i) for i, count in enumerate(turns) for title in steps]
    for title, count, i in track(
        rounds, "timing", console=console, transient=True, disable=silent or not console.is_terminal
    ):
        again = 1 if i and len(steps) > 1 else 0  # the others have filled the caches meanwhile
        for k in range(again + count):
            clocks[title].start()
            steps[title](clocks[title])
            if i and k >= again:
                clocks[title].finish()
    return {title: Timing.of(clock.frames) for title, clock in clocks.items()}


def run(settings: Settings) -> None:
    """Measure, print a table for people, and one JSON line for programs."""
    if settings.against:
        what = f"--against {settings.against[0]}"
        require(what, "export", "torch", "diffusers", "transformers", "safetensors")
    typer.echo(str(describe_machine()))
    with load(settings) as stylizer:
        size = _size(stylizer)
        steps = {"std-rt": _our_step(stylizer, size)}
        steps["std-rt"](lambda stage: None)
        peak_mb = peak_memory_mb()  # before torch adds its own
        for name in settings.against:
            steps[AGAINST[name][0]] = _their_step(stylizer, size, name)
        timings = measure_in_turn(steps, settings.frames, settings.warmup)
        ours = timings.pop("std-rt")
        result = _result(stylizer, size, ours, peak_mb)
    if settings.against:
        theirs = {name: timings[AGAINST[name][0]] for name in settings.against}
        result["against"] = {
            name: _numbers(timing) | {"ratio": round(ours.fps / timing.fps, 2)}
            for name, timing in theirs.items()
        }
    _print(result, {f"std-rt ({result['backend']}, {result['precision']})": ours, **timings})


def load(settings: Settings) -> Stylizer:
    """The stylizer that the settings name."""
    return Stylizer.load(
        settings.bundle,
        backend=settings.backend,
        size=settings.size,
        steps=settings.steps,
        precision=settings.precision,
    )


def _size(stylizer: Stylizer) -> Size:
    asked = stylizer.size
    height, width = (asked, asked) if isinstance(asked, int) else asked
    return stylizer.working_size(height, width)


def _our_step(stylizer: Stylizer, size: Size) -> Step:
    frame = sample_frame(*size)
    stylizer.prepare(*size)
    stylizer.set_style(sample_frame(stylizer.bundle.style_px, stylizer.bundle.style_px, seed=1))
    state = stylizer.state(*size)
    return lambda mark: stylizer.step(frame, state, mark=mark)


def _their_step(stylizer: Stylizer, size: Size, name: str) -> Step:
    from std_rt.evaluation.diffusers_baseline import DiffusersLoop

    title, precision, compiled = AGAINST[name]
    bundle = _in_float(stylizer.bundle)
    loop = DiffusersLoop(
        bundle, stylizer.steps, size, stylizer.guidance.scale, precision=precision, compiled=compiled
    )
    frame = sample_frame(*size)
    loop.set_style(sample_frame(bundle.style_px, bundle.style_px, seed=1))
    console = Console(stderr=True)
    with console.status(f"{title}: first frame" + (" (compiles for a minute or two)" if compiled else "")):
        loop.step(frame)
    return lambda mark: loop.step(frame, mark=mark)


def _in_float(bundle: Bundle) -> Bundle:
    """The bundle itself, or the one that a bundle in int8 was made from: torch runs no int8 graphs."""
    if "quantized" not in bundle.manifest:
        return bundle
    source = bundle.manifest["quantized"]["from"]
    try:
        found = load_bundle(source["name"])
    except BundleError as error:
        raise UsageError(f"--against needs the bundle that '{bundle.name}' was made from: {error}") from error
    if found.digest != source["digest"]:
        raise UsageError(
            f"--against needs the bundle that '{bundle.name}' was made from, and {found.path} is another; "
            f"give -b {found.path}, or quantize it again"
        )
    return found


def run_first_frame(settings: Settings) -> None:
    """Time from process start to the first frame, with a warm engine store, in new processes."""
    asked = {name: getattr(settings, name) for name in ("bundle", "size", "steps", "backend", "precision")}
    code = "import sys; from std_rt.evaluation.bench import first_frame; first_frame(sys.argv[1])"
    seconds = []
    for _ in range(_STARTS + 1):  # the first one fills the store
        begun = time.time()
        command = [sys.executable, "-c", code, json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        if done.returncode:
            raise UsageError(f"no first frame: {done.stderr.strip().splitlines()[-1]}")
        seconds.append(float(done.stdout.split()[-1]) - begun)
    median = float(np.median(seconds[1:]))
    typer.echo(f"first frame {median:.2f} s after process start, {seconds[0]:.2f} s the first time")
    typer.echo(json.dumps({**asked, "first_frame_s": round(median, 3), "cold_s": round(seconds[0], 3)}))


def first_frame(asked: str) -> None:
    """In the process that is timed: stylize one frame, and print when it was there (seconds since 1970)."""
    given = json.loads(asked)
    size = given.pop("size")
    with load(Settings(size=tuple(size) if isinstance(size, list) else size, **given)) as stylizer:
        at = _size(stylizer)
        _our_step(stylizer, at)(lambda stage: None)
        typer.echo(repr(time.time()))


def _numbers(timing: Timing) -> dict[str, Any]:
    return {
        "fps": round(timing.fps, 2),
        "stages_ms": {stage: round(value, 3) for stage, value in timing.median_ms.items()},
        "p95_ms": {stage: round(value, 3) for stage, value in timing.p95_ms.items()},
    }


def _result(stylizer: Stylizer, size: Size, timing: Timing, peak_mb: float | None) -> dict[str, Any]:
    return {
        **_numbers(timing),
        "outside_engines": round(timing.outside, 4),
        "peak_memory_mb": None if peak_mb is None else round(peak_mb, 1),
        "bundle": stylizer.bundle.name,
        "digest": stylizer.bundle.digest,
        "backend": stylizer.backend,
        "precision": stylizer.precision,
        "size": [size[1], size[0]],
        "steps": stylizer.steps,
        "machine": str(describe_machine()),
    }


def _print(result: dict[str, Any], timings: dict[str, Timing]) -> None:
    width, height = result["size"]
    typer.echo(f"{result['bundle']}, {width}x{height}, {result['steps']} steps, batch 1")
    table = Table(box=None, pad_edge=False)
    table.add_column("ms a frame")
    for name in timings:
        table.add_column(f"{name}\nmedian", justify="right")
        table.add_column("\np95", justify="right")
    for stage in STAGES:
        cells = [
            f"{values[stage]:.2f}"
            for timing in timings.values()
            for values in (timing.median_ms, timing.p95_ms)
        ]
        table.add_row(stage, *cells, style="bold" if stage == "total" else "")
    table.add_row(
        "fps", *[cell for timing in timings.values() for cell in (f"{timing.fps:.1f}", "")], style="bold"
    )
    Console().print(table)
    if result["peak_memory_mb"] is not None:
        typer.echo(f"peak memory {result['peak_memory_mb']:.0f} MB")
    typer.echo(f"outside the engines {100 * result['outside_engines']:.1f} % of a frame")
    for name, row in result.get("against", {}).items():
        typer.echo(f"{row['ratio']:.1f} times the frames of {AGAINST[name][0]}")
    typer.echo(json.dumps(result))
