"""`std-rt bench --live`: latency of a live session on a generated clip used as the camera.

A clip of 640 x 480 px and 30 fps plays in real time through a live session; its frames are decoded and
stylized but not shown, and the style changes with a crossfade every few seconds. The last line printed is
the report of `std_rt.live.metrics`.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from std_rt.core.machine import describe_machine
from std_rt.evaluation.bench import Settings as EngineSettings
from std_rt.evaluation.bench import load
from std_rt.examples import styles, write_moving
from std_rt.live.session import Session, Settings
from std_rt.live.style_mixer import StyleMixer
from std_rt.media.camera.camera import open_source

__all__ = ["Plan", "run"]

_CLIP_FRAMES, _CLIP_FPS = 300, 30
_STYLES = ("ink", "stained_glass", "swirls")
_TICK_S = 0.02


@dataclass(frozen=True)
class Plan:
    """``seconds`` from the first frame; ``switch_s`` between style changes, 0: none."""

    seconds: float = 20.0
    switch_s: float = 5.0
    crossfade_s: float = 1.0


def run(engine: EngineSettings, live: Settings, plan: Plan) -> None:
    """Play, then print a table and one JSON line."""
    typer.echo(str(describe_machine()))
    report = _play(engine, live, plan)
    _print(report)
    typer.echo(json.dumps(report | {"machine": str(describe_machine())}))


def _play(engine: EngineSettings, live: Settings, plan: Plan) -> dict[str, Any]:
    console = Console(stderr=True)
    with ExitStack() as stack:
        clip = Path(stack.enter_context(TemporaryDirectory())) / "moving.mp4"
        with console.status("rendering a clip"):
            write_moving(clip, _CLIP_FRAMES, fps=_CLIP_FPS)
        source = stack.enter_context(closing(open_source(str(clip))))
        stylizer = stack.enter_context(load(engine, live=True))
        mixer = stack.enter_context(closing(StyleMixer(stylizer.encode_style, stylizer.bundle)))
        pictures = styles(stylizer.bundle.style_px)
        for name in _STYLES:
            mixer.add(pictures[name], name)
        session = stack.enter_context(Session(stylizer, source, mixer, live))
        with console.status(f"playing for {plan.seconds:g} s"):
            _present(session, mixer, plan)
        return session.report() | {"precision": stylizer.precision}


def _present(session: Session, mixer: StyleMixer, plan: Plan) -> None:
    """Take frames as they come and change the style at intervals, until the time is up."""
    end = switch = float("inf")
    while not session.over and time.perf_counter() < end:
        packet = session.get(_TICK_S)
        if packet is None:
            continue
        session.presented(packet)
        now = time.perf_counter()
        if end == float("inf"):
            end, switch = now + plan.seconds, now + (plan.switch_s or float("inf"))
        if now >= switch:
            switch += plan.switch_s
            session.metrics.style_asked()
            mixer.step(1, plan.crossfade_s)


def _print(report: dict[str, Any]) -> None:
    settings, switch = report["settings"], report["style_switch_ms"]
    width, height = settings["size"]
    batching = "stream batch" if settings["stream_batch"] else "one by one"
    typer.echo(
        f"{settings['bundle']}, {width}x{height}, {settings['steps']} steps, {batching}, "
        f"temporal {settings['temporal']}"
    )
    latency, interval = (
        " / ".join(str(report[name][share]) for share in ("p50", "p95", "p99"))
        for name in ("latency_ms", "interval_ms")
    )
    rows = {
        "fps": report["fps"],
        "latency p50 / p95 / p99 ms": latency,
        "interval p50 / p95 / p99 ms": interval,
        "drops / skips / stalls": f"{report['drops']} / {report['skips']} / {report['stalls']}",
        "style switch p50 / worst ms": f"{switch['p50']} / {switch['worst']}",
        "warping error": report["warping_error"],
        "sharpness beside the clip": report["sharpness"],
        "peak memory MB": report["peak_memory_mb"],
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, "-" if value is None else str(value))
    Console().print(table)
