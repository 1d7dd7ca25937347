"""Whose turn it is: one thread at a time, in the order in which they asked."""

import itertools
import threading
from collections.abc import Callable

import pytest

from hearthd.inference.baton import Baton

TIMEOUT_SECONDS = 30.0


def start(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def wait_until_waiting(baton: Baton, count: int) -> None:
    """A thread cannot say that it waits: it does nothing any more."""
    while baton.num_waiting < count:
        pass


def test_one_thread_at_a_time() -> None:
    baton, inside, most = Baton(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            with baton:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [start(work) for _ in range(4)]
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive()
    assert most == 1
    assert baton.num_waiting == 0


def test_turns_come_in_the_order_of_asking() -> None:
    baton, order = Baton(), []

    def take(name: int) -> None:
        with baton:
            order.append(name)

    threads = []
    with baton:
        for name in range(5):
            threads.append(start(lambda name=name: take(name)))  # type: ignore[misc]
            wait_until_waiting(baton, name + 1)
        assert order == []
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
    assert order == [0, 1, 2, 3, 4]


def test_two_busy_threads_take_turns_step_by_step() -> None:
    baton, order = Baton(), []
    both = threading.Barrier(2)

    def work(name: str) -> None:
        both.wait(TIMEOUT_SECONDS)
        for _ in range(50):
            with baton:
                order.append(name)
                # The other one has asked by the end of this step, unless it is done.
                while baton.num_waiting == 0 and order.count("b" if name == "a" else "a") < 50:
                    pass

    threads = [start(lambda name=name: work(name)) for name in "ab"]  # type: ignore[misc]
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
    assert len(order) == 100
    assert all(left != right for left, right in itertools.pairwise(order))


def test_a_step_that_fails_hands_the_baton_on() -> None:
    baton = Baton()
    with pytest.raises(ZeroDivisionError), baton:
        _ = 1 // 0
    done = threading.Event()

    def take() -> None:
        with baton:
            done.set()

    start(take)
    assert done.wait(TIMEOUT_SECONDS)


def test_who_is_busy_is_known_to_the_others_alone() -> None:
    baton, one, other = Baton(), object(), object()
    assert not baton.has_others(one)
    for _ in range(2):
        baton.note(one, is_busy=True)
    assert baton.has_others(other)
    assert not baton.has_others(one)
    baton.note(other, is_busy=True)
    assert baton.has_others(one)
    for _ in range(2):
        baton.note(one, is_busy=False)
    assert baton.has_others(one)
    assert not baton.has_others(other)
