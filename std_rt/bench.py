"""`std-rt bench`: where the time of a frame goes.

Frames of exactly the working size run through `Stylizer.step`, as a stream does. Warm-up frames are not
counted; medians and 95th percentiles are over the rest; fps is 1000 / median of the whole step.
"""

from __future__ import annotations

import json
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

from std_rt.bundle import Bundle
from std_rt.machine import describe_machine, peak_memory_mb, require
from std_rt.stylizer import Stylizer

__all__ = ["STAGES", "Settings", "StageClock", "Timing", "measure", "run", "sample_frame"]

STAGES = ("convert", "vae_encoder", "unet", "scheduler", "vae_decoder", "total")
Frame = NDArray[np.uint8]
Size = tuple[int, int]  # (H, W) in pixels
Mark = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """``size`` is a side or (H, W) in pixels; None means the bundle's own."""

    bundle: str | None = None
    size: int | Size | None = None
    steps: int | None = None
    backend: str = "auto"
    precision: str = "auto"
    frames: int = 60
    warmup: int = 10
    against_diffusers: bool = False


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
    """Milliseconds a frame, by stage."""

    median_ms: dict[str, float]
    p95_ms: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, frames: list[dict[str, float]]) -> Timing:
        """Medians and 95th percentiles over frames."""
        columns = {stage: [frame.get(stage, 0.0) for frame in frames] for stage in STAGES}
        median = {stage: float(np.median(values)) for stage, values in columns.items()}
        return cls(median, {stage: float(np.percentile(values, 95)) for stage, values in columns.items()})

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


def measure(step: Callable[[Mark], Any], frames: int, warmup: int, title: str = "") -> Timing:
    """Time ``step(mark)`` for ``frames`` calls after ``warmup`` uncounted ones."""
    clock = StageClock()
    console = Console(stderr=True)
    for _ in track(
        range(frames + warmup), title, console=console, transient=True, disable=not console.is_terminal
    ):
        clock.start()
        step(clock)
        clock.finish()
    return Timing.of(clock.frames[warmup:])


def run(settings: Settings) -> None:
    """Measure, print a table for people, and one JSON line for programs."""
    if settings.against_diffusers:
        require("--against diffusers", "export", "torch", "diffusers", "transformers", "safetensors")
    typer.echo(str(describe_machine()))
    loaded = Stylizer.load(
        settings.bundle,
        backend=settings.backend,
        size=settings.size,
        steps=settings.steps,
        precision=settings.precision,
    )
    with loaded as stylizer:
        size = _size(stylizer)
        timing = _measure_stylizer(stylizer, size, settings)
        result = _result(stylizer, size, timing)
        bundle, steps = stylizer.bundle, stylizer.steps
    timings = {f"std-rt ({result['backend']}, {result['precision']})": timing}
    if settings.against_diffusers:
        theirs = _measure_diffusers(bundle, steps, size, settings)
        timings["diffusers (eager fp32)"] = theirs
        result |= {"diffusers": _numbers(theirs), "ratio": round(timing.fps / theirs.fps, 2)}
    _print(result, timings)


def _size(stylizer: Stylizer) -> Size:
    asked = stylizer.size
    height, width = (asked, asked) if isinstance(asked, int) else asked
    return stylizer.working_size(height, width)


def _measure_stylizer(stylizer: Stylizer, size: Size, settings: Settings) -> Timing:
    frame = sample_frame(*size)
    stylizer.prepare(*size)
    stylizer.set_style(sample_frame(stylizer.bundle.style_px, stylizer.bundle.style_px, seed=1))
    state = stylizer.state(*size)
    return measure(
        lambda mark: stylizer.step(frame, state, mark=mark), settings.frames, settings.warmup, "std-rt"
    )


def _measure_diffusers(bundle: Bundle, steps: int, size: Size, settings: Settings) -> Timing:
    from std_rt.baseline import DiffusersLoop

    loop = DiffusersLoop(bundle, steps, size)
    frame = sample_frame(*size)
    loop.set_style(sample_frame(bundle.style_px, bundle.style_px, seed=1))
    return measure(lambda mark: loop.step(frame, mark=mark), settings.frames, settings.warmup, "diffusers")


def _numbers(timing: Timing) -> dict[str, Any]:
    return {
        "fps": round(timing.fps, 2),
        "stages_ms": {stage: round(value, 3) for stage, value in timing.median_ms.items()},
        "p95_ms": {stage: round(value, 3) for stage, value in timing.p95_ms.items()},
    }


def _result(stylizer: Stylizer, size: Size, timing: Timing) -> dict[str, Any]:
    peak = peak_memory_mb()
    return {
        **_numbers(timing),
        "peak_memory_mb": None if peak is None else round(peak, 1),
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
    if "ratio" in result:
        typer.echo(f"{result['ratio']:.1f} times the frames of diffusers")
    typer.echo(json.dumps(result))
