"""Who runs and who waits: priorities, pauses that change nothing, and turns between accounts."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_bench import GREEDY, VOCAB, Bench, Clock, solo
from fakes import FakeRunner, scripted
from hearthd.engine import Finished, FinishReason, Sequence
from hearthd.scheduling.priority import Priority
from hearthd.sequence import SequenceState

INTERACTIVE, NORMAL, BACKGROUND = Priority
LONG = replace(GREEDY, max_tokens=40)
SHORT = replace(GREEDY, max_tokens=2)


class Ticking(Clock):
    """A clock by which no two things happen at once."""

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def roomy(num_slots: int = 1, num_paused: int = 3, prefill_chunk: int = 8) -> Bench:
    """Return a bench whose runner has slots for paused sequences besides those that run."""
    return Bench(runner=FakeRunner(num_slots=num_slots + num_paused), num_slots=num_slots, prefill_chunk=prefill_chunk)


def endless(num_slots: int = 1) -> FakeRunner:
    """Return a runner whose answers end by their length alone."""
    return FakeRunner(num_slots=num_slots, logits_after=scripted(VOCAB, 1, [65]))


def ends(bench: Bench) -> list[Sequence]:
    return [owner for owner, event in bench.events if isinstance(event, Finished)]


class TestPriorities:
    def test_the_more_urgent_ones_begin_first(self) -> None:
        bench = Bench(runner=FakeRunner(num_slots=1))
        later, usual, first = (bench.add([number], priority=number) for number in (BACKGROUND, NORMAL, INTERACTIVE))
        bench.step()
        assert [bench.positions(each) for each in (first, usual, later)] == [[], [0], [1]]
        bench.finish()
        assert ends(bench) == [first, usual, later]

    @pytest.mark.parametrize("num_steps", [1, 2, 5])
    def test_an_answer_makes_room_at_once_and_goes_on_afterwards(self, num_steps: int) -> None:
        bench = roomy()
        paused = bench.add([1, 2], LONG, priority=BACKGROUND)
        bench.step(num_steps)
        num_written = len(paused.output_ids)
        urgent = bench.add([3, 4], GREEDY, priority=INTERACTIVE)
        bench.step()
        assert paused.state is SequenceState.PAUSED
        assert (len(urgent.output_ids), bench.engine.num_running, bench.engine.num_paused) == (1, 1, 1)
        while not ends(bench):
            assert len(paused.output_ids) == num_written
            bench.step()
        bench.finish()
        assert ends(bench) == [urgent, paused]
        assert urgent.output_ids == solo([3, 4])
        assert paused.output_ids == solo([1, 2], LONG)

    def test_a_pause_computes_nothing_again(self) -> None:
        bench, undisturbed = roomy(), roomy()
        paused = bench.add(range(20), LONG, priority=BACKGROUND)
        bench.step(8)
        urgent = bench.add([3, 4], SHORT, priority=INTERACTIVE)
        bench.finish()
        undisturbed.add(range(20), LONG)
        undisturbed.finish()
        num_own = len(urgent.output_ids)  # one chunk, and one run for each token but the first
        assert bench.runner.num_forwards == undisturbed.runner.num_forwards + num_own
        assert paused.output_ids == solo(range(20), LONG)

    def test_a_prompt_makes_room_between_two_chunks(self) -> None:
        bench = roomy(prefill_chunk=4)
        paused = bench.add(range(20), SHORT, priority=BACKGROUND)
        bench.step(2)
        urgent = bench.add([7, 7], SHORT, priority=NORMAL)
        bench.runner.calls.clear()
        bench.step()
        assert [length for _, _, length in bench.runner.calls] == [2]
        bench.finish()
        # Two of its five chunks were read before; none was read again.
        assert [length for _, _, length in bench.runner.calls] == [2, 1, 4, 4, 4, 1]
        assert ends(bench) == [urgent, paused]
        assert paused.output_ids == solo(range(20), SHORT)

    def test_the_more_urgent_prompt_is_read_first(self) -> None:
        bench = Bench(prefill_chunk=4)
        slow = bench.add(range(40), SHORT, priority=BACKGROUND)
        bench.step()
        urgent = bench.add(range(50, 58), SHORT, priority=INTERACTIVE)
        bench.step(2)
        assert (len(urgent.output_ids), slow.output_ids) == (1, [])
        bench.finish()
        assert slow.output_ids == solo(range(40), SHORT)

    def test_equals_are_not_paused(self) -> None:
        bench = roomy()
        running = bench.add([1], LONG)
        bench.step()
        waiting = bench.add([2], LONG)
        bench.step(3)
        assert (running.state, waiting.state) == (SequenceState.DECODING, SequenceState.WAITING)

    def test_the_least_urgent_one_that_came_last_makes_room(self) -> None:
        bench = roomy(num_slots=3)
        first, usual, last = (bench.add([n], LONG, priority=p) for n, p in enumerate((BACKGROUND, NORMAL, BACKGROUND)))
        bench.step(3)
        bench.add([9], LONG, priority=INTERACTIVE)
        bench.step()
        assert [each.state for each in (first, usual, last)] == [
            SequenceState.DECODING,
            SequenceState.DECODING,
            SequenceState.PAUSED,
        ]

    def test_who_was_paused_goes_on_before_an_equal_begins(self) -> None:
        bench = roomy()
        paused = bench.add([1], replace(GREEDY, max_tokens=6), priority=BACKGROUND)
        bench.step(2)
        urgent = bench.add([2], SHORT, priority=INTERACTIVE)
        waiting = bench.add([3], SHORT, priority=BACKGROUND)
        bench.finish()
        assert ends(bench) == [urgent, paused, waiting]

    def test_without_room_for_its_kv_an_urgent_one_waits_and_nobody_is_paused_in_vain(self) -> None:
        bench = roomy(num_slots=1, num_paused=0)
        running = bench.add([1], replace(GREEDY, max_tokens=4), priority=BACKGROUND)
        bench.step()
        urgent = bench.add([2], SHORT, priority=INTERACTIVE)
        bench.step()
        assert running.state is SequenceState.DECODING
        bench.finish()
        assert ends(bench) == [running, urgent]

    def test_paused_ones_that_hold_all_the_room_go_on(self) -> None:
        bench = roomy(num_slots=1, num_paused=1)
        low = bench.add([1], LONG, priority=BACKGROUND)
        bench.step()
        middle = bench.add([2], LONG, priority=NORMAL)
        bench.step()
        high = bench.add([3], SHORT, priority=INTERACTIVE)
        bench.step()
        # No slot is left for the most urgent one: the next runs meanwhile, and gives it its slot when it ends.
        assert [each.state for each in (low, middle, high)] == [
            SequenceState.PAUSED,
            SequenceState.DECODING,
            SequenceState.WAITING,
        ]
        bench.finish()
        assert ends(bench) == [middle, high, low]

    def test_a_paused_one_that_leaves_gives_its_slot_back(self) -> None:
        bench = roomy(num_slots=1, num_paused=1)
        paused = bench.add([1], LONG, priority=BACKGROUND)
        bench.step()
        urgent = bench.add([2], LONG, priority=INTERACTIVE)
        bench.step()
        bench.engine.remove(paused)
        assert (bench.engine.num_running, bench.engine.num_paused) == (1, 0)
        again = bench.add([4], SHORT, priority=BACKGROUND)
        bench.finish()
        assert again.output_ids == solo([4], SHORT)
        assert urgent.output_ids == solo([2], LONG)

    def test_the_time_of_a_pause_counts_for_the_limit_and_is_told(self) -> None:
        bench = roomy()
        bench.engine._max_answer_seconds = 100.0
        paused = bench.add([1, 2], LONG, priority=BACKGROUND)
        bench.step()
        bench.clock.now += 1
        bench.step()
        urgent = bench.add([3], LONG, priority=INTERACTIVE)
        bench.step()
        bench.clock.now += 10
        bench.engine.remove(urgent)
        bench.step()
        bench.clock.now += 3
        bench.step()
        bench.add([3], replace(GREEDY, max_tokens=200), priority=INTERACTIVE)
        bench.step()
        bench.clock.now += 86
        bench.step()
        finished = bench.finished(paused)
        assert finished.reason is FinishReason.TIME_LIMIT
        assert finished.paused_seconds == 96
        assert (finished.prefill_seconds, finished.decode_seconds) == (0, 4)

    def test_fewer_places_pause_those_that_are_too_many(self) -> None:
        bench = Bench()
        first, second = bench.add([1]), bench.add([2])
        bench.step(2)
        bench.engine.limit_running(1)
        bench.step()
        assert (first.state, second.state) == (SequenceState.DECODING, SequenceState.PAUSED)
        bench.engine.limit_running(99)
        bench.step()
        assert second.state is SequenceState.DECODING
        bench.finish()
        assert (first.output_ids, second.output_ids) == (solo([1]), solo([2]))


class TestTurns:
    def test_a_flood_delays_another_caller_by_one_job(self) -> None:
        bench = Bench(runner=endless())
        flood = [bench.add([number], SHORT, account="flood") for number in range(20)]
        bench.step()
        other = bench.add([99], SHORT, account="other")
        bench.finish()
        assert ends(bench)[:2] == [flood[0], other]
        assert bench.positions(other) == [0]

    def test_callers_take_turns_however_many_each_has_sent(self) -> None:
        bench = Bench(runner=endless())
        for account, count in (("a", 6), ("b", 3), ("c", 3)):
            for _ in range(count):
                bench.add([1], SHORT, account=account)
        bench.finish()
        assert "".join(each.account for each in ends(bench)) == "abcabcabcaaa"

    def test_turns_are_of_tokens_and_not_of_requests(self) -> None:
        bench = Bench(runner=endless())
        for _ in range(3):
            bench.add([1], replace(GREEDY, max_tokens=9), account="long")
        for _ in range(12):
            bench.add([1], replace(GREEDY, max_tokens=3), account="short")
        bench.finish()
        # 8 runs of an answer's token against 2: four short ones for a long one.
        assert "".join(each.account[0] for each in ends(bench)) == "lssss" * 3

    def test_who_comes_after_idling_has_neither_credit_nor_debt(self) -> None:
        bench = Bench(runner=endless())
        bench.add([1], LONG, account="b")
        bench.finish()
        for _ in range(6):
            bench.add([1], SHORT, account="a")
        bench.step()
        for _ in range(3):
            bench.add([1], SHORT, account="b")
        bench.events.clear()
        bench.finish()
        assert "".join(each.account for each in ends(bench)) == "ababab" + "aaa"

    def test_turns_are_taken_within_a_priority_only(self) -> None:
        bench = Bench(runner=endless())
        urgent = [bench.add([1], LONG, account="a", priority=INTERACTIVE) for _ in range(3)]
        other = bench.add([1], SHORT, account="b", priority=BACKGROUND)
        bench.finish()
        assert ends(bench) == [*urgent, other]

    @settings(max_examples=150, deadline=None)
    @given(
        floods=st.lists(st.integers(1, 12), min_size=1, max_size=3),
        lengths=st.lists(st.integers(1, 9), min_size=40, max_size=40),
        before=st.integers(0, 30),
        own_past=st.integers(0, 2),
        num_slots=st.integers(1, 3),
    )
    def test_nobody_waits_for_more_than_one_job_of_each_other_caller(
        self, floods: list[int], lengths: list[int], before: int, own_past: int, num_slots: int
    ) -> None:
        """Whatever the others have sent, and whatever the caller has been served before."""
        bench = Bench(runner=endless(num_slots), clock=Ticking())
        for _ in range(own_past):
            bench.add([1], LONG, account="late")
            bench.finish()
        lengths_left = iter(lengths)
        others = [
            bench.add([1], replace(GREEDY, max_tokens=next(lengths_left)), account=str(account))
            for account, count in enumerate(floods)
            for _ in range(count)
        ]
        bench.step(before)
        arrived = bench.clock()
        late = bench.add([2], SHORT, account="late")
        bench.finish()
        ahead = [each.account for each in others if arrived < (each.admitted or 0.0) < (late.admitted or 0.0)]
        assert len(ahead) == len(set(ahead))
