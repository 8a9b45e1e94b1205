"""`std-rt bench`: where the time of a frame goes. The last line on stdout is one JSON object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from typer import BadParameter, Option

from std_rt.cli.options import EngineFlags, parse_size

__all__ = ["BenchRequest", "bench"]


@dataclass(frozen=True, kw_only=True)
class BenchRequest(EngineFlags):
    """What ``std-rt bench`` was asked to do. Raises BadParameter for flags that do not fit together."""

    frames: Annotated[int, Option(min=1, help="Frames to time.")] = 60
    warmup: Annotated[int, Option(min=0, help="Warm-up frames, not timed.")] = 10
    against: Annotated[
        list[str] | None,
        Option(metavar="diffusers|compile", help="Also time the same weights in diffusers; repeatable."),
    ] = None
    table: Annotated[
        bool, Option("--table", help="All sizes, steps, precisions and backends; takes a while.")
    ] = False
    first_frame: Annotated[
        bool, Option("--first-frame", help="Seconds from process start to the first frame.")
    ] = False
    live: Annotated[bool, Option("--live", help="Latency of a live session on a 30 fps clip.")] = False
    stream_batch: Annotated[bool, Option("--stream-batch", help="With --live.")] = False
    target_fps: Annotated[float | None, Option(help="With --live.")] = None
    duration: Annotated[float, Option(metavar="SECONDS", min=1, help="With --live.")] = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table + self.first_frame + self.live > 1:
            raise BadParameter("--table, --first-frame and --live are mutually exclusive; give one")
        if self.table and (self.size or self.steps or (self.backend, self.precision) != ("auto", "auto")):
            raise BadParameter(
                "--table measures every size, step count, backend and precision; "
                "leave out --size, --steps, --backend and --precision"
            )
        if not self.live and (self.stream_batch or self.temporal != "off" or self.target_fps):
            raise BadParameter("--stream-batch, --temporal and --target-fps need --live; add it")


def bench(request: BenchRequest) -> None:
    """Time every stage of a frame. The last line of the output is one JSON object."""
    from std_rt.evaluation.bench import AGAINST, Settings, run, run_first_frame

    against = tuple(dict.fromkeys(request.against or ()))
    for name in against:
        if name not in AGAINST:
            raise BadParameter(f"--against must be {' or '.join(AGAINST)}, got {name!r}")
    settings = Settings(
        request.bundle,
        parse_size(request.size),
        request.steps,
        request.backend,
        request.precision,
        request.frames,
        request.warmup,
        against,
        request.vae,
    )
    if request.live:
        from std_rt.evaluation.bench_live import Plan
        from std_rt.evaluation.bench_live import run as run_live
        from std_rt.live.session import Settings as LiveSettings

        how = LiveSettings(
            stream_batch=request.stream_batch, temporal=request.temporal, target_fps=request.target_fps
        )
        run_live(settings, how, Plan(request.duration))
    elif request.table:
        from std_rt.evaluation.bench_table import run_table

        run_table(settings)
    else:
        (run_first_frame if request.first_frame else run)(settings)
