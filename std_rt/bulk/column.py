"""A stage of somebody's own Ray pipeline: paints one column of frames into another."""

from __future__ import annotations

from typing import Any

import numpy as np

from std_rt.bulk.engine import BulkEngine
from std_rt.bulk.options import BulkOptions

__all__ = ["PaintColumn"]


class PaintColumn:
    """An actor's work, with the engine that it opened when it began; raises as `BulkEngine`."""

    def __init__(self, options: BulkOptions, style: str, strength: float, column: str, into: str) -> None:
        self._engine, self._column, self._into = BulkEngine(options), column, into
        self._engine.use_style(style, strength)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Columns by name as arrays, frames uint8 [H, W, 3]; the same with ``into`` added."""
        styled = self._engine.stylize(list(batch[self._column]))
        column = np.empty(len(styled), object)
        column[:] = styled
        return batch | {self._into: column}
