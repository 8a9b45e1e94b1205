"""Engines that several programs use: opened once, closed with the last."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.fake_engine import FakeEngine, float_ports

from std_rt.core.errors import BackendError
from std_rt.engines.host import SharedEngines
from std_rt.engines.protocol import GraphSpec

SPEC = GraphSpec("unet", Path("unet.onnx"), {"x": (1, 2)}, "bundle")


class Opening:
    """Keeps what it opens; fails as often as told."""

    def __init__(self, failures: int = 0) -> None:
        self.engines: list[FakeEngine] = []
        self._failures = failures

    def __call__(self, spec: GraphSpec) -> FakeEngine:
        if self._failures:
            self._failures -= 1
            raise BackendError("not today")
        ports = float_ports(**spec.shapes)
        self.engines.append(FakeEngine(lambda x: {"y": 2 * x}, ports, float_ports(y=spec.shapes["x"])))
        return self.engines[-1]


def test_equal_specs_are_one_engine_and_others_are_not() -> None:
    opening = Opening()
    shared = SharedEngines(opening)
    for spec in (SPEC, SPEC, replace(SPEC, shapes={"x": (2, 2)}), replace(SPEC, path=Path("other.onnx"))):
        engine = shared.open(spec)
        assert engine.inputs == float_ports(**spec.shapes)
        x = np.ones(spec.shapes["x"], np.float32)
        np.testing.assert_array_equal(engine(x=x)["y"], 2 * x)
    assert len(opening.engines) == 3


def test_the_engine_is_closed_with_its_last_user_and_opened_again_after() -> None:
    opening = Opening()
    shared = SharedEngines(opening)
    first, second = shared.open(SPEC), shared.open(SPEC)
    first.close()
    first.close()  # twice is once
    assert not opening.engines[0].closed
    with pytest.raises(BackendError, match="'unet' was closed; open it again"):
        first(x=np.ones((1, 2), np.float32))
    second(x=np.ones((1, 2), np.float32))
    second.close()
    assert opening.engines[0].closed
    shared.open(SPEC)
    assert len(opening.engines) == 2


def test_one_that_does_not_open_is_tried_again() -> None:
    opening = Opening(failures=1)
    shared = SharedEngines(opening)
    with pytest.raises(BackendError, match="not today"):
        shared.open(SPEC)
    shared.open(SPEC).close()
    assert [engine.closed for engine in opening.engines] == [True]


def test_threads_that_ask_at_once_wait_for_one_opening() -> None:
    opening, begun, go = Opening(), threading.Event(), threading.Event()

    def slow(spec: GraphSpec) -> FakeEngine:
        begun.set()
        assert go.wait(30)
        return opening(spec)

    shared = SharedEngines(slow)
    threads = [threading.Thread(target=shared.open, args=(SPEC,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go.set()
    for thread in threads:
        thread.join(30)
    assert len(opening.engines) == 1
