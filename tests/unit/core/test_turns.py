"""Turns: a lock handed on in the order of asking."""

from __future__ import annotations

import threading

from support.live_support import wait_until

from std_rt.core.turns import Turns


def test_threads_get_it_in_the_order_in_which_they_asked() -> None:
    turns, order = Turns(), []

    def take(name: int) -> None:
        with turns:
            order.append(name)

    threads = [threading.Thread(target=take, args=(name,)) for name in range(6)]
    with turns:
        for count, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda count=count: len(turns._waiting) == count)  # type: ignore[misc]
    with turns:  # a thread that comes back at once waits behind those that are there
        order.append(-1)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4, 5, -1]


def test_blocks_may_be_nested_and_only_the_outer_one_hands_on() -> None:
    turns, inside = Turns(), []

    def other() -> None:
        with turns:
            inside.append(True)

    thread = threading.Thread(target=other)
    with turns:
        with turns:
            thread.start()
            wait_until(lambda: turns._waiting)
        assert not inside
    thread.join()
    assert inside


def test_an_error_in_a_block_hands_it_on() -> None:
    turns = Turns()
    try:
        with turns:
            raise ValueError
    except ValueError:
        pass
    thread = threading.Thread(target=turns.__enter__)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
