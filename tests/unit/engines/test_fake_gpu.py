"""The made-up GPU catches what a real one punishes: each fault, put into a program that works, is seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support.fake_gpu import POISON, FakeDevice

KIND = np.dtype(np.float32)


@pytest.fixture
def device() -> FakeDevice:
    made = FakeDevice()
    made.bind()
    return made


def test_nothing_is_done_before_somebody_waits(device: FakeDevice) -> None:
    stream, given, back = device.stream(), device.pinned((2,), KIND), device.pinned((2,), KIND)
    address = device.allocate(8)
    given[...] = 1, 2
    device.upload(address, given, stream)
    device.download(back, address, stream)
    assert (back.view(np.uint8) == POISON).all()  # a forgotten wait
    device.synchronize(stream)
    np.testing.assert_array_equal(back, (1, 2))


def test_an_event_waits_for_what_is_before_it_and_for_nothing_else(device: FakeDevice) -> None:
    stream, address, event = device.stream(), device.allocate(4), device.event()
    first, second = np.ones(1, np.float32), np.full(1, 2, np.float32)
    back = [np.zeros(1, np.float32), np.zeros(1, np.float32)]
    device.upload(address, first, stream)
    device.download(back[0], address, stream)
    device.record(event, stream)
    device.upload(address, second, stream)
    device.download(back[1], address, stream)
    device.wait(event)
    assert (back[0][0], back[1][0]) == (1, 0)
    device.synchronize(stream)
    assert back[1][0] == 2


def test_streams_are_not_in_order_among_each_other(device: FakeDevice) -> None:
    one, two, address = device.stream(), device.stream(), device.allocate(4)
    back = np.zeros(1, np.float32)
    device.upload(address, np.ones(1, np.float32), one)
    device.download(back, address, two)
    device.synchronize(two)
    assert back[0] != 1


def test_pinned_memory_that_is_changed_too_early_is_copied_as_it_is_then(device: FakeDevice) -> None:
    stream, given, back = device.stream(), device.pinned((1,), KIND), np.zeros(1, np.float32)
    address = device.allocate(4)
    given[0] = 1
    device.upload(address, given, stream)
    given[0] = 2
    device.download(back, address, stream)
    device.synchronize(stream)
    assert back[0] == 2


def test_memory_freed_too_early_is_an_error(device: FakeDevice) -> None:
    stream, given, address = device.stream(), device.pinned((1,), KIND), device.allocate(4)
    device.upload(address, given, stream)
    device.free(address)
    with pytest.raises(AssertionError, match="nothing is allocated"):
        device.synchronize(stream)
    address = device.allocate(4)
    device.upload(address, given, stream)
    device.free_pinned(given)
    assert (given.view(np.uint8) == POISON).all()
    with pytest.raises(AssertionError, match="freed too early"):
        device.synchronize(stream)


def test_a_captured_graph_with_a_stale_address_is_an_error(device: FakeDevice) -> None:
    stream, address, given = device.stream(), device.allocate(4), np.ones(1, np.float32)
    graph = device.capture(stream, lambda: device.upload(address, given, stream))
    device.launch(graph, stream)
    device.synchronize(stream)
    device.free(address)
    device.allocate(4)
    device.launch(graph, stream)
    with pytest.raises(AssertionError, match="nothing is allocated"):
        device.synchronize(stream)


@pytest.mark.parametrize(
    "call",
    [
        lambda device, stream: device.allocate(4),
        lambda device, stream: device.pinned((1,), KIND),
        lambda device, stream: device.synchronize(stream),
        lambda device, stream: device.drain(),
        lambda device, stream: device.stream(),
    ],
)
def test_what_breaks_a_capture_is_an_error(
    device: FakeDevice, call: Callable[[FakeDevice, int], object]
) -> None:
    stream = device.stream()
    with pytest.raises(AssertionError, match="breaks the capture"):
        device.capture(stream, lambda: call(device, stream) and None)
    assert not device.capturing
