"""The cache of open runners: one for each size, number of steps and batching mode.

    cache = RunnerCache(open_runner)
    runner = cache.get(RunnerKey(Quality((256, 256), 4)))
    styled = runner.run(frames, conditioning, noise, mark)

Changing to a quality whose runner is open costs nothing. The last runners used stay open, and those named in
`RunnerCache.keep`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Protocol, runtime_checkable
from weakref import ReferenceType, ref

import numpy as np

from std_rt.core.arrays import Array, Frame, Size
from std_rt.core.errors import UsageError
from std_rt.core.schedule import StepCoefficients
from std_rt.engines.hot_swap import HotSwapRunner, close_when_open, has_failed
from std_rt.engines.program import Mark, Runner
from std_rt.media.fit import check_frame
from std_rt.pipeline.conditioning import Conditioning
from std_rt.pipeline.denoise import noise_draws
from std_rt.pipeline.program_builder import CONDITIONING, NEGATIVE, batch_rows
from std_rt.pipeline.stream_program import unet_rows

__all__ = ["MAX_KEPT", "RECENT", "CachedRunner", "Quality", "RunnerCache", "RunnerKey", "Submitted"]

_Part = tuple[Array, int | None]  # an array [1, ...], or a row of a longer one

MAX_KEPT = 8  # runners that `keep` takes
RECENT = 2  # others that stay open: enough for portrait and landscape in turn


@dataclass(frozen=True)
class Quality:
    """What a frame costs: the working ``size`` (H, W) in px, and the denoising ``steps``.

    ``steps`` is a key of the bundle's schedules: one that is cut as in diffusers runs fewer steps than it
    says.
    """

    size: Size
    steps: int


@dataclass(frozen=True)
class RunnerKey:
    """A quality, and how frames share calls: ``frames`` in one call of each graph, or a stream batch.

    ``masked``: latents outside a mask are kept.
    """

    quality: Quality
    frames: int = 1
    stream: bool = False
    masked: bool = False


@dataclass(frozen=True, eq=False)
class Submitted:
    """Frames that a runner was given: ``collect(mark)`` them once. ``running``: they may not be done yet."""

    collect: Callable[[Mark], Frame]
    running: bool


@runtime_checkable
class Submitter(Protocol):
    """A `Runner` that can start a frame and have it collected later."""

    def submit(self, frame: Frame) -> Callable[[Mark], Frame]:
        """See `engines.tensorrt.gpu_runner.GpuRunner`."""


class SlotUser(Protocol):
    """A stream batch, whose frames stay inside a runner between two calls."""

    @property
    def inside(self) -> int:
        """Number of frames inside."""


class CachedRunner:
    """A runner that is open or opening, and its last inputs."""

    def __init__(
        self,
        key: RunnerKey,
        steps: Sequence[StepCoefficients],
        latents: tuple[int, ...],
        mode: str,
        runner: Future[Runner],
    ) -> None:
        """``steps`` and shape of the ``latents`` [C, h, w] of the key's quality; ``mode`` of guidance."""
        self.key = key
        self.draws = noise_draws(steps)
        self._latents = latents
        self.failed = False  # opening failed, and the error was raised to a caller
        self._user: ReferenceType[SlotUser] | None = None
        self._runner = runner
        self._rows = unet_rows(len(steps), mode) if key.stream else batch_rows(key.frames, mode)
        self._separate_negative = mode == "residual" and not key.stream
        self._stochastic = [bool(c.noise) for c in steps]
        self._fed: dict[str, tuple[_Part, ...]] = {}

    @property
    def user(self) -> SlotUser | None:
        """The stream batch whose frames are inside, if it still exists."""
        return None if self._user is None else self._user()

    @user.setter
    def user(self, user: SlotUser) -> None:
        self._user = ref(user)  # a runner must not keep its user alive

    @property
    def holds_frames(self) -> bool:
        """Whether closing it would lose frames."""
        return self.user is not None and self.user.inside > 0

    def check(self, frame: Frame, noise: Array) -> None:
        """Raise UsageError unless frame and noise [K, C, h, w] have this runner's sizes and noise draws."""
        (h, w), shape = self.key.quality.size, (self.draws, *self._latents)
        if check_frame(frame).shape[:2] != (h, w):
            raise UsageError(
                f"the frame is {frame.shape[0]} x {frame.shape[1]} px instead of {h} x {w}; "
                "use fit(frame) first"
            )
        if noise.shape[1:] != self._latents or len(noise) < self.draws:
            raise UsageError(
                f"the state has noise {list(noise.shape)} instead of {list(shape)}; "
                "use state_for(...) with this size and these steps"
            )

    @property
    def done(self) -> bool:
        """Opened, or failed to open."""
        return self._runner.done()

    def when_done(self, call: Callable[[], None]) -> None:
        """Have ``call`` called once `done`, in any thread."""
        self._runner.add_done_callback(lambda _: call())

    def wait(self) -> Runner:
        """Wait for the runner. Raises the error of opening it."""
        try:
            runner = self._runner.result()
            # Once it is the one to stay, the fast runner itself, which may take frames in two halves.
            return runner.settled if isinstance(runner, HotSwapRunner) else runner
        finally:
            self.failed = has_failed(self._runner)

    def run(
        self,
        frames: Frame,
        conditioning: Sequence[Conditioning],
        noise: Sequence[Array],
        mark: Mark,
        masks: Mapping[str, Array] | None = None,
    ) -> Frame:
        """Frames uint8 [B, H, W, 3] in and out; see `submit`."""
        return self.submit(frames, conditioning, noise, mark, masks).collect(mark)

    def submit(
        self,
        frames: Frame,
        conditioning: Sequence[Conditioning],
        noise: Sequence[Array],
        mark: Mark,
        masks: Mapping[str, Array] | None = None,
    ) -> Submitted:
        """Start on frames uint8 [B, H, W, 3]; a ``conditioning`` and ``noise`` [K, ...] per frame or slot.

        A runner that cannot do it in two halves runs them now. ``masks``: the feeds of `Mask.feeds` that the
        program has, [1, ...], for all frames. Inputs made of the same arrays as in the last call are not fed
        again.
        """
        runner = self.wait()
        feeds = self._noise(noise) | self._conditioning(conditioning)
        feeds |= {name: ((array, None),) * len(frames) for name, array in (masks or {}).items()}
        fresh = {name: parts for name, parts in feeds.items() if not _same(parts, self._fed.get(name))}
        if fresh:
            runner.set(**{name: _stack(parts) for name, parts in fresh.items()})
            self._fed.update(fresh)
        if isinstance(runner, Submitter):
            return Submitted(runner.submit(frames), running=True)
        styled = runner.run(frames, mark)
        return Submitted(lambda mark: styled, running=False)

    def close(self) -> None:
        """Close it, now or as soon as it is open."""
        close_when_open(self._runner)

    def _conditioning(self, given: Sequence[Conditioning]) -> dict[str, tuple[_Part, ...]]:
        sides = [given[i].negative if negative else given[i].positive for i, negative in self._rows]
        feeds: dict[str, tuple[_Part, ...]] = {
            name: tuple((side[name], None) for side in sides) for name in CONDITIONING
        }
        for name in NEGATIVE if self._separate_negative else ():
            feeds[f"negative_{name}"] = tuple((each.negative[name], None) for each in given)
        return feeds

    def _noise(self, noise: Sequence[Array]) -> dict[str, tuple[_Part, ...]]:
        if not self.key.stream:
            return {f"noise_{i}": tuple((each, i) for each in noise) for i in range(self.draws)}
        feeds: dict[str, tuple[_Part, ...]] = {"noise_0": ((noise[0], 0),)}
        if any(self._stochastic):
            # The draw of each step; 0, which is not used, if a step has none.
            draws = np.cumsum(self._stochastic) * self._stochastic
            feeds["noise_steps"] = tuple((each, int(i)) for each, i in zip(noise, draws, strict=True))
        return feeds


class RunnerCache:
    """Runners by `RunnerKey`. `ready` may be called from any thread; the rest from one at a time."""

    def __init__(self, open_runner: Callable[[RunnerKey], CachedRunner], recent: int = RECENT) -> None:
        """``open_runner`` starts to open a runner in the background; the ``recent`` used last stay open."""
        self._open_runner, self._recent = open_runner, recent
        self._runners: OrderedDict[RunnerKey, CachedRunner] = OrderedDict()
        self._kept: frozenset[RunnerKey] = frozenset()
        self._lock = Lock()

    def get(self, key: RunnerKey) -> CachedRunner:
        """The runner of ``key``, opening if necessary; the least recently used are closed.

        A runner that failed to open, and whose error was raised, is opened again.
        """
        with self._lock:
            runner = self._runners.get(key)
            if runner is None or runner.failed:
                runner = self._runners[key] = self._open_runner(key)
            self._runners.move_to_end(key)
        self._close_others()
        return runner

    def keep(self, keys: Collection[RunnerKey]) -> None:
        """Begin to open these runners, and keep them open until the next call of `keep`."""
        if len(set(keys)) > MAX_KEPT:
            raise UsageError(f"at most {MAX_KEPT} qualities are kept open, got {len(set(keys))}")
        self._kept = frozenset(keys)
        for key in keys:
            self.get(key)
        self._close_others()

    def ready(self, key: RunnerKey) -> bool:
        """True if a frame would not wait. Raises the error of opening it; the next `get` tries again."""
        with self._lock:
            runner = self._runners.get(key)
        if runner is None or runner.failed or not runner.done:
            return False
        runner.wait()
        return True

    def when_done(self, key: RunnerKey, call: Callable[[], None]) -> None:
        """Have ``call`` called, in any thread, once the runner of ``key`` is open or failed; else at once."""
        with self._lock:
            runner = self._runners.get(key)
        if runner is None:
            call()
        else:
            runner.when_done(call)

    def values(self) -> list[CachedRunner]:
        """All runners, least recently used first."""
        with self._lock:
            return list(self._runners.values())

    def clear(self) -> None:
        """Close all runners."""
        with self._lock:
            closing = list(self._runners.values())
            self._runners.clear()
        for runner in closing:
            runner.close()

    def _close_others(self) -> None:
        """Close runners that are neither kept nor recent and hold no frames."""
        with self._lock:
            others = [key for key in self._runners if key not in self._kept]
            idle = [key for key in others[: -self._recent] if not self._runners[key].holds_frames]
            closing = [self._runners.pop(key) for key in idle]
        for runner in closing:
            runner.close()


def _same(parts: Iterable[_Part], others: Sequence[_Part] | None) -> bool:
    """Whether both consist of the same array objects, which are assumed to have the same values."""
    if others is None:
        return False
    return all(a is b and i == j for (a, i), (b, j) in zip(parts, others, strict=True))


def _stack(parts: Sequence[_Part]) -> Array:
    """[B, ...] of B parts; a single one as it is."""
    arrays = [array if i is None else array[i : i + 1] for array, i in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
