"""An engine made of a NumPy function: for tests, and for driving the loop without a backend."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from std_rt.engines.protocol import Array, Ports, check_inputs

__all__ = ["FakeEngine", "float_ports"]


def float_ports(**shapes: tuple[int, ...]) -> Ports:
    """Ports of float32 arrays: ``float_ports(sample=(1, 4, 8, 8))``."""
    return {name: (shape, np.dtype(np.float32)) for name, shape in shapes.items()}


class FakeEngine:
    """``fn(**inputs)`` returns a dict of outputs. It checks inputs as strictly as a real engine.

    ``calls`` keeps a copy of the inputs of every call. Returned arrays are overwritten at the next call,
    as a real engine's may be, so that a test finds code that keeps them.
    """

    precision = "fp32"

    def __init__(
        self, fn: Callable[..., dict[str, Array]], inputs: Ports, outputs: Ports, name: str = "fake"
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.calls: list[dict[str, Array]] = []
        self.closed = False
        self._fn, self._name = fn, name
        self._buffers = {key: np.empty(shape, dtype) for key, (shape, dtype) in outputs.items()}

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        check_inputs(self._name, self.inputs, inputs)
        self.calls.append({key: value.copy() for key, value in inputs.items()})
        result = self._fn(**inputs)
        for key, buffer in self._buffers.items():
            buffer[...] = result[key]
        return dict(self._buffers)

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True
