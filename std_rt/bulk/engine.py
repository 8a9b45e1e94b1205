"""The engine of one worker: a stylizer that is opened once and paints frames, several in a call."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from std_rt.bulk import places
from std_rt.bulk.options import BulkOptions
from std_rt.core.arrays import Frame, Size
from std_rt.core.bundle import load_bundle
from std_rt.core.errors import BundleError
from std_rt.media import chroma
from std_rt.pipeline.conditioning import EncodedStyle
from std_rt.pipeline.style_file import read_style
from std_rt.pipeline.stylizer import Stylizer

__all__ = ["BulkEngine"]

_STYLES = 256  # encoded ones that are remembered, 60 kB each


class BulkEngine:
    """A bundle on a backend, for styles by path. Raises as `Stylizer.load`, and if it is another bundle."""

    def __init__(self, options: BulkOptions) -> None:
        self._slot = _own_cores(options.cores)
        bundle = load_bundle(options.bundle)
        if options.digest not in ("", bundle.digest):
            raise BundleError(
                f"bundle '{bundle.name}' is another one on this machine ({bundle.digest[:12]} instead of "
                f"{options.digest[:12]}); copy the bundle's folder to the same path on every machine"
            )
        self.options = options
        self.stylizer = Stylizer.load(
            bundle,
            backend=options.backend,
            size=options.size,
            steps=options.steps,
            precision=options.precision,
            guidance=options.guidance,
            guidance_mode=options.guidance_mode,
        )
        if options.prompt is not None:
            self.stylizer.set_prompt(options.prompt, options.negative_prompt)
        self._encoded = lru_cache(maxsize=_STYLES)(self._encode)

    def use_style(self, place: str, strength: float) -> None:
        """Set the style for what is painted next. Raises MediaError, or UsageError for the strength."""
        self.stylizer.use_style(self._encoded(place), strength)

    def _encode(self, place: str) -> EncodedStyle:
        with places.fetched(place) as path:
            stroke_size, encode = self.options.stroke_size, self.stylizer.encode_style
            return read_style(path, self.stylizer.bundle, encode, stroke_size=stroke_size).style

    def paint(self, working: Sequence[Frame]) -> list[Frame]:
        """Frames of one working size (`Stylizer.fit`), ``per_call`` in each call, the last filled up.

        The number in a call does not depend on how many there are, so neither do the bytes of a result.
        """
        size: Size = working[0].shape[0], working[0].shape[1]
        state = self.stylizer.state_for(size, seed=self.options.seed)
        return self.stylizer.run_many(working, [state] * len(working), frames=self.options.per_call or None)

    def stylize(self, frames: Sequence[Frame]) -> list[Frame]:
        """Frames uint8 [H, W, 3] of any sizes as `Stylizer.stylize` gives them, grouped by working size."""
        sizes: dict[Size, list[int]] = {}
        working = [self.stylizer.fit(frame) for frame in frames]
        for index, frame in enumerate(working):
            sizes.setdefault((frame.shape[0], frame.shape[1]), []).append(index)
        results: dict[int, Frame] = {}
        for indices in sizes.values():
            for index, styled in zip(indices, self.paint([working[i] for i in indices]), strict=True):
                photo = frames[index]
                result = self.stylizer.unfit(styled, (photo.shape[0], photo.shape[1]))
                results[index] = chroma.keep_colours(photo, result) if self.options.keep_colours else result
        return [np.ascontiguousarray(results[index]) for index in range(len(frames))]


def _own_cores(count: int) -> FileLock | None:
    """Bind this process to ``count`` cores that no other engine of this machine has; 0: as it is.

    Engines size their threads by what a process may use. The lock is the claim, and ends with the process.
    """
    if not count or not hasattr(os, "sched_setaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    for slot in range(len(allowed) // count):
        lock = FileLock(Path(tempfile.gettempdir()) / f"std-rt-cores-{os.getuid()}-{count}-{slot}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        os.sched_setaffinity(0, allowed[slot * count : (slot + 1) * count])
        return lock
    return None
