"""The style mixer: holds the styles of a live session, blends them and crossfades at every change.

    mixer = StyleMixer(stylizer.encode_style, stylizer.bundle)
    mixer.fill([(Path("ink.png"), None), (Path("wave.safetensors"), None)])
    mixer.select(1, seconds=1.5)
    style, strength = mixer.at(now)      # before each frame

A crossfade is linear in token space and starts from what was shown at the instant of the change (also during
another crossfade), so it costs the mean of two styles however many are loaded. It moves in steps of
1/64: a step between unlike styles moves the pictures of std-tiny by 0.3 to 1.6 levels of 255, which is
invisible, and a slow crossfade does not change the engines' inputs on every frame. While nothing changes,
`StyleMixer.at` returns the very same object.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock

import numpy as np

from std_rt.core.arrays import Frame
from std_rt.core.bundle import Bundle
from std_rt.core.errors import StdRtError, UsageError
from std_rt.media.image import read_picture
from std_rt.pipeline.conditioning import STROKE_SIZES, EncodedStyle, StyleSquares, blend, check_stroke_size
from std_rt.pipeline.style_file import (
    Encode,
    StyleFile,
    clean_name,
    is_style_file,
    read_style,
    style_paths,
    thumbnail,
)

__all__ = ["Card", "Ramp", "StyleMixer"]

Weights = dict[int, float]  # index of a card -> share; shares add up to 1, cards without a share are left out

FADE_STEPS = 64
NUDGE_S = 0.25
"""Seconds of the crossfade of a small change, such as a strength key: short, but without a visible jump."""

_THUMBNAIL_PX = 96
_TITLE_NAMES = 3
_PROBLEMS_KEPT = 100
_LEAST_SHARE = 1e-4  # smaller remainders, left by many interrupted crossfades, count as 0


@dataclass(frozen=True, eq=False)
class Card:
    """One loaded style at a stroke size. ``thumbnail``: uint8 [h, w, 3], at most 96 px per side.

    ``picture``: what to encode again at another stroke size; None for a style file.
    """

    name: str
    thumbnail: Frame
    style: EncodedStyle
    picture: StyleSquares | None
    stroke_size: float | None


@dataclass(frozen=True)
class Ramp:
    """A rise from 0 to 1 in ``seconds``, in steps of 1/64.

    From rest it eases in and out. One that takes over from a fade in motion only eases out: if it began at a
    standstill, a repeating key would hold the picture still until released.
    """

    start_s: float = -math.inf
    seconds: float = 0.0
    from_rest: bool = True

    def progress(self, now: float) -> float:
        """0 at the start and before, 1 at the end and after; never falls."""
        if self.seconds <= 0 or now >= self.start_s + self.seconds:
            return 1.0
        done = max(0.0, (now - self.start_s) / self.seconds)
        eased = done * done * (3 - 2 * done) if self.from_rest else done * (2 - done)
        return round(eased * FADE_STEPS) / FADE_STEPS

    def then(self, now: float, seconds: float) -> Ramp:
        """The ramp that takes over from this one."""
        return Ramp(now, seconds, from_rest=self.progress(now) == 1)

    def is_sooner(self, before: Ramp) -> bool:
        """Whether this one, which takes over from ``before``, ends an unfinished fade earlier than it."""
        return (
            before.progress(self.start_s) < 1
            and self.start_s + self.seconds < before.start_s + before.seconds
        )


@dataclass(frozen=True, eq=False)
class _Blend:
    weights: Weights
    style: EncodedStyle


@dataclass(eq=False)
class _Crossfade:
    """The transition from one blend to another."""

    before: _Blend
    target: _Blend
    ramp: Ramp
    last: tuple[float, EncodedStyle] | None = None  # progress, and its style

    def style_at(self, now: float) -> EncodedStyle:
        progress = self.ramp.progress(now)
        if progress in (0.0, 1.0):
            return (self.target if progress else self.before).style
        if self.last is None or self.last[0] != progress:
            mean = blend([(self.before.style, 1 - progress), (self.target.style, progress)])
            self.last = progress, mean
        return self.last[1]

    def weights_at(self, now: float) -> Weights:
        progress = self.ramp.progress(now)
        if progress in (0.0, 1.0):
            return dict((self.target if progress else self.before).weights)
        old, new = self.before.weights, self.target.weights
        mixed = {i: (1 - progress) * old.get(i, 0.0) + progress * new.get(i, 0.0) for i in old | new}
        return _shares({i: share for i, share in mixed.items() if share > _LEAST_SHARE})


class StyleMixer:
    """Styles, their blend, their strength, and the current crossfade. Any thread may call any method."""

    def __init__(
        self,
        encode: Encode,
        bundle: Bundle,
        *,
        strength: float = 1.0,
        stroke_size: float | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``encode`` is the stylizer's, and must be safe to call from two threads.

        ``strength`` as in `set_strength`. Until `set_stroke_size`, ``stroke_size`` is that of pictures, and
        style files must have it; None: 1 for pictures, any for style files. ``now`` is the clock, in seconds,
        whose times are passed to `at`.
        """
        self._encode, self._bundle, self._now = encode, bundle, now
        self.problems: deque[str] = deque(maxlen=_PROBLEMS_KEPT)
        """One line for each style that could not be loaded in the background; take them from the left."""
        self._lock = RLock()
        self._cards: tuple[Card, ...] = ()
        self._fade: _Crossfade | None = None  # None until a style is loaded
        self._others: Weights = {}  # the others' shares before `adjust` gave one style everything
        self._strength_before = self._strength = self._bundle.check_strength(strength)
        self._strength_ramp = Ramp()
        self._asked_stroke_size = stroke_size
        self._stroke_size = check_stroke_size(1.0 if stroke_size is None else stroke_size)
        self._cycle: tuple[float, float] | None = None  # seconds for each style, and for its crossfade
        self._next_s = math.inf  # time of the cycle's next step
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="std-rt-styles")
        # Not behind a folder that is still being loaded.
        self._strokes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="std-rt-strokes")
        self._closed = False

    # Loading

    @property
    def cards(self) -> tuple[Card, ...]:
        """All styles, in the order in which they finished loading."""
        return self._cards

    def add(self, source: Path | Frame | StyleSquares | StyleFile, name: str | None = None) -> int:
        """Load a picture (path, frame uint8 [H, W, 3] or squares) or a style file now; returns its index.

        A file is read once. The first style is shown immediately. Raises as `read_style` does.
        """
        asked = self._asked_stroke_size
        if isinstance(source, Path) and not is_style_file(source):
            name = name or source.stem
            source = read_picture(source).frame
        if isinstance(source, np.ndarray):
            source = StyleSquares.of(source, self._bundle.style_px)
        if isinstance(source, StyleFile):
            loaded = source if name is None else replace(source, name=clean_name(name))
        else:
            asked = asked if isinstance(source, Path) else self._stroke_size
            loaded = read_style(source, self._bundle, self._encode, name, stroke_size=asked)
        card = Card(
            loaded.name,
            thumbnail(loaded.thumbnail, _THUMBNAIL_PX),
            loaded.style,
            source if isinstance(source, StyleSquares) else None,
            loaded.stroke_size,
        )
        with self._lock:
            self._cards = (*self._cards, card)
            self._follow_stroke_size()  # it may have changed meanwhile
            index = len(self._cards) - 1
            if self._fade is None:
                only = _Blend({index: 1.0}, card.style)
                self._fade = _Crossfade(only, only, Ramp())
            return index

    def add_in_background(self, path: Path, show_s: float | None = None) -> None:
        """Load a file, or all styles of a folder, in the background; failures are added to `problems`.

        With ``show_s``, a crossfade of this many seconds to it (to the first of a folder) begins once it is
        loaded.
        """
        if show_s is not None:
            _check_seconds(show_s)
        with self._lock:
            if not self._closed:
                self._pool.submit(self._load, path, show_s)

    def _load(self, path: Path, show_s: float | None) -> None:
        try:
            paths = style_paths(path) if path.is_dir() else [path]
        except StdRtError as error:
            self._note(str(error))
            return
        for file in paths:
            if self._closed:
                return
            try:
                index = self.add(file)
                if show_s is not None:
                    self.select(index, show_s)
                    show_s = None
            except StdRtError as error:
                self._note(str(error))
            except Exception as error:  # noqa: BLE001 (no dropped picture may end a live session)
                self._note(f"{file} cannot be used as a style: {type(error).__name__}: {error}")

    def _note(self, problem: str) -> None:
        self.problems.append(" ".join(problem.split()))

    def fill(self, styles: Sequence[tuple[Path, float | None]]) -> None:
        """Load the styles of a command line, given as (path, weight or None), and show them.

        Styles with a weight above 0 are loaded now and shown as their blend; without any, the first one that
        can be loaded is shown. The others follow in the background. Raises as `read_style` does for styles
        with a weight, or if none can be loaded; UsageError for no styles.
        """
        if not styles:
            raise UsageError("a style is needed: give at least one style picture")
        weighted = [(path, weight) for path, weight in styles if weight]
        if weighted:
            self.set_weights({self.add(path): weight for path, weight in weighted})
            rest = [path for path, weight in styles if not weight]
        else:
            rest = self._add_first([path for path, _ in styles])
        for path in rest:
            self.add_in_background(path)

    def _add_first(self, paths: list[Path]) -> list[Path]:
        """Load the first path that can be loaded; returns those after it."""
        failed: list[StdRtError] = []
        for at, path in enumerate(paths):
            try:
                self.add(path)
                return paths[at + 1 :]
            except StdRtError as error:
                failed.append(error)
                self._note(str(error))
        raise failed[0]

    def close(self) -> None:
        """Stop loading; returns when the encoder is no longer in use. The styles stay."""
        with self._lock:
            self._closed = True
        for pool in (self._pool, self._strokes):
            pool.shutdown(wait=True, cancel_futures=True)

    # Changing

    def select(self, index: int, seconds: float = 0.0) -> None:
        """Crossfade to one style. Raises UsageError for an index without a style."""
        self._check_index(index)
        self._change({index: 1.0}, seconds)

    def step(self, by: int, seconds: float = 0.0, now: float | None = None) -> None:
        """Crossfade to the style ``by`` places after the one that has, or is getting, the largest share."""
        with self._lock:
            weights = self._current.target.weights
            largest = max(weights, key=lambda index: (weights[index], -index))
            self._change({(largest + by) % len(self._cards): 1.0}, seconds, now)

    def set_weights(self, weights: Mapping[int, float] | Sequence[float], seconds: float = 0.0) -> None:
        """Crossfade to a blend: relative weights by index, or one for each of the first styles.

        Raises UsageError if a weight is negative, not finite or of an index without a style, or all are 0.
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

        After a style took everything, moving it down returns shares to the styles they came from. A style
        that was alone stays alone.
        """
        self._check_index(index)
        if not math.isfinite(delta):
            raise UsageError(f"a weight can only be moved by a finite number, got {delta:g}")
        with self._lock:
            others = dict(self._current.target.weights)
            share = round(min(1.0, max(0.0, others.pop(index, 0.0) + delta)), 6)
            others = others or self._others
            if not others:
                return
            rest = {other: part * (1 - share) for other, part in _shares(others).items()}
            self._change(_shares({**rest, index: share}), seconds)
            self._others = others if share == 1 else {}

    def cycle(self, seconds_each: float, fade_seconds: float) -> None:
        """Go to the next style every ``seconds_each`` (crossfade included); 0 stops.

        Any other change of style restarts the wait. Raises UsageError for a crossfade that is longer.
        """
        _check_seconds(seconds_each)
        _check_seconds(fade_seconds)
        if seconds_each and fade_seconds > seconds_each:
            raise UsageError(
                f"a crossfade of {fade_seconds:g} s does not fit into {seconds_each:g} s per style; "
                "make it shorter"
            )
        with self._lock:
            self._cycle = (seconds_each, fade_seconds) if seconds_each else None
            self._restart_cycle(self._now())

    @property
    def strength(self) -> float:
        """The strength, or the one it is moving to."""
        return self._strength

    def set_strength(self, strength: float, seconds: float = NUDGE_S) -> None:
        """Fade to a strength. Raises UsageError outside the bundle's range."""
        _check_seconds(seconds)
        strength = self._bundle.check_strength(strength)
        with self._lock:
            now = self._now()
            ramp = self._strength_ramp.then(now, seconds)
            if strength != self._strength or ramp.is_sooner(self._strength_ramp):
                self._strength_before = self._strength_at(now)
                self._strength, self._strength_ramp = strength, ramp

    def nudge(self, delta: float, seconds: float = NUDGE_S) -> None:
        """Move the strength by ``delta``, within the bundle's range."""
        low, high = self._bundle.strength_range
        with self._lock:
            self.set_strength(round(min(high, max(low, self._strength + delta)), 6), seconds)

    @property
    def stroke_size(self) -> float:
        """The stroke size of pictures, or the one they are being encoded at."""
        return self._stroke_size

    def set_stroke_size(self, stroke_size: float) -> None:
        """Encode the pictures again at a stroke size, in the background, and crossfade to it.

        Style files keep theirs. Raises UsageError out of range, or if only style files are shown.
        """
        stroke_size = check_stroke_size(stroke_size)
        with self._lock:
            shown = [self._cards[index] for index in self._current.target.weights]
            if all(card.picture is None for card in shown):
                raise UsageError(
                    f"style '{shown[0].name}' is a style file without its picture: its stroke size stays"
                )
            self._asked_stroke_size, self._stroke_size = None, stroke_size
            self._follow_stroke_size()

    def nudge_stroke_size(self, delta: float) -> None:
        """Move the stroke size by ``delta``, within its range."""
        low, high = STROKE_SIZES
        with self._lock:
            self.set_stroke_size(round(min(high, max(low, self._stroke_size + delta)), 6))

    def _out_of_date(self) -> list[int]:
        """The pictures to encode next at the stroke size asked for: all that are shown, else the first."""
        cards, shown = self._cards, self._current.target.weights
        old = [
            i
            for i, card in enumerate(cards)
            if card.picture is not None and card.stroke_size != self._stroke_size
        ]
        return [i for i in old if i in shown] or old[:1]

    def _follow_stroke_size(self) -> None:
        if self._fade is not None and self._out_of_date() and not self._closed:
            self._strokes.submit(self._encode_again)

    def _encode_again(self) -> None:
        while not self._closed:
            with self._lock:
                size, cards = self._stroke_size, {index: self._cards[index] for index in self._out_of_date()}
            if not cards:
                return
            try:
                again = {
                    index: replace(card, style=self._encode(card.picture, size), stroke_size=size)
                    for index, card in cards.items()
                    if card.picture is not None
                }
            except Exception as error:  # noqa: BLE001 (the session goes on with the styles it has)
                self._note(f"stroke size {size:g} cannot be set: {type(error).__name__}: {error}")
                return
            with self._lock:
                self._cards = tuple(again.get(index, card) for index, card in enumerate(self._cards))
                fade, now = self._current, self._now()
                if again.keys() & fade.target.weights.keys():
                    left_s = fade.ramp.start_s + fade.ramp.seconds - now
                    self._fade_to(fade.target.weights, max(NUDGE_S, left_s), now, encoded_again=True)

    # Reading

    def at(self, now: float) -> tuple[EncodedStyle, float]:
        """Style and strength of an instant; the same objects as before while nothing changes.

        Raises UsageError if no style is loaded.
        """
        with self._lock:
            if self._cycle is not None and now >= self._next_s and len(self._cards) > 1:
                self.step(1, self._cycle[1], now)  # after a pause one step, not all that were missed
            return self._current.style_at(now), self._strength_at(now)

    def weights_at(self, now: float) -> Weights:
        """Index -> current share, above 0 only; shares add up to 1."""
        with self._lock:
            return {} if self._fade is None else self._fade.weights_at(now)

    def title(self, now: float) -> str:
        """A title such as ``ink`` or ``ink 70 % + waves 30 %``; names the three largest shares."""
        ranked = sorted(self.weights_at(now).items(), key=lambda item: (-item[1], item[0]))
        seen = [(self._cards[index].name, round(100 * share)) for index, share in ranked]
        named = [(name, percent) for name, percent in seen if percent]
        if len(named) <= 1:
            return named[0][0] if named else ""
        texts = [f"{name} {percent} %" for name, percent in named[:_TITLE_NAMES]]
        rest = len(named) - _TITLE_NAMES
        return " + ".join([*texts, f"{rest} more"] if rest > 0 else texts)

    @property
    def _current(self) -> _Crossfade:
        if self._fade is None:
            raise UsageError("no style is loaded; add one first")
        return self._fade

    def _strength_at(self, now: float) -> float:
        progress = self._strength_ramp.progress(now)
        if progress == 1:
            return self._strength
        return self._strength_before + progress * (self._strength - self._strength_before)

    def _change(self, weights: Weights, seconds: float, now: float | None = None) -> None:
        """Begin a crossfade from the current style to ``weights`` (shares)."""
        _check_seconds(seconds)
        with self._lock:
            now = self._now() if now is None else now
            self._restart_cycle(now)
            self._others = {}
            self._fade_to(weights, seconds, now)

    def _fade_to(self, weights: Weights, seconds: float, now: float, *, encoded_again: bool = False) -> None:
        fade = self._current
        target, ramp = fade.target, fade.ramp.then(now, seconds)
        if encoded_again or weights != target.weights:
            parts = [(self._cards[index].style, share) for index, share in weights.items()]
            target = _Blend(weights, blend(parts))
        elif not ramp.is_sooner(fade.ramp):
            return
        before = _Blend(fade.weights_at(now), fade.style_at(now))
        self._fade = _Crossfade(before, target, ramp)

    def _restart_cycle(self, now: float) -> None:
        self._next_s = math.inf if self._cycle is None else now + self._cycle[0]

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self._cards):
            raise UsageError(f"there is no style {index + 1}; {len(self._cards)} are loaded")


def _shares(weights: Weights) -> Weights:
    """Weights divided by their sum, without those that are 0."""
    total = sum(weights.values())
    return {index: weight / total for index, weight in weights.items() if weight / total > 0}


def _check_seconds(seconds: float) -> None:
    if not 0 <= seconds < math.inf:
        raise UsageError(f"a time in seconds must be 0 or more and finite, got {seconds:g}")
