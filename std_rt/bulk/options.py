"""What a job runs and how: everything a worker needs to know, as one value."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

__all__ = ["BulkOptions"]

# Where and how fast an item is made, not what it looks like.
_SAME_PICTURES = ("bundle", "cores", "digest", "segment_seconds")


@dataclass(frozen=True, kw_only=True)
class BulkOptions:
    """Bundle, engine and look, as in `Stylizer.load` and `Stylizer.set_style`.

    ``bundle``: a name or folder that every machine of the cluster has; ``digest``: the one it must have ("":
    any). ``size``: a side or (H, W) in px. ``per_call``: pictures of one size in a call of the engine; 0: as
    many as it likes. ``cores``: processor cores for each engine; 0: all of a machine, 8 at most.
    ``upscale``, ``temporal`` and ``sound``: as in `std-rt stylize`, for files only. ``segment_seconds``:
    clips are cut into segments of at least this, 0: never; None: as `Job.segment_seconds` decides.
    """

    bundle: str | None = None
    digest: str = ""
    backend: str = "auto"
    size: int | tuple[int, int] | None = None
    steps: int | None = None
    precision: str = "auto"
    guidance: float | None = None
    guidance_mode: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    stroke_size: float | None = None
    keep_colours: bool = False
    seed: int = 0
    upscale: bool = False
    temporal: str = "full"
    sound: str = "auto"
    segment_seconds: float | None = None
    per_call: int = 0
    cores: int = 0

    def made_by(self) -> str:
        """The bundle's digest and every option that changes pictures, as JSON: a part of each item's key."""
        looks = {name: value for name, value in asdict(self).items() if name not in _SAME_PICTURES}
        return json.dumps([self.digest, looks], sort_keys=True)
