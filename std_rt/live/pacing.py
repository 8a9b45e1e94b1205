"""Pacing: what to leave out when a frame brings nothing new, and when there is too much to do.

`SimilarityFilter` skips frames that hardly differ; `Governor` holds a rate on a `ladder` of levels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from std_rt.live.governor import Governor
from std_rt.pipeline.stylizer import Quality
from std_rt.streaming.similarity import SimilarityFilter

__all__ = ["Governor", "SimilarityFilter", "ladder", "relative_costs"]

Size = tuple[int, int]  # (H, W) in pixels

_SCALES = (0.75, 0.5, 0.375, 0.25)  # of the best size's sides
_STEPS_WHEN_SMALL = 2
_WORTH_IT = 0.9  # of the cost of the level above: less is not worth a switch
# What a frame takes beside the UNet, in calls of the UNet: the built-in model on OpenVINO, fp32 to int8, 256
# to 512 px (1.1 to 1.9, from the table of speeds in docs/results.md). The governor learns the rest.
_BESIDE_THE_UNET = 1.4


def ladder(
    best_size: Size,
    best_steps: int,
    steps_allowed: Collection[int],
    multiple: int,
    min_px: int = 128,
    *,
    most: int = 8,
) -> list[Quality]:
    """Levels from the best downwards, each clearly cheaper than the one above, ``most`` at most.

    First fewer steps, at the same size; then smaller sizes (the shorter side ``min_px`` at least, both
    dividing by ``multiple``), at 2 steps and 1. Fewer steps cost some texture and keep the drawing, smaller
    sizes lose the drawing (faces first); and steps share their engines where sizes do not. Raises ValueError
    where ``best_steps`` is not allowed.
    """
    if best_steps not in steps_allowed:
        raise ValueError(f"{best_steps} steps are none of {sorted(steps_allowed)}")
    fewer = sorted((steps for steps in steps_allowed if steps <= best_steps), reverse=True)
    small = [steps for steps in fewer if steps <= _STEPS_WHEN_SMALL] or fewer[-1:]
    proposed = [Quality(best_size, steps) for steps in fewer]
    for scale in _SCALES:
        size = _scaled(best_size, scale, multiple)
        if min(size) >= min_px:
            proposed += [Quality(size, steps) for steps in small]
    kept = proposed[:1]
    for level in proposed[1:]:
        if _cost(level) <= _WORTH_IT * _cost(kept[-1]):
            kept.append(level)
    return kept[:most]


def relative_costs(levels: Sequence[Quality]) -> list[float]:
    """What a frame costs at each level, the first being 1: pixels times UNet calls and the rest."""
    return [_cost(level) / _cost(levels[0]) for level in levels]


def _cost(level: Quality) -> float:
    return level.size[0] * level.size[1] * (_BESIDE_THE_UNET + level.steps)


def _scaled(size: Size, scale: float, multiple: int) -> Size:
    h, w = (max(1, round(side * scale / multiple)) * multiple for side in size)
    return h, w
