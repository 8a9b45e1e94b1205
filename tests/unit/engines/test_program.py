"""What a program may be, and what its reference runner carries from run to run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from support.fake_engine import FakeEngine, float_ports

from std_rt.core.errors import BackendError
from std_rt.engines.host import HostRunner
from std_rt.engines.program import FRAME, STYLED, Launch, Program, launch_specs
from std_rt.engines.protocol import GraphSpec

BYTE, FLOAT = np.dtype(np.uint8), np.dtype(np.float32)
SHAPE = (1, 3, 1, 1)
BUFFERS = {
    FRAME: ((1, 1, 1, 3), BYTE),
    STYLED: ((1, 1, 1, 3), BYTE),
    "image": (SHAPE, FLOAT),
    "sum": (SHAPE, FLOAT),
    "last": (SHAPE, FLOAT),
    "one": ((1, 1, 1, 1), FLOAT),
}
IN = Launch("frame_in", {"frame": FRAME}, {"image": "image"}, "convert")
ADD = Launch("combine2", {"x": "image", "y": "last", "a": "one", "b": "one"}, {"out": "sum"}, "add")
KEEP = Launch("keep", {"x": "sum"}, {"y": "last"}, "keep")
OUT = Launch("frame_out", {"image": "sum"}, {"frame": STYLED}, "convert")
ONE = {"one": np.ones((1, 1, 1, 1), np.float32)}


def summing() -> Program:
    """Each run adds its frame to the sum of those before."""
    return Program((IN, ADD, KEEP, OUT), BUFFERS, ONE, frozenset({"last"}))


def runner(engine: FakeEngine | None = None) -> HostRunner:
    """Over an engine that, as real ones, overwrites at every call what it gave before."""
    return HostRunner({"keep": engine or keeping()}, summing())


def keeping() -> FakeEngine:
    return FakeEngine(lambda x: {"y": x}, float_ports(x=SHAPE), float_ports(y=SHAPE))


def grey(level: float) -> np.ndarray:
    """The frame whose image is ``level``."""
    return np.full((1, 1, 1, 3), round((level + 1) * 127.5), np.uint8)


def test_a_carried_buffer_counts_as_known_and_is_no_feed() -> None:
    program = summing()
    assert program.feeds == []
    with pytest.raises(ValueError, match=r"reads \['last'\] before it is written"):
        Program((IN, ADD, KEEP, OUT), BUFFERS, ONE)


def test_a_carried_buffer_that_nobody_writes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no launch writes \['last'\], which are carried"):
        Program((IN, ADD, OUT), BUFFERS, ONE, frozenset({"last"}))


def test_a_launch_that_writes_what_it_reads_is_refused() -> None:
    again = Launch("combine2", {"x": "image", "y": "last", "a": "one", "b": "one"}, {"out": "last"}, "add")
    with pytest.raises(ValueError, match=r"launch of combine2 writes \['last'\], which it reads"):
        Program((IN, again, ADD, OUT), BUFFERS, ONE, frozenset({"last"}))


def test_a_run_reads_what_the_last_one_left_and_the_first_one_zeros() -> None:
    engine = keeping()
    host, levels, found = runner(engine), (0.2, 0.1, -0.5, 0.4), []
    for level in levels:
        found.append(int(host.run(grey(level))[0, 0, 0, 0]))
        engine(x=np.full(SHAPE, 7, np.float32))  # as another program does that has the engine too
    expected = [round((level + 1) * 127.5) for level in np.cumsum(levels)]
    np.testing.assert_allclose(found, expected, atol=1)


def test_what_is_carried_is_handed_out_and_taken_as_a_copy() -> None:
    first, second = runner(), runner()
    first.run(grey(0.5))
    carried = first.carried()
    kept = carried["last"].copy()
    second.carry(**carried)
    carried["last"][...] = 9
    np.testing.assert_array_equal(first.carried()["last"], kept)
    np.testing.assert_array_equal(second.carried()["last"], kept)
    np.testing.assert_array_equal(second.run(grey(-0.25)), first.run(grey(-0.25)))


def test_only_carried_buffers_are_carried_and_only_feeds_are_set() -> None:
    host = runner()
    zeros = np.zeros(SHAPE, np.float32)
    with pytest.raises(BackendError, match="no buffer 'sum' to set; known: last"):
        host.carry(sum=zeros)
    with pytest.raises(BackendError, match="no buffer 'last' to set; known: none"):
        host.set(last=zeros)
    with pytest.raises(BackendError, match=r"'last' is float32 \[1, 3, 1, 1\]; got float32 \[3\]"):
        host.carry(last=zeros.reshape(3))


def test_what_is_baked_into_a_graph_is_hashed_once_however_often_it_is_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sha256, hashed = hashlib.sha256, []
    monkeypatch.setattr("hashlib.sha256", lambda *data: hashed.append(data) or sha256(*data))
    twice = Program((IN, ADD, KEEP, KEEP, OUT), BUFFERS, ONE, frozenset({"last"}))
    kept = GraphSpec("keep", Path("keep.onnx"), {"x": SHAPE}, "", baked={"x": np.ones(SHAPE, np.float32)})
    specs = launch_specs(twice, {"keep": kept})
    assert specs[2] is specs[3]
    assert specs[2].identity == specs[3].identity
    assert len(hashed) == 1
