"""Open runners, by the size, the steps and the way in which frames go through them.

    shelf = RunnerCache(open_layout, in_background)
    opened = shelf.get(RunnerKey(Quality((256, 256), 4)))
    styled = opened.run(frames, told, noise)

A change of level (another size or number of steps of the same bundle) costs nothing where its runner is open
already. Those used last stay open, and those that were asked for by name, until others are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Protocol
from weakref import ReferenceType, ref

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import UsageError
from std_rt.core.schedule import StepCoefficients
from std_rt.engines import Engine
from std_rt.engines.program import Mark, Runner
from std_rt.pipeline.conditioning import Conditioning
from std_rt.pipeline.denoise import noise_draws
from std_rt.pipeline.program_builder import CONDITIONING, NEGATIVE, batch_rows
from std_rt.pipeline.stream_program import unet_rows

__all__ = ["KEPT", "CachedRunner", "Quality", "RunnerCache", "RunnerKey", "User", "close_when_open"]

Frame = NDArray[np.uint8]
Array = NDArray[np.float32]
Size = tuple[int, int]  # (H, W) in pixels
_Part = tuple[Array, int | None]  # an array [1, ...], or a row of a longer one

KEPT = 8  # levels that can be asked for by name
_USED_LAST = 2  # others that stay open: enough for portrait and landscape in turn


@dataclass(frozen=True)
class Quality:
    """What a frame costs: the working ``size`` (H, W) in px, and denoising ``steps``.

    Steps are counted as the bundle does: a schedule as diffusers has it, entered at a strength below 1, runs
    fewer of them than it is named after.
    """

    size: Size
    steps: int


@dataclass(frozen=True)
class RunnerKey:
    """A level, and how frames go through it: ``frames`` in a call of each graph, or as a stream batch."""

    level: Quality
    frames: int = 1
    stream: bool = False


class User(Protocol):
    """Whoever has frames inside a runner from call to call: a stream batch."""

    @property
    def inside(self) -> int:
        """How many."""


class CachedRunner:
    """A runner that is open or being opened, and what it was fed last."""

    def __init__(
        self, layout: RunnerKey, coefficients: Sequence[StepCoefficients], mode: str, runner: Future[Runner]
    ) -> None:
        """``mode`` of guidance; ``coefficients`` of the layout's steps."""
        self.layout = layout
        self.draws = noise_draws(coefficients)
        self._user: ReferenceType[User] | None = None
        self._runner = runner
        self._rows = unet_rows(len(coefficients), mode) if layout.stream else batch_rows(layout.frames, mode)
        self._apart = mode == "residual" and not layout.stream  # the negative has feeds of its own
        self._stochastic = [bool(c.noise) for c in coefficients]
        self._fed: dict[str, tuple[_Part, ...]] = {}
        self.failed = False  # and whoever waited for it knows

    @property
    def user(self) -> User | None:
        """Whose frames are inside, if anybody's who is still there."""
        return None if self._user is None else self._user()

    @user.setter
    def user(self, user: User) -> None:
        self._user = ref(user)  # a runner must not keep alive whoever used it

    @property
    def done(self) -> bool:
        """Opened, or failed to."""
        return self._runner.done()

    def runner(self) -> Runner:
        """Waits until it is open. What opening it raised is raised."""
        try:
            return self._runner.result()
        finally:
            self.failed = self._runner.done() and (
                self._runner.cancelled() or self._runner.exception() is not None
            )

    def run(self, frames: Frame, told: Sequence[Conditioning], noise: Sequence[Array], mark: Mark) -> Frame:
        """Frames uint8 [B, H, W, 3] in and out. ``told`` and ``noise`` [K, ...]: one each a frame or slot.

        What is made of the same arrays as at the last call is not fed again.
        """
        runner = self.runner()
        feeds = self._noise(noise) | self._conditioning(told)
        fresh = {name: parts for name, parts in feeds.items() if not _same(parts, self._fed.get(name))}
        if fresh:
            runner.set(**{name: _stack(parts) for name, parts in fresh.items()})
            self._fed.update(fresh)
        return runner.run(frames, mark)

    def close(self) -> None:
        """Now, or as soon as it is open."""
        close_when_open(self._runner)

    def _conditioning(self, told: Sequence[Conditioning]) -> dict[str, tuple[_Part, ...]]:
        sides = [told[i].negative if negative else told[i].positive for i, negative in self._rows]
        feeds: dict[str, tuple[_Part, ...]] = {
            name: tuple((side[name], None) for side in sides) for name in CONDITIONING
        }
        for name in NEGATIVE if self._apart else ():
            feeds[f"negative_{name}"] = tuple((each.negative[name], None) for each in told)
        return feeds

    def _noise(self, noise: Sequence[Array]) -> dict[str, tuple[_Part, ...]]:
        if not self.layout.stream:
            return {f"noise_{i}": tuple((each, i) for each in noise) for i in range(self.draws)}
        feeds: dict[str, tuple[_Part, ...]] = {"noise_0": ((noise[0], 0),)}
        if any(self._stochastic):
            draws = np.cumsum(self._stochastic) * self._stochastic  # of each step; 0, read in vain, for none
            feeds["noise_steps"] = tuple((each, int(i)) for each, i in zip(noise, draws, strict=True))
        return feeds


class RunnerCache:
    """Runners by `RunnerKey`. `ready` may be asked from any thread; the rest is for one at a time."""

    def __init__(self, open_layout: Callable[[RunnerKey], CachedRunner]) -> None:
        """``open_layout`` begins to open one in the background."""
        self._open_layout = open_layout
        self._opened: OrderedDict[RunnerKey, CachedRunner] = OrderedDict()
        self._asked: frozenset[RunnerKey] = frozenset()
        self._lock = Lock()

    def get(self, layout: RunnerKey) -> CachedRunner:
        """That of ``layout``, opening in the background where it is not; those used longest ago are closed.

        One that failed, and whose failure was raised, is opened again.
        """
        with self._lock:
            opened = self._opened.get(layout)
            if opened is None or opened.failed:
                opened = self._opened[layout] = self._open_layout(layout)
            self._opened.move_to_end(layout)
        self._close_others()
        return opened

    def keep(self, layouts: Collection[RunnerKey]) -> None:
        """Begin to open these, and keep them open until others are asked for."""
        if len(set(layouts)) > KEPT:
            raise UsageError(f"at most {KEPT} levels are kept open, got {len(set(layouts))}")
        self._asked = frozenset(layouts)
        for layout in layouts:
            self.get(layout)
        self._close_others()

    def ready(self, layout: RunnerKey) -> bool:
        """True where a frame would not wait. Raises what opening it raised; the next `get` tries again."""
        with self._lock:
            opened = self._opened.get(layout)
        if opened is None or opened.failed or not opened.done:
            return False
        opened.runner()
        return True

    def values(self) -> list[CachedRunner]:
        """All of them, those used longest ago first."""
        with self._lock:
            return list(self._opened.values())

    def clear(self) -> None:
        """Close all."""
        with self._lock:
            gone = list(self._opened.values())
            self._opened.clear()
        for one in gone:
            one.close()

    def _close_others(self) -> None:
        """What is neither asked for nor used lately, and has no frames inside."""
        with self._lock:
            others = [layout for layout in self._opened if layout not in self._asked]
            idle = [layout for layout in others[:-_USED_LAST] if not _holds_frames(self._opened[layout])]
            gone = [self._opened.pop(layout) for layout in idle]
        for one in gone:
            one.close()


def _holds_frames(opened: CachedRunner) -> bool:
    return opened.user is not None and opened.user.inside > 0


def close_when_open(future: Future[Engine] | Future[Runner]) -> None:
    """Close what is opened, now or when it is there; nobody waits for it."""
    if not future.cancel():
        future.add_done_callback(_close)


def _close(future: Future[Engine] | Future[Runner]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


def _same(parts: Iterable[_Part], others: Sequence[_Part] | None) -> bool:
    """Whether they are the same objects; what is the same array is taken to hold the same values."""
    if others is None:
        return False
    return all(a is b and i == j for (a, i), (b, j) in zip(parts, others, strict=True))


def _stack(parts: Sequence[_Part]) -> Array:
    """[B, ...] of B parts; a single one as it is."""
    arrays = [array if i is None else array[i : i + 1] for array, i in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
