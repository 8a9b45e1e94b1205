"""`std-rt bench --live`: the latency contract on a generated clip that stands in for a camera.

A clip of 640 x 480 px and 30 fps plays in real time; frames are decoded, painted and presented to nobody,
and a style is changed with a crossfade every few seconds. The last line printed is the report of
`Session.metrics`.
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
from std_rt.examples import STYLES
from std_rt.examples.moving import write_moving_scene
from std_rt.live.session import Session, Settings
from std_rt.live.style_mixer import StyleMixer
from std_rt.media.camera.camera import open_source

__all__ = ["Plan", "run"]

_CLIP_FRAMES, _CLIP_FPS = 300, 30
_STYLES = ("ink", "stained_glass", "swirls")
_TICK_S = 0.02


@dataclass(frozen=True)
class Plan:
    """``seconds`` from the first frame; ``switch_s`` between changes of style, 0 for none."""

    seconds: float = 20.0
    switch_s: float = 5.0
    crossfade_s: float = 1.0


def run(engine: EngineSettings, live: Settings, plan: Plan) -> None:
    """Play, print a table for people and one JSON line for programs."""
    typer.echo(str(describe_machine()))
    report = _play(engine, live, plan)
    _print(report)
    typer.echo(json.dumps(report | {"machine": str(describe_machine())}))


def _play(engine: EngineSettings, live: Settings, plan: Plan) -> dict[str, Any]:
    console = Console(stderr=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        clip = folder / "moving.mp4"
        with console.status("drawing a clip"):
            write_moving_scene(clip, _CLIP_FRAMES, fps=_CLIP_FPS)
        source = stack.enter_context(closing(open_source(str(clip))))
        stylizer = stack.enter_context(load(engine))
        deck = stack.enter_context(closing(StyleMixer(stylizer.encode_style, stylizer.bundle)))
        for name in _STYLES:
            deck.add(STYLES[name](stylizer.bundle.style_px), name)
        session = stack.enter_context(Session(stylizer, source, deck, live))
        with console.status(f"playing for {plan.seconds:g} s"):
            _present(session, deck, plan)
        return session.report() | {"precision": stylizer.precision}


def _present(session: Session, deck: StyleMixer, plan: Plan) -> None:
    """Until the time is over: take what comes, change the style when it is time."""
    end = switch = float("inf")
    while not session.over and time.perf_counter() < end:
        shot = session.get(_TICK_S)
        if shot is None:
            continue
        session.presented(shot)
        now = time.perf_counter()
        if end == float("inf"):
            end, switch = now + plan.seconds, now + (plan.switch_s or float("inf"))
        if now >= switch:
            switch += plan.switch_s
            session.metrics.style_asked()
            deck.step(1, plan.crossfade_s)


def _print(report: dict[str, Any]) -> None:
    said = report["settings"]
    width, height = said["size"]
    way = "stream batch" if said["stream_batch"] else "one by one"
    typer.echo(
        f"{said['bundle']}, {width}x{height}, {said['steps']} steps, {way}, temporal {said['temporal']}"
    )
    latency, interval, switch = report["latency_ms"], report["interval_ms"], report["style_switch_ms"]
    rows = {
        "fps": report["fps"],
        "latency p50 / p95 / p99 ms": _three(latency),
        "interval p50 / p95 / p99 ms": _three(interval),
        "drops / skips / stalls": f"{report['drops']} / {report['skips']} / {report['stalls']}",
        "style switch p50 / worst ms": f"{switch['p50']} / {switch['worst']}",
        "warping error": report["warping_error"],
        "peak memory MB": report["peak_memory_mb"],
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, "-" if value is None else str(value))
    Console().print(table)


def _three(figures: dict[str, Any]) -> str:
    return f"{figures['p50']} / {figures['p95']} / {figures['p99']}"
