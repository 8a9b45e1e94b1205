"""Log, progress, TensorBoard and curves of a run, and where its time goes.

``log.jsonl`` holds computed values only, no timing, so that equal runs have equal logs, byte for byte,
however often one was killed; timings are in ``timing.jsonl``.
"""

from __future__ import annotations

import json
import math
import numbers
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from std_rt.core.errors import RecipeError
from std_rt.training.run.checkpoint import whole_file
from std_rt.training.run.sheet import Series, save_curve, save_histogram

__all__ = ["Report", "Stopwatch", "histogram_bars"]

Values = Mapping[str, float]
Counts = Sequence[float] | npt.NDArray[Any]
BARS = "·▁▂▃▄▅▆▇█"
ASCII_BARS = "_.:-=+*%#"
NO_CURVE = {"step", "learning_rate", "gradient", "held_out_psnr_db"}
PACE_POINTS = 20  # the pace is that between the last so many calls


# --- lines of JSON --------------------------------------------------------------------------------------


def _plain(value: float) -> float | int | None:
    """6 significant digits; None if it is not finite, which JSON cannot express."""
    if isinstance(value, numbers.Integral):
        return int(value)
    rounded = float(f"{float(value):.6g}")
    return rounded if math.isfinite(rounded) else None


def _append(path: Path, step: int, values: Values) -> None:
    row = {name: _plain(value) for name, value in values.items()} | {"step": step}
    try:
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row, sort_keys=True) + "\n")
    except OSError as error:
        raise _unwritten(path, error) from None


def _unwritten(path: Path, error: OSError) -> RecipeError:
    return RecipeError(
        f"{path} could not be written ({error.strerror or error}): the disk may be full; the last "
        "checkpoint is intact; free some room and run the same command again"
    )


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of a log; None if a kill left half of one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None


def _cut(path: Path, step: int) -> None:
    """Drop torn lines and those of steps after ``step``, where the run continues."""
    if not path.exists():
        return
    before = path.read_bytes()
    rows = ((line, _row(line)) for line in before.split(b"\n"))
    after = b"".join(line + b"\n" for line, row in rows if row is not None and row["step"] <= step)
    if after != before:
        with whole_file(path) as partial:
            partial.write_bytes(after)


# --- progress -------------------------------------------------------------------------------------------


def histogram_bars(counts: Counts, bins: int = 12, *, ascii_only: bool = False) -> str:
    """Counts as ``bins`` small bars (fewer if there are fewer counts); a dot for 0.

    Each bar is the mean of its share of the counts, so that even counts give even bars.
    """
    if not len(counts):
        return ""
    parts = [part.mean() for part in np.array_split(np.asarray(counts, float), min(bins, len(counts)))]
    top, levels = max(parts), ASCII_BARS if ascii_only else BARS
    return "".join(levels[math.ceil(8 * part / top) if top > 0 else 0] for part in parts)


def _unheard() -> AbstractContextManager[None]:
    """Around what is said: training goes on where the terminal or the pipe is gone (Rich would exit then)."""
    return suppress(OSError, SystemExit)


class Report:
    """Log, progress, TensorBoard and curves of one run in ``folder``; with ``main=False`` all do nothing.

    Steps are counted from 1 and mean finished ones. ``resume_at``: the step of the checkpoint that the run
    continues from; lines logged after it are dropped, since they are about to be logged again. RecipeError
    if something cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        title: str,
        log_every: int,
        main: bool = True,
        tensorboard: bool = True,
        resume_at: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.total, self.title, self.log_every, self.main = (
            folder, total_steps, title, log_every, main,
        )  # fmt: skip
        self.console, self._clock = console or Console(stderr=True), clock
        self.begin(resume_at)
        self._values: Values = {}
        self._images_per_s = 0.0
        self._counts: list[float] = []
        self._bar: Progress | None = None
        self._writer: Any = None
        if main:
            self._open(resume_at, tensorboard)

    def _open(self, resume_at: int, tensorboard: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _cut(self.log_file, resume_at)
            _cut(self.timing_file, resume_at)
        except OSError as error:
            raise _unwritten(self.log_file, error) from None
        if tensorboard:
            self._writer = self._open_tensorboard(resume_at)
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
                refresh_per_second=4,
            )
            self._task: TaskID = self._bar.add_task(
                self.title, total=self.total, completed=resume_at, note=""
            )
            self._bar.start()

    def _open_tensorboard(self, resume_at: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("no TensorBoard log: the package is not installed (pip install tensorboard)")
            return None
        # What a killed run wrote after its last checkpoint would show as a second curve.
        return SummaryWriter(self.folder / "tensorboard", purge_step=resume_at + 1 if resume_at else None)

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the progress bar and TensorBoard's file; more than once is fine."""
        if self._bar is not None:
            with _unheard():
                self._bar.stop()
            self._bar = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @property
    def log_file(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def timing_file(self) -> Path:
        return self.folder / "timing.jsonl"

    def say(self, text: str) -> None:
        """A line for the user, above the progress bar."""
        if self.main:
            with _unheard():
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def log(self, step: int, values: Values) -> None:
        """A line of log.jsonl. ``values`` must follow from the recipe alone, not from the clock."""
        if self.main:
            _append(self.log_file, step, values)
            self._scalars(step, values)

    def timing(self, step: int, values: Values) -> None:
        """A line of timing.jsonl: speeds and shares (`Stopwatch.summary`), with the time left."""
        if self.main:
            self._images_per_s = values.get("images_per_s", self._images_per_s)
            eta = self._eta_s(step)
            row = {**values} if eta is None else {**values, "eta_s": round(eta)}
            _append(self.timing_file, step, row)
            self._scalars(step, {f"timing/{name}": value for name, value in row.items()})

    def _scalars(self, step: int, values: Values) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def begin(self, step: int) -> None:
        """The time left is counted from here: what came before, a bank or a sheet, comes once."""
        self._pace = deque([(step, self._clock())], maxlen=PACE_POINTS)

    def _eta_s(self, step: int) -> float | None:
        """Seconds to go at the recent pace; None before there is one."""
        if step > self._pace[-1][0]:
            self._pace.append((step, self._clock()))
        (first, began), (last, now) = self._pace[0], self._pace[-1]
        return (now - began) / (last - first) * max(0, self.total - step) if last > first else None

    def progress(self, step: int, values: Values | None = None, histogram: Counts | None = None) -> None:
        """Show how far the run is; without a terminal a plain line every ``log_every`` steps and at the end.

        ``values`` and ``histogram`` (counts, such as visits per t) stay shown until there are new ones.
        """
        if not self.main:
            return
        self._values = self._values if values is None else values
        self._counts = self._counts if histogram is None else [float(count) for count in histogram]
        note = self._note(step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif step % self.log_every == 0 or step >= self.total:
            self.say(f"{self.title}  {step}/{self.total}  {note}")

    def advance(self, step: int) -> None:
        """Move the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def _note(self, step: int) -> str:
        eta = self._eta_s(step)
        parts = [f"{self._images_per_s:.3g} images/s"] if self._images_per_s else []
        parts += [f"{timedelta(seconds=round(eta))} left"] if eta is not None else []
        parts += [f"{name} {value:.4g}" for name, value in self._values.items()]
        if self._counts:
            ascii_only = not self.console.encoding.lower().startswith("utf")
            parts.append(f"t {histogram_bars(self._counts, ascii_only=ascii_only)}")
        return "  ".join(parts)

    def sheet(self, step: int, path: Path, name: str = "sheet") -> None:
        """Show a sheet (an RGB picture that lies at ``path``) in TensorBoard."""
        if self._writer is not None:
            picture = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None, f"{path} is not a picture"
            self._writer.add_image(name, picture[..., ::-1].copy(), step, dataformats="HWC")
            self._writer.flush()

    def curves(self) -> None:
        """Draw all losses of log.jsonl to loss.png."""
        if self.main:
            save_curve(self.folder / "loss.png", self._series(), self.title)

    def _series(self) -> dict[str, Series]:
        """The losses of the log by name, as (steps, values)."""
        series: dict[str, tuple[list[float], list[float]]] = {}
        for line in self.log_file.read_bytes().splitlines() if self.log_file.exists() else ():
            row = _row(line) or {}
            for name, value in row.items():
                if isinstance(value, int | float) and name not in NO_CURVE:
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(row["step"])
                    values.append(value)
        return {**series}

    def histogram(self) -> None:
        """Draw the counts that `progress` was given last to visits.png, if there are any."""
        if self.main and len(self._counts):
            save_histogram(self.folder / "visits.png", self._counts, "visits per t")


# --- where the time goes --------------------------------------------------------------------------------


class HostClock:
    """The time on the CPU: marks of moments, and the seconds between two of them."""

    def mark(self) -> Any:
        """This moment."""
        return time.perf_counter()

    def seconds(self, a: Any, b: Any) -> float:
        """From mark ``a`` to mark ``b``; both are reached."""
        return float(b - a)

    def reached(self, mark: Any) -> bool:
        """Whether the device has come to it; does not wait."""
        return True


class CudaClock(HostClock):
    """The time on the GPU: events in its current stream, which cost the CPU no wait."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, a: torch.cuda.Event, b: torch.cuda.Event) -> float:
        return a.elapsed_time(b) / 1e3

    def reached(self, mark: torch.cuda.Event) -> bool:
        return mark.query()


@dataclass
class _Step:
    """One step: where it began and ended, and the pieces of it that belong to a span."""

    began: Any
    ended: Any = None
    pieces: list[tuple[str, Any, Any]] = field(default_factory=list)


class Stopwatch:
    """Measures named spans within steps::

        watch.start()
        with watch("teacher"): ...
        watch.stop()
        watch.summary(images_per_step=8)

    A span inside another counts for itself only, so that shares add up; outside of steps nothing counts.
    On a GPU the time is the GPU's own, and nothing waits for it.
    """

    def __init__(self, device: torch.device | str = "cpu", *, clock: Any = None) -> None:
        on_gpu = torch.device(device).type == "cuda"
        self.clock = clock or (CudaClock() if on_gpu else HostClock())
        self._step: _Step | None = None
        self._open: list[str] = []
        self._since: Any = None
        self._done: deque[_Step] = deque()

    def start(self) -> None:
        """A step begins; one that was not stopped is forgotten."""
        self._since = self.clock.mark()
        self._step, self._open = _Step(self._since), []

    def stop(self) -> None:
        """The step ends; without one, nothing happens."""
        if self._step is not None:
            self._step.ended = self.clock.mark()
            self._done.append(self._step)
            self._step = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._step is None:
            yield
            return
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """The innermost open span's piece ends here, and another's begins."""
        now = self.clock.mark()
        if self._step is not None and self._open:
            self._step.pieces.append((self._open[-1], self._since, now))
        self._since = now

    def summary(self, images_per_step: int = 0) -> dict[str, float]:
        """Of the steps since the last call that the device has finished; empty if there are none.

        ``step_s``; ``images_per_s``; ``share_<name>`` of the time, ``share_overhead`` (what no span
        accounts for) and ``overhead_to_spans``. Steps still running on the GPU come with the next call.
        """
        total, count, spans = 0.0, 0, dict[str, float]()
        while self._done and self.clock.reached(self._done[0].ended):
            step = self._done.popleft()
            total, count = total + self.clock.seconds(step.began, step.ended), count + 1
            for name, a, b in step.pieces:
                spans[name] = spans.get(name, 0.0) + self.clock.seconds(a, b)
        return _shares(total, count, spans, images_per_step) if total > 0 else {}


def _shares(total: float, count: int, spans: dict[str, float], images_per_step: int) -> dict[str, float]:
    inside = sum(spans.values())
    overhead = max(0.0, total - inside)
    values = {"step_s": total / count}
    if images_per_step:
        values["images_per_s"] = images_per_step * count / total
    values |= {f"share_{name}": seconds / total for name, seconds in spans.items()}
    values["share_overhead"] = overhead / total
    if inside > 0:
        values["overhead_to_spans"] = overhead / inside
    return values
