"""Whose turn it is: one thread at a time, the most urgent first, and nobody is passed for ever."""

import queue
import threading
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from hearthd.inference.baton import MAX_PASSED, Baton
from hearthd.priority import Priority

TIMEOUT_SECONDS = 30.0
INTERACTIVE, NORMAL, BACKGROUND = Priority


@dataclass(eq=False)
class Thread:
    """One that asks, and what it hears of the baton."""

    name: str = ""
    num_woken: int = 0
    made_way: list[Priority] = field(default_factory=list)

    def wake(self) -> None:
        self.num_woken += 1

    def make_way(self, priority: Priority) -> None:
        self.made_way.append(priority)


def test_the_most_urgent_is_next_and_of_equals_the_one_that_asked_first() -> None:
    baton, holder = Baton(), Thread()
    assert baton.ask(holder, NORMAL)
    asked = [(Thread(urgency.word), urgency) for urgency in (BACKGROUND, NORMAL, INTERACTIVE, NORMAL, INTERACTIVE)]
    for thread, urgency in asked:
        assert not baton.ask(thread, urgency)
    baton.leave(holder)
    for place in (2, 4, 1, 3, 0):
        thread, urgency = asked[place]
        assert [each.num_woken for each, _ in asked if each is not thread] == [
            int(each.num_woken > 0) for each, _ in asked if each is not thread
        ]
        assert thread.num_woken == 1
        assert baton.ask(thread, urgency)
        baton.leave(thread)


def turns(baton: Baton, count: int, **urgencies: Priority) -> str:
    """Let threads be busy all the time, as fast as they can; return whose the turns were."""
    threads = {name: Thread(name) for name in urgencies}
    taken = ""
    while len(taken) < count:
        (holder,) = [name for name, thread in threads.items() if baton.ask(thread, urgencies[name])]
        taken += holder
        baton.leave(threads[holder], urgencies[holder])
    return taken


def test_equals_take_turns_step_by_step() -> None:
    assert turns(Baton(), 9, a=NORMAL, b=NORMAL, c=NORMAL) == "abcabcabc"


def test_beside_a_more_urgent_one_there_is_one_turn_after_25() -> None:
    taken = turns(Baton(), 4 * 26, a=INTERACTIVE, b=BACKGROUND)
    assert taken == ("a" * 25 + "b") * 4


def test_two_less_urgent_ones_get_a_turn_each() -> None:
    taken = turns(Baton(), 300, a=INTERACTIVE, b=NORMAL, c=BACKGROUND)
    assert taken.count("b") == taken.count("c") > 10


def test_between_two_steps_of_a_more_urgent_one_nobody_begins() -> None:
    baton, urgent, other = Baton(), Thread(), Thread()
    assert baton.ask(urgent, INTERACTIVE)
    assert not baton.ask(other, NORMAL)
    baton.leave(urgent, INTERACTIVE)
    assert not baton.ask(other, NORMAL)
    assert baton.ask(urgent, INTERACTIVE)
    # What is left to do is no more urgent than what waits.
    baton.leave(urgent, NORMAL)
    assert other.num_woken == 1
    assert baton.ask(other, NORMAL)


def test_one_whose_request_becomes_urgent_says_so_in_line() -> None:
    baton, holder, first, second = Baton(), Thread(), Thread(), Thread()
    assert baton.ask(holder, NORMAL)
    assert not baton.ask(first, NORMAL)
    assert not baton.ask(second, BACKGROUND)
    assert not baton.ask(second, INTERACTIVE)
    # A run that it need not wait for is stopped; the thread itself knows which.
    assert holder.made_way == [NORMAL, BACKGROUND, INTERACTIVE]
    baton.leave(holder, NORMAL)
    assert (first.num_woken, second.num_woken) == (0, 1)


def test_what_nobody_waits_for_is_done_while_nobody_waits_for_anything() -> None:
    baton, idle, busy = Baton(), Thread(), Thread()
    assert baton.ask(busy, BACKGROUND)
    for _ in range(3 * MAX_PASSED):
        assert not baton.ask(idle, None)
        baton.leave(busy, BACKGROUND)
        assert baton.ask(busy, BACKGROUND)
    assert busy.made_way == []
    baton.leave(busy)
    assert idle.num_woken == 1
    assert baton.ask(idle, None)
    # Somebody comes.
    assert not baton.ask(busy, BACKGROUND)
    assert idle.made_way == [BACKGROUND]


def test_who_leaves_the_line_is_given_nothing() -> None:
    baton, holder, gone, other = Baton(), Thread(), Thread(), Thread()
    assert baton.ask(holder, NORMAL)
    assert not baton.ask(gone, INTERACTIVE)
    assert not baton.ask(other, BACKGROUND)
    baton.leave(gone)
    baton.leave(holder)
    assert (gone.num_woken, other.num_woken) == (0, 1)


def test_who_is_busy_is_known_to_the_others_alone() -> None:
    baton, one, other = Baton(), Thread(), Thread()
    baton.ask(one, NORMAL)
    assert [baton.has_others(other, priority) for priority in Priority] == [False, True, True]
    assert not baton.has_others(one, BACKGROUND)
    baton.leave(one, BACKGROUND)
    assert [baton.has_others(other, priority) for priority in Priority] == [False, False, True]
    baton.leave(one)
    assert not baton.has_others(other, BACKGROUND)


class Oracle:
    """Any threads that do anything they may, and what must hold of the baton then."""

    def __init__(self, num_threads: int, max_passed: int) -> None:
        self.baton = Baton(max_passed)
        self.max_passed = max_passed
        self.threads = [Thread(str(number)) for number in range(num_threads)]
        self.urgencies: dict[Thread, Priority | None] = dict.fromkeys(self.threads)
        self.line: dict[Thread, int] = {}
        """Who asked and has not got it, in that order, with the turns of others since."""
        self.holder: Thread | None = None

    def act(self, thread: Thread, urgency: Priority | None, *, asks: bool) -> None:
        before = {each: each.num_woken for each in self.threads}
        has_had = self.holder is thread
        self.urgencies[thread] = urgency
        if asks:
            if not has_had:
                self.line.setdefault(thread, int(self.holder is not None))
                if urgency is None:
                    self.line[thread] = 0
            has_it = self.baton.ask(thread, urgency)
        else:
            self.line.pop(thread, None)
            self.holder = None if has_had else self.holder
            has_it = False
            self.baton.leave(thread, urgency)
        given = [each for each in self.threads if each.num_woken > before[each]]
        if has_it and not has_had:
            given.append(thread)
        assert len(given) <= 1
        for each in given:
            self.give(each)
        assert has_it == (asks and self.holder is thread)
        self.check_that_nobody_waits_in_vain()

    def give(self, thread: Thread) -> None:
        assert self.holder is None, "two have it"
        passed = self.line.pop(thread)
        rank = self.rank(thread)
        overdue = [each for each, number in self.line.items() if number >= self.max_passed]
        if passed < self.max_passed:
            assert not overdue
            assert all(self.rank(each) >= rank for each in self.threads)
            # Of equals nobody has asked before.
            assert passed >= max((self.line[each] for each in self.line if self.rank(each) == rank), default=0)
        self.holder = thread
        for each in self.line:
            self.line[each] += self.urgencies[each] is not None
            assert self.line[each] <= self.max_passed + len(self.threads) - 2

    def rank(self, thread: Thread) -> int:
        urgency = self.urgencies[thread]
        return len(Priority) if urgency is None else urgency

    def check_that_nobody_waits_in_vain(self) -> None:
        """Free it is only for a more urgent one than all in line, which will ask."""
        if self.holder is None and self.line:
            coming = [each for each in self.threads if each not in self.line]
            best = min(self.rank(each) for each in self.line)
            assert min((self.rank(each) for each in coming), default=len(Priority)) < best


@given(
    st.integers(2, 4),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([*Priority, None]), st.booleans()), max_size=80),
)
def test_any_schedule_has_one_holder_the_most_urgent_next_and_nobody_passed_for_ever(
    num_threads: int, max_passed: int, actions: list[tuple[int, Priority | None, bool]]
) -> None:
    oracle = Oracle(num_threads, max_passed)
    for number, urgency, asks in actions:
        oracle.act(oracle.threads[number % num_threads], urgency, asks=asks)


@given(st.lists(st.sampled_from(Priority), min_size=2, max_size=4), st.integers(1, 5))
def test_all_who_are_busy_get_their_turns(urgencies: list[Priority], max_passed: int) -> None:
    names = "abcd"[: len(urgencies)]
    taken = turns(Baton(max_passed), 200, **dict(zip(names, urgencies, strict=True)))
    for name in names:
        waits = [len(wait) for wait in taken.split(name)]
        assert max(waits) <= max_passed + len(names) - 2 or max(waits) < len(names)


class Blocking(Thread):
    """One in a thread of its own, as an inference thread waits."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()

    def wake(self) -> None:
        self._calls.put(None)

    def take(self, baton: Baton, urgency: Priority) -> None:
        while not baton.ask(self, urgency):
            self._calls.get(timeout=TIMEOUT_SECONDS)


def test_real_threads_have_it_one_at_a_time_and_lose_no_turn() -> None:
    baton, inside, most, num_turns = Baton(), 0, 0, 0

    def work(urgency: Priority) -> None:
        nonlocal inside, most, num_turns
        thread = Blocking()
        for left in range(200)[::-1]:
            thread.take(baton, urgency)
            inside += 1
            most = max(most, inside)
            num_turns += 1
            inside -= 1
            baton.leave(thread, urgency if left else None)

    threads = [threading.Thread(target=work, args=(urgency,), daemon=True) for urgency in (*Priority, NORMAL)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive()
    assert (most, num_turns) == (1, 800)
