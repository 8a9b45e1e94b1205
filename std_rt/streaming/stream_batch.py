"""The stream batch: N steps of N consecutive frames in one call of the UNet.

    batch = StreamBatch(stylizer, (256, 256))
    for frame in frames:
        results = batch.push(stylizer.fit(frame), state)  # empty until N frames have entered
    results = list(batch.flush())  # the frames still inside

While a GPU runs one call, the next frame can be pushed: then a result is returned one push later, or by
`StreamBatch.collect`. More frames per second, N - 1 frames later (StreamDiffusion, arXiv 2312.12491, section
3.1). A frame keeps the style and the noise it entered with through all its steps, so each comes out as it
does one by one. The launches are in `pipeline.stream_program`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from threading import get_ident

from std_rt.core.arrays import Array, Frame, Size
from std_rt.core.errors import UsageError
from std_rt.engines.program import Mark, no_mark
from std_rt.pipeline.conditioning import Conditioning
from std_rt.pipeline.runner_cache import CachedRunner, Quality, RunnerKey, Submitted
from std_rt.pipeline.stylizer import State, Stylizer

__all__ = ["StreamBatch"]


@dataclass(frozen=True, eq=False)
class _Slot:
    """The inputs a frame entered with."""

    conditioning: Conditioning
    noise: Array


class StreamBatch:
    """Frames of one quality in the slots, one per step.

    For one thread at a time: while frames are inside, another thread is refused, which would get them.
    """

    def __init__(self, stylizer: Stylizer, at: Quality | Size) -> None:
        """``at``: a quality, or a working size (H, W) and the stylizer's steps. Its engines start to open."""
        self._stylizer = stylizer
        self._key = RunnerKey(stylizer.quality_at(at), stream=True)
        stylizer.runner(self._key)
        steps = len(stylizer.bundle.coefficients(self._key.quality.steps))
        self._slots: list[_Slot | None] = [None] * (steps - 1)  # before a run: slot 1 and up
        self._thread = 0  # of the frames inside
        self._newest: _Slot | None = None
        self._last: Frame | None = None
        self._submitted: deque[tuple[Submitted, bool]] = deque()  # with whether a frame comes out of it

    @property
    def inside(self) -> int:
        """Frames that have entered and not come out."""
        return sum(slot is not None for slot in self._slots)

    def push(self, working: Frame, state: State, mark: Mark = no_mark) -> list[Frame]:
        """Take a frame uint8 [H, W, 3] of the working size; the result of the frame N - 1 pushes ago, if any
        and if the engines have it already.

        The current style and noise are used. Raises UsageError if frame or state have another size.
        After an error of the engines, the frames inside are lost.
        """
        with self._stylizer.lock:
            runner = self._stylizer.runner(self._key)
            runner.check(working, state.noise)
            self._claim(runner)
            self._last = working
            self._newest = _Slot(self._stylizer.conditioning(self._key.quality.size), state.noise)
            return self._advance(runner, self._newest, mark)

    def flush(self, mark: Mark = no_mark) -> Iterator[Frame]:
        """The results of the frames still inside, in order; then it is empty and can be used again."""
        while any(self._slots):
            with self._stylizer.lock:
                runner = self._stylizer.runner(self._key)
                self._claim(runner)
                found = self._advance(runner, None, mark)
            yield from found
        yield from self.collect(mark)

    def collect(self, mark: Mark = no_mark) -> list[Frame]:
        """Wait for the call that still runs, if one does: the frame that comes out of it, if any."""
        with self._stylizer.lock:
            return self._collect(mark)

    def _collect(self, mark: Mark, leave: int = 0) -> list[Frame]:
        """The results of all calls but the last ``leave`` that still run."""
        found = []
        while self._submitted and (len(self._submitted) > leave or not self._submitted[0][0].running):
            call, comes_out = self._submitted.popleft()
            slots, self._slots = self._slots, [None] * len(self._slots)
            styled = call.collect(mark)
            self._slots = slots
            found += [styled[0]] if comes_out else []
        return found

    def _advance(self, runner: CachedRunner, entering: _Slot | None, mark: Mark) -> list[Frame]:
        """One call. An empty slot gets the newest frame's inputs, so that nothing is fed for it."""
        assert self._newest is not None
        assert self._last is not None
        slots = [entering, *self._slots]
        rows = [slot or self._newest for slot in slots]
        self._slots = [None] * (len(slots) - 1)
        conditioning, noise = [row.conditioning for row in rows], [row.noise for row in rows]
        masks = self._stylizer.mask_feeds(self._key.quality.size)
        call = runner.submit(self._last[None], conditioning, noise, mark, masks)
        self._slots = slots[:-1]
        self._submitted.append((call, slots[-1] is not None))
        return self._collect(mark, leave=1)

    def _claim(self, runner: CachedRunner) -> None:
        """Take over the runner's slots. Raises UsageError if another stream batch took them and frames are
        lost, or if the frames inside are another thread's."""
        if self.inside and self._thread != get_ident():
            raise UsageError(
                "the frames inside this stream batch are another thread's; give each thread a StreamBatch of "
                "its own, or call flush() in that thread first"
            )
        self._thread = get_ident()
        if runner.user is self:
            return
        lost = self.inside
        self._slots = [None] * len(self._slots)
        if lost:
            raise UsageError(
                f"{lost} frames inside the stream batch are lost: its engines were closed, or another stream "
                "batch of the same size and steps was started; call flush() first"
            )
        runner.user = self
