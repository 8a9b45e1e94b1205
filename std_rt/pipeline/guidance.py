"""Which guidance a bundle's frames get: its own, or what was asked for."""

from __future__ import annotations

from collections.abc import Collection

from std_rt.core.bundle import Bundle
from std_rt.core.errors import BundleError, UsageError
from std_rt.pipeline.denoise import GUIDANCE_MODES, Guidance
from std_rt.pipeline.program_builder import NEGATIVE

__all__ = ["check_negative", "choose_guidance"]


def choose_guidance(bundle: Bundle, scale: float | None = None, mode: str | None = None) -> Guidance:
    """How frames are guided: as the bundle says, or as asked. Scale 1 is none, whatever the mode.

    A bundle without guidance of its own takes mode ``full`` where only a scale is asked. Raises UsageError
    where scale and mode do not fit together, BundleError where the bundle has no negative or another
    std-rt's guidance.
    """
    own = bundle.guidance
    if own["mode"] not in GUIDANCE_MODES:
        raise BundleError(
            f"bundle '{bundle.name}' needs guidance {own['mode']!r}, which this std-rt lacks; upgrade std-rt"
        )
    if mode is not None and mode not in GUIDANCE_MODES:
        raise UsageError(f"there is no guidance mode {mode!r}; use one of {', '.join(GUIDANCE_MODES)}")
    if scale is not None and not 1 <= scale < float("inf"):
        raise UsageError(f"guidance must be 1 (none) or more, got {scale:g}")
    if mode == "none" and scale not in (None, 1):
        raise UsageError(f"guidance {scale:g} does not go with mode 'none'; leave one of the two out")
    if mode == "none" or scale == 1 or (mode is None and scale is None and own["mode"] == "none"):
        return Guidance()
    chosen = float(own["scale"]) if scale is None else scale
    if chosen == 1:
        raise UsageError(f"guidance mode {mode!r} needs a scale above 1; give --guidance")
    return Guidance(mode or (own["mode"] if own["mode"] != "none" else "full"), chosen)


def check_negative(bundle: Bundle, stored: Collection[str], guidance: Guidance) -> None:
    """Raise BundleError where guidance needs a negative that is not among the names ``stored``."""
    missing = [name for name in NEGATIVE if f"negative_{name}" not in stored]
    if guidance.mode != "none" and missing:
        raise BundleError(
            f"bundle '{bundle.name}' has no negative for guidance {guidance.scale:g}; "
            f"use --guidance 1, or export it again with --guidance {guidance.scale:g}"
        )
