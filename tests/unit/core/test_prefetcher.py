"""Prefetcher: order, bounds, what is dropped, and every way to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from std_rt.core.prefetcher import Prefetcher

SOON_S = 10.0


def wait_for(condition: object, *arguments: object) -> None:
    """Until ``condition()`` holds; a test that waits longer has failed."""
    end = time.monotonic() + SOON_S
    while not condition(*arguments):  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


@pytest.mark.parametrize("room", [1, 2, 7])
def test_everything_comes_in_order(room: int) -> None:
    with Prefetcher(range(200), room=room) as items:
        assert list(items) == list(range(200))
        assert items.over
        assert items.drops == 0


def test_a_full_queue_holds_its_maker_back() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            yield i

    with Prefetcher(make(), room=3) as items:
        wait_for(lambda: len(made) == 4)  # three wait, the fourth is in hand
        time.sleep(0.05)
        assert len(made) == 4
        assert next(items) == 0
        wait_for(lambda: len(made) == 5)
        assert list(items) == list(range(1, 10))


def test_latest_drops_the_oldest_and_counts_it() -> None:
    gone: list[int] = []
    with Prefetcher(range(100), room=2, latest=True, dropped=gone.append) as items:
        wait_for(lambda: items.drops == 98)
        assert list(items) == [98, 99]
    assert gone == list(range(98))


def test_what_the_maker_raises_comes_after_what_it_made() -> None:
    def make() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("broken")

    with Prefetcher(make(), room=5) as items:
        assert next(items) == 1
        assert next(items) == 2
        assert not items.over
        with pytest.raises(KeyError, match="broken"):
            next(items)
        assert items.over
        assert list(items) == []


def test_get_gives_up_in_time() -> None:
    hold = threading.Event()

    def make() -> Iterator[int]:
        hold.wait(SOON_S)
        yield 1

    with Prefetcher(make()) as items:
        assert items.get(0.01) is None
        assert not items.over
        hold.set()
        assert items.get(SOON_S) == 1
        assert items.get(SOON_S) is None
        assert items.over


def test_closing_ends_the_thread_and_its_generator() -> None:
    ended: list[str] = []

    def make() -> Iterator[int]:
        try:
            yield from range(10_000)
        finally:
            ended.append(threading.current_thread().name)

    items = Prefetcher(make(), room=1, name="made")
    assert next(items) == 0
    items.close(SOON_S)
    assert not items._thread.is_alive()
    assert ended == ["std-rt-made"]  # in its own thread: some libraries insist
    assert items.over
    assert list(items) == []


def test_closing_the_second_of_two_that_wait_for_each_other() -> None:
    """The second waits for the first, which waits for a camera: neither may hang the end."""
    hold = threading.Event()

    def camera() -> Iterator[int]:
        hold.wait(SOON_S)
        yield 1

    with Prefetcher(camera()) as first, Prefetcher(iter(first)) as second:
        assert second.get(0.01) is None
    wait_for(lambda: not second._thread.is_alive())
    hold.set()
    wait_for(lambda: not first._thread.is_alive())


def test_an_error_of_the_first_reaches_the_consumer_of_the_last() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise OSError("camera")

    with Prefetcher(make()) as first, Prefetcher(n + 1 for n in first) as second:
        assert next(second) == 2
        with pytest.raises(OSError, match="camera"):
            next(second)


def test_a_queue_without_room_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Prefetcher([], room=0)
