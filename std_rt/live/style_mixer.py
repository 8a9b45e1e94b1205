"""The styles of a live session: any number of them, blended, and crossfaded whenever something changes.

    deck = StyleMixer(stylizer.encode_style, stylizer.bundle)
    deck.fill([(Path("ink.png"), None), (Path("wave.safetensors"), None)])
    deck.select(1, seconds=1.5)
    style, strength = deck.at(now)      # before each frame

A crossfade goes straight through token space from what was shown at the instant of the change, also in the
middle of another one, so it costs a mean of two styles however many are loaded. It moves in 1/64 steps:
a step between unlike styles moves the pictures of std-tiny by 0.3 to 1.6 levels of 255, which does not show,
and a slow fade does not feed the engines anew on every frame. While nothing changes, `StyleMixer.at` returns
the very same object.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

import numpy as np
from numpy.typing import NDArray

from std_rt.core.bundle import Bundle
from std_rt.core.errors import StdRtError, UsageError
from std_rt.pipeline.conditioning import EncodedStyle, blend
from std_rt.pipeline.style_file import read_style, style_paths, thumbnail

__all__ = ["Card", "Ramp", "StyleMixer"]

Frame = NDArray[np.uint8]
Weights = dict[int, float]  # card -> share; shares add up to 1, cards without a share are left out

FADE_STEPS = 64
NUDGE_S = 0.25
"""Crossfade of a small change (a key that moves the strength): short, and no visible jump."""

_PROBLEMS_KEPT = 100
_SHOWN_SHARE = 1e-4  # what is left of a style after many interrupted fades; less is nothing


@dataclass(frozen=True, eq=False)
class Card:
    """One style of the deck. ``thumbnail``: uint8 [h, w, 3]."""

    name: str
    thumbnail: Frame
    style: EncodedStyle


@dataclass(frozen=True)
class Ramp:
    """From 0 to 1 in ``seconds``, in 1/64 steps.

    From rest it eases in and out. One that takes over from a fade in motion only eases out: it must not
    begin at a standstill, or a key that repeats would hold the picture still until it is let go.
    """

    start_s: float = -math.inf
    seconds: float = 0.0
    from_rest: bool = True

    def level(self, now: float) -> float:
        """0 at the start and before, 1 at the end and after; never falls."""
        if self.seconds <= 0 or now >= self.start_s + self.seconds:
            return 1.0
        done = max(0.0, (now - self.start_s) / self.seconds)
        eased = done * done * (3 - 2 * done) if self.from_rest else done * (2 - done)
        return round(eased * FADE_STEPS) / FADE_STEPS


@dataclass(frozen=True, eq=False)
class _Mix:
    """A blend of cards: their shares, and what came out."""

    weights: Weights
    style: EncodedStyle


class StyleMixer:
    """Styles, their blend, their strength, and the crossfade under way. Any thread may call any method."""

    def __init__(
        self,
        encode: Callable[[Frame], EncodedStyle],
        bundle: Bundle,
        *,
        strength: float = 1.0,
        now: Callable[[], float] = time.perf_counter,
        thumbnail_px: int = 96,
    ) -> None:
        """``encode`` is the stylizer's, and may be called from two threads at once.

        ``strength`` as in `set_strength`; ``now`` is the clock in seconds that `at` is asked by.
        """
        self._encode, self._bundle, self._now, self._thumbnail_px = encode, bundle, now, thumbnail_px
        low, high = bundle.style.get("strength_range", (0, 2))
        self.strength_range = (float(low), float(high))
        self.problems: deque[str] = deque(maxlen=_PROBLEMS_KEPT)
        """One line for each style that could not be loaded in the background; take them from the left."""
        self._lock = RLock()
        self._cards: tuple[Card, ...] = ()
        self._from: _Mix | None = None
        self._to: _Mix | None = None
        self._ramp = Ramp()
        self._between: tuple[float, EncodedStyle] | None = None  # the last step of the fade, and its blend
        self._others: Weights = {}  # what shared with a style before `adjust` gave it everything
        self._strength_from = self._strength_to = self._checked_strength(strength)
        self._strength_ramp = Ramp()
        self._cycle: tuple[float, float] | None = None  # seconds each, seconds of the fade
        self._due_s = math.inf
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="std-rt-styles")
        self._waiting, self._closed = 0, False

    # Loading

    @property
    def cards(self) -> tuple[Card, ...]:
        """All styles, in the order they were ready."""
        return self._cards

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [card.name for card in self._cards]

    @property
    def waiting(self) -> int:
        """Styles that are being loaded in the background, or will be."""
        return self._waiting

    def __len__(self) -> int:
        return len(self._cards)

    def add(self, source: Path | Frame, name: str | None = None) -> int:
        """Load a picture, a style file or a frame uint8 [H, W, 3] now; returns its index.

        A file is read here and never again. The first style is shown at once. Raises as `read_style` does.
        """
        loaded = read_style(source, self._bundle, self._encode, name)
        card = Card(loaded.name, thumbnail(loaded.thumbnail, self._thumbnail_px), loaded.style)
        with self._lock:
            self._cards = (*self._cards, card)
            index = len(self._cards) - 1
            if self._to is None:
                self._from = self._to = _Mix({index: 1.0}, card.style)
            return index

    def add_in_background(self, path: Path, show_s: float | None = None) -> None:
        """Load a file, or all styles of a folder, beside the frames; one that fails is in `problems`.

        With ``show_s``, a crossfade of so many seconds to it (of a folder: to its first) begins when it is
        there.
        """
        if show_s is not None:
            _check_seconds(show_s)
        with self._lock:
            if self._closed:
                return
            self._waiting += 1
            self._pool.submit(self._load, path, show_s)

    def fill(self, styles: Sequence[tuple[Path, float | None]]) -> None:
        """Load what a command line names, and show what it says.

        Styles with a weight above 0 are loaded now and shown as their blend; without any, it is the first
        that can be loaded. The others follow in the background, behind them. Raises as `read_style` does for
        those with a weight, or where none can be loaded; UsageError where there is no style.
        """
        if not styles:
            raise UsageError("a style is needed: give at least one style picture")
        shown = [at for at, (_, weight) in enumerate(styles) if weight]
        if shown:
            self.set_weights({self.add(styles[at][0]): styles[at][1] or 1.0 for at in shown}, 0)
        else:
            shown = list(range(self._add_first([path for path, _ in styles]) + 1))
        for at, (path, _) in enumerate(styles):
            if at not in shown:
                self.add_in_background(path)

    def _add_first(self, paths: Sequence[Path]) -> int:
        """Load the first that can be; its place. The ones before it are in `problems`."""
        failed: list[StdRtError] = []
        for at, path in enumerate(paths):
            try:
                self.add(path)
            except StdRtError as error:
                failed.append(error)
                continue
            for problem in failed:
                self._say(str(problem))
            return at
        raise failed[0]

    def close(self) -> None:
        """Stop loading; returns when the encoder is no longer in use. The styles stay."""
        with self._lock:
            self._closed, self._waiting = True, 0
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, path: Path, show_s: float | None) -> None:
        try:
            paths = style_paths(path) if path.is_dir() else [path]
        except StdRtError as error:
            paths = []
            self._say(str(error))
        with self._lock:
            self._waiting = max(0, self._waiting + len(paths) - 1)
        for file in paths:
            if self._closed:
                return
            show_s = None if self._load_one(file, show_s) else show_s

    def _load_one(self, path: Path, show_s: float | None) -> bool:
        try:
            index = self.add(path)
            if show_s is not None:
                self.select(index, show_s)
            return True
        except StdRtError as error:
            self._say(str(error))
        except Exception as error:  # noqa: BLE001 (no picture that is dropped in may end a live session)
            self._say(f"{path} cannot be a style: {type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._waiting = max(0, self._waiting - 1)
        return False

    def _say(self, problem: str) -> None:
        self.problems.append(" ".join(problem.split()))

    # Changing

    def select(self, index: int, seconds: float = 0.0) -> None:
        """Crossfade to one style. Raises UsageError where there is none of this index."""
        self._check_index(index)
        self._change({index: 1.0}, seconds)

    def next(self, seconds: float = 0.0) -> None:
        """Crossfade to the style after the one that has, or is getting, the largest share."""
        self._step(1, seconds)

    def previous(self, seconds: float = 0.0) -> None:
        """Crossfade to the style before it."""
        self._step(-1, seconds)

    def set_weights(self, weights: Mapping[int, float] | Sequence[float], seconds: float = 0.0) -> None:
        """Crossfade to a blend: relative weights by index, or one for each of the first styles.

        Raises UsageError where a weight is negative, not finite or of a style that is not there, or all
        are 0.
        """
        given = dict(weights if isinstance(weights, Mapping) else enumerate(weights))
        for index, weight in given.items():
            self._check_index(index)
            if not 0 <= weight < math.inf:
                raise UsageError(f"style weights must be 0 or more and finite, got {weight:g}")
        top = max(given.values(), default=0.0)
        if top == 0:
            raise UsageError("all style weights are 0; give at least one style a weight above 0")
        self._change(_shares({index: weight / top for index, weight in given.items()}), seconds)

    def adjust(self, index: int, delta: float, seconds: float = NUDGE_S) -> None:
        """Move a style's share (0..1) by ``delta``; the others keep their proportions in what is left.

        A style that got everything gives it back to those it took it from; one that was alone stays alone.
        """
        self._check_index(index)
        if not math.isfinite(delta):
            raise UsageError(f"a weight is moved by a finite number, got {delta:g}")
        with self._lock:
            others = dict(self._target.weights)
            share = round(min(1.0, max(0.0, others.pop(index, 0.0) + delta)), 6)
            others = others or self._others
            if not others:
                return
            rest = {other: part * (1 - share) for other, part in _shares(others).items()}
            self._change(_shares({**rest, index: share}), seconds)
            self._others = others if share == 1 else {}

    def cycle(self, seconds_each: float, fade_seconds: float) -> None:
        """Go to the next style every ``seconds_each``, its fade included; 0 stops. Any change starts anew."""
        _check_seconds(seconds_each)
        _check_seconds(fade_seconds)
        if seconds_each and fade_seconds > seconds_each:
            raise UsageError(
                f"a crossfade of {fade_seconds:g} s does not fit into {seconds_each:g} s a style; "
                "make it shorter"
            )
        with self._lock:
            self._cycle = (seconds_each, fade_seconds) if seconds_each else None
            self._rest_cycle(self._now())

    @property
    def strength(self) -> float:
        """What the strength is, or is going to."""
        return self._strength_to

    def set_strength(self, strength: float, seconds: float = NUDGE_S) -> None:
        """Fade to a strength. Raises UsageError outside of `strength_range`."""
        _check_seconds(seconds)
        self._checked_strength(strength)
        with self._lock:
            now = self._now()
            moving = self._strength_ramp.level(now) < 1
            ramp = Ramp(now, seconds, from_rest=not moving)
            if strength != self._strength_to or _is_sooner(ramp, self._strength_ramp, now):
                self._strength_from = self._strength_at(now)
                self._strength_to, self._strength_ramp = float(strength), ramp

    def nudge(self, delta: float, seconds: float = NUDGE_S) -> None:
        """Move the strength by ``delta``, as far as it goes."""
        low, high = self.strength_range
        with self._lock:
            self.set_strength(round(min(high, max(low, self._strength_to + delta)), 6), seconds)

    # Asking

    def at(self, now: float) -> tuple[EncodedStyle, float]:
        """Style and strength of an instant; the same objects as before while nothing changes.

        Raises UsageError where no style is loaded.
        """
        with self._lock:
            self._advance(now)
            return self._style_at(now), self._strength_at(now)

    def weights_at(self, now: float) -> Weights:
        """Index -> share of what is shown, without the styles that have none; shares add up to 1."""
        with self._lock:
            if self._from is None or self._to is None:
                return {}
            level = self._ramp.level(now)
            if level in (0.0, 1.0):
                return dict((self._to if level else self._from).weights)
            old, new = self._from.weights, self._to.weights
            mixed = {i: (1 - level) * old.get(i, 0.0) + level * new.get(i, 0.0) for i in old | new}
            return _shares({i: share for i, share in mixed.items() if share > _SHOWN_SHARE})

    def fading(self, now: float) -> bool:
        """Whether style or strength are still on their way."""
        with self._lock:
            return self._ramp.level(now) < 1 or self._strength_ramp.level(now) < 1

    def title(self, now: float, most: int = 3) -> str:
        """For people: ``ink``, or ``ink 70 % + waves 30 %``; the ``most`` largest shares are named."""
        ranked = sorted(self.weights_at(now).items(), key=lambda item: (-item[1], item[0]))
        seen = [(self._cards[index].name, round(100 * share)) for index, share in ranked]
        named = [(name, percent) for name, percent in seen if percent]
        if len(named) <= 1:
            return named[0][0] if named else ""
        rest = len(named) - most
        texts = [f"{name} {percent} %" for name, percent in named[:most]]
        return " + ".join([*texts, f"{rest} more"] if rest > 0 else texts)

    @property
    def _target(self) -> _Mix:
        if self._to is None:
            raise UsageError("no style is loaded; add one first")
        return self._to

    def _style_at(self, now: float) -> EncodedStyle:
        target, level = self._target, self._ramp.level(now)
        if level == 1 or self._from is None:
            return target.style
        if level == 0:
            return self._from.style
        if self._between is None or self._between[0] != level:
            self._between = (level, blend([(self._from.style, 1 - level), (target.style, level)]))
        return self._between[1]

    def _strength_at(self, now: float) -> float:
        level = self._strength_ramp.level(now)
        if level == 1:
            return self._strength_to
        return self._strength_from + level * (self._strength_to - self._strength_from)

    def _change(self, weights: Weights, seconds: float, now: float | None = None) -> None:
        """Begin a crossfade from what is shown now to ``weights`` (shares)."""
        _check_seconds(seconds)
        with self._lock:
            now = self._now() if now is None else now
            self._rest_cycle(now)
            self._others = {}
            target, moving = self._target, self._ramp.level(now) < 1
            ramp = Ramp(now, seconds, from_rest=not moving)
            if weights == target.weights:
                if not _is_sooner(ramp, self._ramp, now):
                    return
            else:
                mixed = blend([(self._cards[index].style, share) for index, share in weights.items()])
                target = _Mix(weights, mixed)
            self._from = _Mix(self.weights_at(now), self._style_at(now))
            self._to, self._ramp, self._between = target, ramp, None

    def _step(self, by: int, seconds: float, now: float | None = None) -> None:
        with self._lock:
            weights = self._target.weights
            largest = max(weights, key=lambda index: (weights[index], -index))
            self._change({(largest + by) % len(self._cards): 1.0}, seconds, now)

    def _advance(self, now: float) -> None:
        """The cycle's next style, where it is due. After a pause it is one step, not all that were missed."""
        if self._cycle is not None and now >= self._due_s and len(self._cards) > 1:
            self._step(1, self._cycle[1], now)

    def _rest_cycle(self, now: float) -> None:
        self._due_s = math.inf if self._cycle is None else now + self._cycle[0]

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self._cards):
            raise UsageError(f"there is no style {index + 1}; {len(self._cards)} are loaded")

    def _checked_strength(self, strength: float) -> float:
        low, high = self.strength_range
        if not low <= strength <= high:
            raise UsageError(f"style strength must be in {low:g}..{high:g}, got {strength:g}")
        return float(strength)


def _shares(weights: Weights) -> Weights:
    """Weights over their sum; those of 0 are left out."""
    total = sum(weights.values())
    return {index: weight / total for index, weight in weights.items() if weight / total > 0}


def _is_sooner(new: Ramp, old: Ramp, now: float) -> bool:
    """Whether a fade to where another one is going already would be there before it."""
    return old.level(now) < 1 and new.start_s + new.seconds < old.start_s + old.seconds


def _check_seconds(seconds: float) -> None:
    if not 0 <= seconds < math.inf:
        raise UsageError(f"a time in seconds must be 0 or more and finite, got {seconds:g}")
