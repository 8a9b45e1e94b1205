"""Going over from a slow runner to a fast one, between two frames."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from std_rt.core.errors import BackendError
from std_rt.engines.hot_swap import HotSwapRunner
from std_rt.engines.program import Mark, Runner, no_mark

FRAME = np.zeros((1, 2, 2, 3), np.uint8)


class Adds:
    """A runner that adds its feed ``x`` to every pixel."""

    def __init__(self, precision: str, problem: str = "", at: str = "") -> None:
        self.precision, self.closed, self.frames = precision, 0, 0
        self._problem, self._at, self._x = problem, at, 0
        self.inside = 0

    def set(self, **feeds: np.ndarray) -> None:
        assert not self.closed
        if self._at == "set":
            raise BackendError(self._problem)
        self._x = int(feeds.get("x", np.array(self._x)))

    def run(self, frame: np.ndarray, mark: Mark = no_mark) -> np.ndarray:
        assert not self.closed
        if self._at == "run":
            raise BackendError(self._problem)
        self.frames += 1
        mark(self.precision)
        return frame + np.uint8(self._x)

    def carried(self) -> dict[str, np.ndarray]:
        return {"inside": np.array(self.inside)}

    def carry(self, **buffers: np.ndarray) -> None:
        self.inside = int(buffers["inside"])

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def said() -> list[str]:
    return []


def _switching(slow: Adds, fast: Future[Runner], said: list[str]) -> HotSwapRunner:
    return HotSwapRunner(slow, fast, said.append, ("openvino", "rtx"))


def test_frames_go_over_when_the_fast_runner_is_ready_with_feeds_and_what_is_carried(said: list[str]) -> None:
    slow, fast, coming = Adds("bf16"), Adds("fp16"), Future[Runner]()
    runner = _switching(slow, coming, said)
    marks: list[str] = []
    runner.set(x=np.array(5))
    assert runner.run(FRAME, marks.append).max() == 5
    runner.carry(inside=np.array(3))
    assert (runner.precision, runner.switched, said) == ("bf16", False, [])
    coming.set_result(fast)
    assert slow.closed == 0
    assert runner.run(FRAME, marks.append).max() == 5
    assert (runner.precision, runner.switched, slow.closed) == ("fp16", True, 1)
    assert (fast.inside, runner.carried()) == (3, {"inside": 3})
    runner.set(x=np.array(7))
    assert runner.run(FRAME, marks.append).max() == 7
    assert marks == ["bf16", "fp16", "fp16"]
    assert said == ["rtx is ready: frames now run there, in fp16, instead of on openvino"]
    runner.close()
    assert (slow.closed, fast.closed) == (1, 1)


def test_a_fast_runner_that_does_not_open_is_reported_once(said: list[str]) -> None:
    slow, coming = Adds("bf16"), Future[Runner]()
    runner = _switching(slow, coming, said)
    coming.set_exception(BackendError("no room\non the GPU"))
    for _ in range(3):
        runner.run(FRAME)
    assert said == ["rtx cannot be used, so frames stay on openvino: no room on the GPU"]
    assert (slow.frames, slow.closed, runner.switched) == (3, 0, True)


@pytest.mark.parametrize("at", ["set", "run"])
def test_one_that_fails_at_its_first_frame_costs_no_frame(said: list[str], at: str) -> None:
    slow, fast, coming = Adds("bf16"), Adds("fp16", "it broke", at), Future[Runner]()
    runner = _switching(slow, coming, said)
    runner.set(x=np.array(5))
    coming.set_result(fast)
    assert runner.run(FRAME).max() == 5
    assert runner.run(FRAME).max() == 5
    assert (slow.frames, slow.closed, fast.closed) == (2, 0, 1)
    assert said == ["rtx cannot be used, so frames stay on openvino: it broke"]


def test_a_mistake_in_the_program_is_not_hidden(said: list[str]) -> None:
    coming = Future[Runner]()
    runner = _switching(Adds("bf16"), coming, said)
    coming.set_exception(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        runner.run(FRAME)


def test_closing_early_closes_the_fast_runner_when_it_comes(said: list[str]) -> None:
    slow, fast, coming = Adds("bf16"), Adds("fp16"), Future[Runner]()
    coming.set_running_or_notify_cancel()  # too late to cancel
    runner = _switching(slow, coming, said)
    runner.close()
    assert (slow.closed, fast.closed) == (1, 0)
    coming.set_result(fast)
    assert fast.closed == 1
    [line] = said
    assert line.startswith("rtx was not ready in time; build its engines beforehand: ")
    assert line.endswith("std-rt engines build --backend rtx")


def test_closing_early_cancels_what_has_not_begun(said: list[str]) -> None:
    coming = Future[Runner]()
    _switching(Adds("bf16"), coming, said).close()
    assert coming.cancelled()
