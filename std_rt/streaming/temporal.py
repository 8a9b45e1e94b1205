"""The temporal filter: strokes follow the content, and flicker is averaged out.

    temporal = TemporalFilter("full")
    for working in frames:
        motion = temporal.follow(working)
        styled = stylizer.run(working, temporal.noise(state, motion))
        show(temporal.settle(styled, motion))

* ``off``: the same noise in the same place for every frame; results are shown as they are.
* ``noise``: the noise follows the motion of the content (`streaming.noise_warp`).
* ``full``: and each styled frame is mixed with the warped frames before it, where the motion is trusted
  (`streaming.optical_flow`).

Finished pictures are mixed, not latents: this measured best (docs/lab-notes.md, 2026-11-21). Latents at an
eighth of the resolution cannot be warped by less than a cell, and feeding previous results back into the
start latents compounds the style. It is also independent of stream batch and backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np

from std_rt.core.arrays import Array, Frame, Size
from std_rt.evaluation.measures import Flow, sharpness
from std_rt.pipeline.stylizer import State
from std_rt.streaming.noise_warp import MovingNoise
from std_rt.streaming.optical_flow import SMALLEST_PX, Followed, Follower, enlarged, read_at, reduced

__all__ = ["TEMPORAL_MODES", "Motion", "TemporalFilter"]


TEMPORAL_MODES = ("off", "noise", "full")

# A history never counts for more than this, so no picture freezes: after 15 frames a fifth is left.
_WEIGHT = 0.9
_CHANGING_WEIGHT = 0.5  # while styles fade into each other
_JUMP = 3.0  # times the usual difference from the history: another style altogether
_USUAL_LEVELS = 5.0  # that difference before there is one

_DETAIL_PX, _REGION_PX = 7, 17  # what counts as detail; over how much of the picture its strength is compared
_DETAIL_SHARE, _MOST_DETAIL = 0.9, 2.0

_SAMPLED, _FIRST_SAMPLE = 30, 8  # flicker is measured for one pair of frames in 30, from the 8th on


@dataclass(frozen=True, eq=False)
class Motion:
    """How a frame follows from the one before.

    ``followed`` None: no motion is known (the first frame, the first after a cut, every frame in mode off).
    ``judged``: the flow that flicker is measured by, and the frame itself, if this pair is sampled.
    """

    index: int
    size: Size
    followed: Followed | None = None
    judged: tuple[Flow, Frame] | None = None


class TemporalFilter:
    """Reduces the flicker of one stream. Use it from one thread at a time."""

    def __init__(self, mode: str, measured: Callable[[float, float], None] | None = None) -> None:
        """``mode``: one of `TEMPORAL_MODES`; ValueError for another.

        ``measured`` is called with the warping error (0..1, `Flow.difference`) and the `sharpness` of each
        sampled pair of presented frames: `measures.WarpingError` of that pair, though above 256 px the flow
        is that of reduced frames; the sharpness is of its second frame.
        """
        if mode not in TEMPORAL_MODES:
            raise ValueError(f"unknown temporal mode {mode!r}; use one of {', '.join(TEMPORAL_MODES)}")
        self.mode, self._measured = mode, measured
        self._follower = Follower(fine=mode == "full", weight=_WEIGHT if mode == "full" else 0.0)
        self._mixer = _Mixer()
        self.reset()

    def reset(self) -> None:
        """Forget the frames."""
        self._index = 0
        self._size: Size | None = None
        self._sample: Frame | None = None
        self._home: Array | None = None
        self._moving: MovingNoise | None = None
        self._follower.reset()
        self._mixer.reset()
        self._settled = -1
        self._shown: tuple[int, Frame] | None = None

    def follow(self, working: Frame) -> Motion:
        """The motion of the next frame uint8 [H, W, 3] to be styled. A change of size starts over."""
        size = (working.shape[0], working.shape[1])
        if size != self._size:
            self.reset()
            self._size = size
        index, self._index = self._index, self._index + 1
        if min(size) < SMALLEST_PX:  # too small to follow: as in mode off
            return Motion(index, size)
        judged = self._judge(index, working)
        if self.mode == "off":
            return Motion(index, size, judged=judged)
        return Motion(index, size, self._follower.follow(working), judged)

    def noise(self, state: State, motion: Motion) -> State:
        """``state`` with the noise of this frame; ``state`` itself if no noise has moved.

        Pass the stream's first state every time, or the last one returned. Call once per frame, after
        `follow`.
        """
        if self.mode == "off":
            return state
        known = self._moving is not None and (state.noise is self._home or state.noise is self._moving.noise)
        if self._moving is None or not known:
            self._home = state.noise
            self._moving = MovingNoise(state.noise)
        elif motion.followed is None:
            assert self._home is not None
            self._moving = MovingNoise(self._home)
        if motion.followed is not None and known:
            self._moving.follow(motion.followed)
        moved = self._moving.noise
        return state if moved is state.noise else replace(state, noise=moved)

    def settle(self, styled: Frame, motion: Motion, *, changing: bool = False) -> Frame:
        """The frame to present, uint8 [H, W, 3]; ``styled`` itself in modes off and noise.

        Call in the order of `follow`, any number of frames later. ``changing``: its style differs from that
        of the frame before, so earlier results count for less, or not at all if the picture changed
        entirely. Raises ValueError if the frame's size is not the one that was followed.
        """
        if (styled.shape[0], styled.shape[1]) != motion.size:
            raise ValueError(
                f"a frame of {styled.shape[:2]} px cannot be settled by motion of {motion.size} px"
            )
        result = styled
        if self.mode == "full":
            next_one = motion.index == self._settled + 1
            result = self._mixer.mix(styled, motion.followed if next_one else None, changing)
            self._settled = motion.index
        self._measure(result, motion)
        return result

    def _judge(self, index: int, working: Frame) -> tuple[Flow, Frame] | None:
        """The flow of this pair, from a finer search than the one used for mixing, and its second frame."""
        before, self._sample = self._sample, None
        if _is_sampled(index + 1):
            self._sample = working.copy()
        if before is None or not _is_sampled(index):
            return None
        flow = _flow_of(before, working)
        return None if flow.is_cut(before, working) else (flow, working.copy())

    def _measure(self, result: Frame, motion: Motion) -> None:
        shown, self._shown = self._shown, None
        if _is_sampled(motion.index + 1):
            self._shown = (motion.index, result.copy())
        if motion.judged is None or shown is None or shown[0] != motion.index - 1:
            return
        flow, content = motion.judged
        error = flow.difference(shown[1], result)
        if np.isfinite(error) and self._measured is not None:
            self._measured(error, sharpness([result], [content]))


class _Mixer:
    """Mixes each styled frame with its predecessors."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the frames."""
        self._history: Array | None = None  # float: steps of 0.1 levels must add up, or the picture freezes
        self._usual = _USUAL_LEVELS

    def mix(self, styled: Frame, followed: Followed | None, changing: bool) -> Frame:
        """``styled`` mixed with its history; ``styled`` itself if no motion is known."""
        new = styled.astype(np.float32)
        history, self._history = self._history, new
        if history is None or followed is None:
            return styled
        # Cubic: bilinear sampling would blur the history again in every frame.
        gap = read_at(history, followed.source, cv2.INTER_CUBIC) - new
        share = self._weight(gap, followed.trust, changing) * followed.trust
        if not share.any():
            return styled
        self._history = new + share[..., None] * gap
        return _with_detail(self._history, new)

    def _weight(self, gap: Array, trust: Array, changing: bool) -> np.float32:
        trusted = trust[::4, ::4] > 0.5
        levels = float(np.abs(gap[::4, ::4][trusted]).mean()) if trusted.any() else 0.0
        if changing and levels > _JUMP * self._usual:
            return np.float32(0)
        if not changing:
            self._usual += (levels - self._usual) / 16
        return np.float32(_CHANGING_WEIGHT if changing else _WEIGHT)


def _with_detail(mixed: Array, new: Array) -> Frame:
    """``mixed`` with its brightness detail as strong as that of ``new``, region by region.

    The mean of strokes that are slightly out of place is softer than each of them. The detail of the mean is
    amplified, not that of the new frame, so it stays as steady as it was. The history keeps the plain mean:
    amplified again and again, a few specks would take over.
    """
    detail, wanted = _detail(mixed), _detail(new)
    have, want = _energy(detail), _energy(wanted)
    gain = cv2.sqrt((_DETAIL_SHARE * want + 1) / (have + 1))
    np.clip(gain, 1, _MOST_DETAIL, out=gain)
    restored = mixed + ((gain - 1) * detail)[..., None]
    return np.asarray(np.rint(np.clip(restored, 0, 255, out=restored)), np.uint8)


def _detail(picture: Array) -> Array:
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return np.asarray(grey - cv2.blur(grey, (_DETAIL_PX, _DETAIL_PX)), np.float32)


def _energy(detail: Array) -> Array:
    return np.asarray(cv2.blur(detail * detail, (_REGION_PX, _REGION_PX)), np.float32)


def _is_sampled(index: int) -> bool:
    return index % _SAMPLED == _FIRST_SAMPLE


def _flow_of(before: Frame, after: Frame) -> Flow:
    """`Flow.between`, of reduced frames if they are large."""
    small = Flow.between(reduced(before), reduced(after))
    full = enlarged(small.source, small.followed.astype(np.float32), (after.shape[0], after.shape[1]))
    return Flow(full.source, full.trust > 0.5)
