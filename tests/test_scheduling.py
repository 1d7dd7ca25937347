"""Who runs and who waits: priorities, pauses that change nothing, turns between accounts, stalls, and estimates."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine_bench import END, GREEDY, VOCAB, Bench, Clock, decoded, solo
from fakes import FakeRunner, scripted
from hearthd.errors import DeadlineTooShortError
from hearthd.generation.drafting import Drafting
from hearthd.generation.engine import Finished, FinishReason, Queued, RunTerminated, Sequence
from hearthd.kv.budget import KVBudget
from hearthd.priority import Priority
from hearthd.sequences.sequence import SequenceState

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


class Machine(FakeRunner):
    """A runner on a machine of a known pace: each run moves the clock."""

    def __init__(self, clock: Clock, *, prompt_seconds: float, decode_seconds: float, **options: Any) -> None:
        super().__init__(context_length=4096, logits_after=scripted(VOCAB, 1, [65]), **options)
        self.clock, self.prompt_seconds, self.decode_seconds = clock, prompt_seconds, decode_seconds
        self.durations: list[float] = []

    def forward(
        self, token_ids: NDArray[np.int64], first_slot: int, past_lengths: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        length = token_ids.shape[1]
        self.durations.append(self.decode_seconds if length == 1 else length * self.prompt_seconds)
        self.clock.now += self.durations[-1]
        return super().forward(token_ids, first_slot, past_lengths)


def on_machine(num_slots: int = 4, num_paused: int = 0, **options: Any) -> tuple[Bench, Machine]:
    """Return a bench that reads 400 tokens a second and writes 50, and has done both."""
    clock = Clock()
    pace: dict[str, Any] = {"prompt_seconds": 0.0025, "decode_seconds": 0.02} | {
        name: options.pop(name) for name in ("prompt_seconds", "decode_seconds", "kv_budget") if name in options
    }
    machine = Machine(clock, num_slots=num_slots + num_paused, **pace)
    settings = {"prefill_chunk": 64, "solo_prefill_chunk": 256} | options
    bench = Bench(runner=machine, clock=clock, num_slots=num_slots, **settings)
    bench.add([9] * 40, replace(GREEDY, max_tokens=10), identity="warm-up")
    bench.finish()
    machine.calls.clear()
    machine.durations.clear()
    return bench, machine


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
        bench = Bench(runner=endless(6), num_slots=3)
        endlessly = replace(GREEDY, max_tokens=200)
        first, usual, last = (
            bench.add([n], endlessly, priority=p) for n, p in enumerate((BACKGROUND, NORMAL, BACKGROUND))
        )
        bench.step(60)
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

    def test_without_room_for_its_kv_one_waits_and_nobody_is_paused_in_vain(self) -> None:
        bench = short_of_memory(20, 0)
        usual = [bench.add([n], replace(GREEDY, max_tokens=500)) for n in range(2)]  # 8 blocks each
        running = bench.add([2], replace(GREEDY, max_tokens=100), priority=BACKGROUND)  # 2
        bench.engine.limit_running(3)
        bench.step(5)
        waiting = bench.add([3], replace(GREEDY, max_tokens=500))
        bench.step()
        # It would get the place, but not 8 of 4 blocks.
        assert (running.state, waiting.state) == (SequenceState.WAITING, SequenceState.WAITING)
        bench.finish()
        assert [each.output_ids for each in [*usual, running, waiting]] == [
            solo([n], replace(GREEDY, max_tokens=100 if n == 2 else 500)) for n in range(4)
        ]

    def test_paused_ones_that_hold_all_the_room_go_on(self) -> None:
        bench = roomy(num_slots=1, num_paused=1)
        first = bench.add([1], LONG)
        bench.step()
        urgent = bench.add([2], LONG, priority=INTERACTIVE)
        bench.step()
        another = bench.add([3], SHORT, priority=INTERACTIVE)
        again = bench.add([4], SHORT)
        bench.step()
        assert [each.state for each in (first, urgent, another, again)] == [
            SequenceState.PAUSED,
            SequenceState.DECODING,
            SequenceState.WAITING,
            SequenceState.WAITING,
        ]
        bench.finish()
        assert ends(bench) == [urgent, another, first, again]

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


def short_of_memory(num_blocks: int = 36, prompt_factor: int = 4, **options: Any) -> Bench:
    """Return a bench with places and slots enough, and memory for so many blocks of 64 tokens."""
    budget = KVBudget(64, num_blocks, prompt_factor)
    runner = FakeRunner(num_slots=8, context_length=1024, kv_budget=budget, **options)
    return Bench(runner=runner, num_slots=4, prefill_chunk=64)


def note_answers_put_back(bench: Bench) -> list[Sequence]:
    """Return a list that grows with each answer that gives its memory to another request."""
    given: list[Sequence] = []
    scheduler = bench.engine._scheduler
    put_back = scheduler.put_back

    def noted(sequence: Sequence) -> None:
        if sequence.output_ids:
            given.append(sequence)
        put_back(sequence)

    scheduler.put_back = noted  # type: ignore[method-assign]
    return given


class TestMemory:
    PROMPT = tuple(number % 50 for number in range(400))

    @pytest.mark.parametrize("pausing", [False, True])
    def test_a_prompt_that_is_read_gives_its_memory_to_a_more_urgent_one(self, *, pausing: bool) -> None:
        bench = short_of_memory()
        slow = bench.add(self.PROMPT, SHORT, priority=NORMAL)
        bench.step(3)
        if pausing:
            bench.engine.limit_running(1)
            bench.add([7], SHORT, priority=INTERACTIVE)
            bench.step()
            assert slow.state is SequenceState.PAUSED
            bench.engine.limit_running(4)
        urgent = bench.add([8] * 200, SHORT, priority=INTERACTIVE)
        bench.step()
        # The one needs 7 blocks, and 28 for its reading; the other 4.
        assert (slow.state, urgent.state) == (SequenceState.WAITING, SequenceState.PREFILLING)
        bench.clock.now += 5
        num_run = sum(length for _, _, length in bench.runner.calls)
        bench.finish()
        assert ends(bench)[-2:] == [urgent, slow]
        assert (urgent.output_ids, slow.output_ids) == (solo([8] * 200, SHORT), solo(self.PROMPT, SHORT))
        # What it had read was in the cache, and is nobody else's; that it was put back is a pause.
        assert sum(length for _, _, length in bench.runner.calls) - num_run < 136 + 208 + 8
        finished = bench.finished(slow)
        assert (finished.cached_prompt_tokens, finished.paused_seconds, finished.prefill_seconds) == (0, 5, 0)

    def test_what_was_cached_at_first_stays_its_usage_and_is_one_hit(self) -> None:
        bench = short_of_memory()
        bench.add([5] * 300, SHORT)
        bench.finish()
        slow = bench.add([5] * 300, replace(GREEDY, max_tokens=400))
        bench.step()
        assert (slow.num_cached, bench.engine._cache.num_hits) == (299, 1)
        urgent = bench.add([8] * 400, replace(GREEDY, max_tokens=300), priority=INTERACTIVE)
        bench.step()
        assert (slow.state, urgent.state) == (SequenceState.WAITING, SequenceState.PREFILLING)
        # As it is charged, and as the counters were told: those must not go down.
        while slow.state is not SequenceState.ENDED:
            bench.step()
            assert slow.num_cached == 299
        assert bench.finished(slow).cached_prompt_tokens == 299
        assert bench.engine._cache.num_hits == 1

    def test_nobody_gives_memory_to_an_equal_nor_in_vain(self) -> None:
        bench = short_of_memory()
        urgent = bench.add([1], replace(GREEDY, max_tokens=600), priority=INTERACTIVE)  # 10 blocks
        bench.step(2)
        slow = bench.add([2] * 100, SHORT, priority=NORMAL)  # 2, and 8 to read it
        writing = bench.add([4], LONG, priority=NORMAL)
        bench.step()
        equal = bench.add(self.PROMPT, SHORT, priority=NORMAL)
        another = bench.add([3] * 400, SHORT, priority=INTERACTIVE)  # 7, and 28
        bench.step()
        assert SequenceState.WAITING not in (urgent.state, slow.state, writing.state)
        assert (equal.state, another.state) == (SequenceState.WAITING, SequenceState.WAITING)
        bench.finish()
        assert ends(bench).index(another) < ends(bench).index(equal)

    def test_who_is_put_back_is_charged_once_and_is_before_its_equals(self) -> None:
        bench = short_of_memory()
        slow = bench.add(self.PROMPT, SHORT)
        later = bench.add(self.PROMPT[::-1], SHORT)
        bench.step()
        other = bench.add([5] * 400, SHORT, account="served less")
        queue = bench.engine._scheduler._queues[NORMAL]
        bench.add([8] * 400, SHORT, priority=INTERACTIVE)
        bench.step()
        assert bench.engine._scheduler.waiting == (slow, other, later)
        assert queue._served["somebody"] == 400
        bench.finish()
        assert ends(bench)[1:] == [slow, other, later]

    def test_who_was_put_back_can_leave(self) -> None:
        bench = short_of_memory()
        slow = bench.add(self.PROMPT, SHORT)
        bench.step()
        urgent = bench.add([8] * 400, SHORT, priority=INTERACTIVE)
        bench.step()
        bench.engine.remove(slow)
        assert bench.engine.num_waiting == 0
        bench.finish()
        assert ends(bench) == [urgent]
        assert not bench.engine.has_work

    def test_who_waits_for_memory_costs_no_step_anything(self) -> None:
        bench = short_of_memory(logits_after=scripted(VOCAB, 1, [65]))
        bench.add([1], replace(GREEDY, max_tokens=900), priority=INTERACTIVE)
        bench.step(2)
        waiting = bench.add([2] * 400, SHORT, priority=INTERACTIVE)
        acquire, asked = bench.engine._cache.acquire, []

        def counted(*arguments: Any, **named: Any) -> Any:
            asked.append(arguments)
            return acquire(*arguments, **named)

        bench.engine._cache.acquire = counted  # type: ignore[method-assign]
        bench.step(50)
        assert bench.of(waiting) == [Queued(0, None)]
        assert not asked
        assert not hasattr(waiting, "sampler")
        bench.finish()
        assert len(asked) == 1
        assert bench.finished(waiting).completion_tokens == 2

    def test_background_work_leaves_room_for_somebody_more_urgent(self) -> None:
        bench = short_of_memory(20, 0, logits_after=scripted(VOCAB, 1, [65]))
        writing = [bench.add([n], replace(GREEDY, max_tokens=380), priority=BACKGROUND) for n in range(3)]
        bench.step(10)
        # 6 blocks each, and half a context is 8.
        assert [each.state for each in writing] == [SequenceState.DECODING] * 2 + [SequenceState.WAITING]
        usual = bench.add([7], replace(GREEDY, max_tokens=380))
        bench.step()
        assert len(usual.output_ids) == 1
        bench.finish()
        assert len(ends(bench)) == 4

    def test_a_single_background_request_may_have_all_the_memory(self) -> None:
        bench = short_of_memory(logits_after=scripted(VOCAB, 1, [65]))
        bench.add([1] * (bench.engine.context_length - 1), GREEDY, priority=BACKGROUND)
        bench.finish()
        assert len(ends(bench)) == 1


class TestAnswersThatGiveTheirMemory:
    """Of a less urgent answer nothing is lost: it is computed once more as it was, and goes on."""

    WRITTEN = replace(GREEDY, max_tokens=600)
    PROMPT = tuple(number % 50 for number in range(100))

    def both(self, num_steps: int = 30, *, pausing: bool = False, **options: Any) -> tuple[Bench, Sequence, Sequence]:
        """Return a bench where a less urgent answer was being written when an urgent request came that needs room."""
        bench = short_of_memory(**options)
        writing = bench.add(self.PROMPT, self.WRITTEN)  # 11 blocks, and 8 more while it is read
        bench.step(num_steps)
        if pausing:
            bench.engine.limit_running(1)
            bench.add([7], SHORT, priority=INTERACTIVE)
            bench.step()
            assert writing.state is SequenceState.PAUSED
            bench.engine.limit_running(4)
        urgent = bench.add([8] * 400, SHORT, priority=INTERACTIVE)  # 7, and 28: all but one
        return bench, writing, urgent

    @pytest.mark.parametrize("pausing", [False, True])
    @pytest.mark.parametrize("num_steps", [2, 3, 30])
    def test_an_urgent_request_waits_for_no_less_urgent_answer(self, num_steps: int, *, pausing: bool) -> None:
        bench, writing, urgent = self.both(num_steps, pausing=pausing)
        num_before = len(bench.of(writing))
        bench.step()
        assert (writing.state, urgent.state) == (SequenceState.WAITING, SequenceState.PREFILLING)
        bench.finish()
        assert ends(bench)[-2:] == [urgent, writing]
        assert urgent.output_ids == solo([8] * 400, SHORT)
        # Each token came once, and nothing in between.
        expected = solo(self.PROMPT, self.WRITTEN)
        assert writing.output_ids == expected
        assert not any(isinstance(event, Queued) for event in bench.of(writing)[num_before:])
        assert bench.text(writing) == decoded([each for each in expected if each != END])
        assert bench.finished(writing).completion_tokens == len(expected)

    def test_what_it_had_written_is_run_as_it_was_at_first(self) -> None:
        """Token by token: a prompt's run writes other bits."""
        bench, writing, urgent = self.both(30, min_run=2)
        while urgent.state is not SequenceState.ENDED:
            bench.step()
        num_written = len(writing.output_ids)
        bench.runner.calls.clear()
        while len(writing.output_ids) == num_written:
            bench.step()
        lengths = [length for _, _, length in bench.runner.calls]
        # What is left of the prompt, then each token once more but the last one, which is new.
        first = lengths.index(1)
        assert min(lengths[:first]) > 1
        assert sum(lengths[:first]) < len(self.PROMPT)
        assert lengths[first:] == [1] * num_written
        assert bench.runner.slots[writing.slot] == [*self.PROMPT, *writing.output_ids[:-1]]

    def test_where_drafts_are_exact_several_are_run_at_once(self) -> None:
        bench, writing, urgent = self.both(30)
        bench.engine._decode_step._drafting = Drafting(context_length=bench.engine.context_length)
        while urgent.state is not SequenceState.ENDED:
            bench.step()
        num_written = len(writing.output_ids)
        while len(writing.output_ids) == num_written:
            bench.step()
        assert num_written == 29
        assert bench.runner.verified == [8, 8, 8, 4]
        bench.finish()
        assert writing.output_ids == solo(self.PROMPT, self.WRITTEN)
        assert bench.finished(writing).drafted_tokens == bench.finished(writing).accepted_tokens == 0

    @pytest.mark.parametrize("num_steps", range(12))
    def test_it_may_have_to_again_at_any_step_of_that(self, num_steps: int) -> None:
        bench, writing, urgent = self.both(8)
        bench.step()
        bench.engine.remove(urgent)
        bench.step(num_steps)
        bench.add([9] * 400, SHORT, priority=INTERACTIVE)
        bench.step()
        assert writing.state is SequenceState.WAITING
        bench.finish()
        assert writing.output_ids == solo(self.PROMPT, self.WRITTEN)

    @pytest.mark.parametrize("num_steps", range(1, 12))
    def test_it_may_be_paused_at_any_step_of_that(self, num_steps: int) -> None:
        bench, writing, urgent = self.both(8)
        bench.step()
        bench.engine.remove(urgent)
        bench.step(num_steps)
        bench.engine.limit_running(1)
        short = bench.add([9], SHORT, priority=INTERACTIVE)
        bench.step()
        assert writing.state is SequenceState.PAUSED
        bench.finish()
        assert (writing.output_ids, short.output_ids) == (solo(self.PROMPT, self.WRITTEN), solo([9], SHORT))

    def test_for_its_caller_that_is_a_pause(self) -> None:
        bench, writing, urgent = self.both(10)
        bench.step()
        bench.clock.now += 5
        bench.engine.remove(urgent)
        while writing.num_read < len(self.PROMPT):
            bench.step()
        assert writing.is_behind
        bench.clock.now += 2
        while writing.is_behind:
            bench.step()
        bench.clock.now += 1
        bench.finish()
        finished = bench.finished(writing)
        assert finished.paused_seconds == 7
        assert (finished.prefill_seconds, finished.decode_seconds, finished.longest_gap_seconds) == (0, 1, 1)

    def test_it_is_charged_once(self) -> None:
        bench, writing, urgent = self.both(40)
        bench.engine.remove(urgent)
        queue = bench.engine._scheduler._queues[NORMAL]
        bench.add([8] * 400, SHORT, priority=INTERACTIVE)
        served = queue._served["somebody"]
        assert served == 100 + 8 * (len(writing.output_ids) - 1)
        bench.step()
        while writing.is_behind:
            bench.step()
        assert queue._served["somebody"] == served

    @pytest.mark.parametrize("num_steps", [0, 3, 12])
    def test_who_leaves_or_is_overdue_meanwhile_has_what_it_had(self, num_steps: int) -> None:
        bench, writing, _ = self.both(10)
        bench.step(1 + num_steps)
        assert writing.is_behind
        num_written = len(writing.output_ids)
        writing.deadline = bench.clock.now
        bench.step()
        assert bench.finished(writing).reason is FinishReason.TIME_LIMIT
        assert bench.finished(writing).completion_tokens == num_written
        bench.finish()
        bench, writing, urgent = self.both(10)
        bench.step(1 + num_steps)
        bench.engine.remove(writing)
        bench.finish()
        assert ends(bench) == [urgent]

    def test_the_least_urgent_one_that_began_last_gives_way(self) -> None:
        bench = short_of_memory(44, 0, logits_after=scripted(VOCAB, 1, [65]))
        budget = replace(GREEDY, max_tokens=600)  # 10 blocks
        asked = ((1, BACKGROUND), (0, NORMAL), (2, BACKGROUND), (3, NORMAL))
        sequences = []
        for number, priority in asked:
            sequences.append(bench.add([number], budget, priority=priority))
            bench.step(30)
        assert all(each.output_ids for each in sequences)
        assert SequenceState.WAITING not in [each.state for each in sequences]
        waiting = []
        for number in range(3):
            bench.add([10 + number], budget, priority=INTERACTIVE)
            bench.step()
            waiting.append([each.prompt_ids[0] for each in sequences if each.state is SequenceState.WAITING])
        assert waiting == [[2], [1, 2], [1, 2, 3]]

    def test_no_more_of_them_than_it_takes(self) -> None:
        bench = short_of_memory(40, 0)
        large = bench.add([1], replace(GREEDY, max_tokens=900))  # 15 blocks
        small = bench.add([2], replace(GREEDY, max_tokens=100))  # 2
        bench.step(4)
        bench.add([3], replace(GREEDY, max_tokens=900), priority=INTERACTIVE)
        urgent = bench.add([4], replace(GREEDY, max_tokens=900), priority=INTERACTIVE)
        bench.step(2)
        # The small one began last, and its memory alone would not suffice.
        assert [each.state for each in (large, small, urgent)] == [
            SequenceState.WAITING,
            SequenceState.DECODING,
            SequenceState.DECODING,
        ]

    def test_any_mix_in_little_memory_gives_each_its_solo_answer(self) -> None:
        """Answers of all priorities, most of them longer than the time until the next request, from 80 seeds."""
        num_given = num_given_again = 0
        for seed in range(80):
            chance = random.Random(seed)
            factor = chance.choice((0, 4))
            runner = FakeRunner(
                num_slots=8,
                context_length=64,
                min_run=chance.choice((1, 2)),
                kv_budget=KVBudget(4, 16 * (1 + factor) + chance.randrange(8), factor),
            )
            drafting = Drafting(context_length=64) if chance.random() < 0.5 else None
            bench = Bench(runner=runner, num_slots=chance.randint(2, 4), prefill_chunk=5, drafting=drafting)
            given = note_answers_put_back(bench)
            alive: list[Sequence] = []
            for _ in range(15):
                priority = chance.choice(list(Priority))
                # Who is urgent is done soon, so that others get to write.
                length = chance.randint(1, 4) if priority is INTERACTIVE else chance.randint(20, 45)
                params = replace(GREEDY, max_tokens=length, temperature=chance.choice((0.0, 1.0)), seed=seed)
                num_prompt = chance.randint(30, 55) if priority is INTERACTIVE else chance.randint(1, 15)
                prompt = [chance.randrange(50) for _ in range(num_prompt)]
                alive.append(bench.add(prompt, params, priority=priority))
                for _ in range(chance.randint(2, 30)):
                    runner.fail_next = RunTerminated() if chance.random() < 0.1 else None
                    bench.step()
                    runner.fail_next = None
                if chance.random() < 0.1:
                    bench.engine.remove(alive.pop(chance.randrange(len(alive))))
            bench.finish()
            for sequence in alive:
                expected = solo(sequence.prompt_ids, sequence.params, context_length=64)
                assert sequence.output_ids == expected
                assert bench.text(sequence) == decoded([each for each in expected if each != END])
            num_given += len(given)
            num_given_again += len(given) - len(set(given))
        assert num_given > 100
        assert num_given_again > 20


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

    def test_who_comes_late_gets_no_more_turns_than_those_who_are_here(self) -> None:
        bench = Bench(runner=endless())
        for _ in range(30):
            for account in "ab":
                bench.add([1], SHORT, account=account)
        bench.step(40)
        for _ in range(6):
            bench.add([1], SHORT, account="c")
        bench.events.clear()
        bench.finish()
        assert "".join(each.account for each in ends(bench)).startswith("cabcabcabcabcabcab")

    @pytest.mark.parametrize(("num_slots", "length"), [(1, 20), (1, 200), (4, 100)])
    def test_nobody_waits_for_ever_while_others_come_and_go(self, num_slots: int, length: int) -> None:
        """One more of them than there are slots: one waits at any time, and each comes back with no debt."""
        bench = Bench(runner=endless(num_slots))
        first = bench.add([1], replace(GREEDY, max_tokens=length), account="twice")
        bench.step()
        second = bench.add([1], SHORT, account="twice")
        here = {str(number): bench.add([1], SHORT, account=str(number)) for number in range(num_slots + 1)}
        num_jobs = Counter(here.keys())
        while second.admitted is None:
            bench.step()
            for account, sequence in here.items():
                if sequence.state is SequenceState.ENDED:
                    here[account] = bench.add([1], SHORT, account=account)
                    num_jobs[account] += 1
            # As much as it was served itself, and two jobs more.
            of_a_job = 1 + 8 * (SHORT.max_tokens - 1)
            assert max(num_jobs.values()) * of_a_job <= 8 * length + 2 * of_a_job
        assert first.state is SequenceState.ENDED

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

    @settings(max_examples=150, deadline=None)
    @given(
        comings=st.lists(
            st.tuples(st.sampled_from("abcd"), st.integers(1, 5), st.integers(1, 40), st.integers(0, 12)),
            min_size=3,
            max_size=14,
        ),
        num_slots=st.integers(1, 3),
    )
    def test_nor_does_anybody_when_all_come_again_and_again(
        self, comings: list[tuple[str, int, int, int]], num_slots: int
    ) -> None:
        """comings: who, with how many requests of what length, and the steps until the next one comes."""
        bench = Bench(runner=endless(num_slots), clock=Ticking())
        sent: list[tuple[float, bool, Sequence]] = []
        for account, count, length, num_steps in comings:
            is_new = all(each.state is SequenceState.ENDED for _, _, each in sent if each.account == account)
            for number in range(count):
                sequence = bench.add([1], replace(GREEDY, max_tokens=length), account=account)
                sent.append((bench.clock(), is_new and not number, sequence))
            bench.step(num_steps)
        bench.finish()
        for arrived, is_new, late in sent:
            if is_new:
                ahead = [
                    each.account
                    for _, _, each in sent
                    if each is not late and arrived < (each.admitted or 0.0) < (late.admitted or 0.0)
                ]
                assert len(ahead) == len(set(ahead))


class TestStalls:
    @pytest.mark.parametrize(
        ("prompt_seconds", "max_stall_seconds", "length"),
        [
            (0.0025, 0.1, 32),  # 40 in time, of which whole sixteens
            (0.0025, 0.17, 64),
            (0.0025, 1.0, 64),  # prefill_chunk
            (0.0025, 0.001, 16),  # less is hardly faster
            (0.05, 0.1, 16),
            (0.00001, 0.1, 64),
        ],
    )
    def test_a_prompt_beside_answers_is_read_in_runs_of_a_set_time(
        self, prompt_seconds: float, max_stall_seconds: float, length: int
    ) -> None:
        bench, machine = on_machine(prompt_seconds=prompt_seconds, max_stall_seconds=max_stall_seconds)
        bench.add([1, 2], replace(GREEDY, max_tokens=500))
        bench.step()
        machine.calls.clear()
        bench.add([3] * 300, SHORT)
        bench.step(3)
        assert [size for _, _, size in machine.calls] == [length, 1] * 3

    def test_a_machine_that_slows_down_is_noticed_by_the_next_run(self) -> None:
        bench, machine = on_machine()
        bench.add([1, 2], replace(GREEDY, max_tokens=500))
        bench.add([3] * 1000, SHORT)
        bench.step(4)
        machine.prompt_seconds *= 2
        bench.step()
        machine.calls.clear()
        machine.durations.clear()
        bench.step(3)
        assert [size for _, _, size in machine.calls] == [16, 1] * 3
        assert max(machine.durations) <= bench.max_stall_seconds

    def test_a_less_urgent_prompt_disturbs_one_token_in_25(self) -> None:
        bench, machine = on_machine(prompt_seconds=0.0005)
        urgent = bench.add([1, 2], replace(GREEDY, max_tokens=500), priority=INTERACTIVE)
        bench.step(2)
        slow = bench.add([3] * 300, SHORT, priority=BACKGROUND)
        machine.calls.clear()
        bench.step(100)
        # A step that reads writes as well.
        assert [size for _, _, size in machine.calls] == [*[1] * 24, *[64, *[1] * 25] * 3, 64, 1]
        num_written = len(urgent.output_ids)
        bench.engine.remove(urgent)
        bench.step(2)
        # Nobody waits for it any more.
        assert slow.num_read == len(slow.prompt_ids)
        assert num_written == 102

    def test_a_background_prompt_leaves_room_for_whoever_may_come(self) -> None:
        bench, machine = on_machine()
        bench.add([3] * 500, SHORT, priority=BACKGROUND)
        bench.step()
        usual = bench.add([4] * 500, SHORT)
        bench.step()
        assert usual.num_read == 256
        assert [size for _, _, size in machine.calls] == [32, 256]


class TestEstimates:
    def test_nothing_is_told_before_anything_was_measured(self) -> None:
        bench = Bench(runner=FakeRunner(num_slots=1))
        bench.add([1], LONG)
        waiting = bench.add([2], LONG, deadline=bench.clock.now + 0.001)
        bench.step()
        assert bench.of(waiting) == [Queued(0, None)]
        assert bench.engine.seconds_until_end is None

    def test_those_who_wait_hear_when_they_will_begin(self) -> None:
        bench, _ = on_machine(num_slots=1)
        bench.add([1] * 40, LONG)
        first, second = bench.add([2] * 40, LONG), bench.add([3] * 80, LONG)
        last = bench.add([4] * 40, SHORT)
        bench.step()
        # The first prompt was not read when this was told. Answers had 10 tokens so far: 0.1 s and 0.2 s for each.
        (told,) = bench.of(first)
        assert told == Queued(0, pytest.approx(0.3))
        assert bench.of(second) == [Queued(1, pytest.approx(0.6))]
        assert bench.of(last) == [Queued(2, pytest.approx(1.0))]
        bench.step()
        assert bench.engine.seconds_until_end == pytest.approx(0.2 - 0.02)

    def test_the_estimate_comes_true_where_answers_are_as_long_as_before(self) -> None:
        bench, _ = on_machine(num_slots=1)
        usual = replace(GREEDY, max_tokens=10)
        sequences = [bench.add([number] * 48, usual) for number in range(4)]
        began = bench.clock.now
        bench.finish()
        for sequence in sequences[1:]:
            told = bench.of(sequence)[0]
            assert isinstance(told, Queued)
            assert sequence.admitted is not None
            # The first token comes with the prompt.
            assert sequence.admitted - began == pytest.approx(told.expected_wait_seconds, rel=0.1)

    def test_an_answer_that_lasts_is_not_about_to_end(self) -> None:
        bench, _ = on_machine(num_slots=1)
        # Answers had 10 tokens so far; a step takes 0.02 s.
        running = bench.add([1] * 40, replace(GREEDY, max_tokens=200))
        bench.step(61)
        for num_written, expected in ((60, 1.2), (160, 0.8)):
            bench.step(num_written - len(running.output_ids))
            waiting = bench.add([2], SHORT, account=str(num_written))
            bench.step()
            (told,) = bench.of(waiting)
            assert isinstance(told, Queued)
            # As much again, but never more than it may.
            assert told.expected_wait_seconds == pytest.approx(expected, abs=0.05)
            bench.engine.remove(waiting)
        # Nobody is sent away for what nobody knows.
        in_time = bench.add([4], SHORT, deadline=bench.clock.now + 0.1, account="in time")
        assert in_time.state is SequenceState.WAITING

    def test_what_is_cached_is_not_counted(self) -> None:
        bench, _ = on_machine()
        bench.add([5] * 400, SHORT)
        bench.finish()
        now = bench.clock.now
        bench.add([5] * 401, SHORT, deadline=now + 0.1)
        with pytest.raises(DeadlineTooShortError):
            bench.add([6] * 401, SHORT, deadline=now + 0.1)

    def test_a_deadline_that_cannot_be_met_is_refused_at_once(self) -> None:
        bench, _ = on_machine(num_slots=1)
        running = bench.add([1] * 40, LONG)
        bench.step()
        now = bench.clock.now
        with pytest.raises(DeadlineTooShortError) as caught:
            bench.add([2] * 200, SHORT, deadline=now + 0.6)
        assert str(caught.value) == (
            "the answer would begin in about 0.7 s (0.2 s in the queue, 0.5 s for 200 tokens of the prompt), and the "
            "deadline is in 0.6 s: give more time, or send a shorter or more urgent request"
        )
        assert bench.engine.num_waiting == 0
        in_time = bench.add([2] * 200, SHORT, deadline=now + 0.8)
        # A more urgent one need not wait for the answer that runs.
        urgent = bench.add([3] * 200, SHORT, deadline=now + 0.6, priority=INTERACTIVE)
        bench.engine.remove(urgent)
        bench.engine.remove(running)
        bench.finish()
        assert bench.finished(in_time).reason is FinishReason.LENGTH

    @pytest.mark.parametrize("is_one_run", [False, True])
    def test_a_slow_moment_of_an_idle_machine_locks_nobody_out_for_longer_than_a_minute(self, is_one_run: bool) -> None:
        bench, machine = on_machine(num_slots=2)
        machine.prompt_seconds = 0.4
        bench.add([1] * (64 if is_one_run else 900), SHORT, identity="slow")
        bench.finish()
        machine.prompt_seconds = 0.0025
        if not is_one_run:  # the last eight runs, and all of the last minute, were slow
            with pytest.raises(DeadlineTooShortError):
                bench.add([2] * 300, SHORT, deadline=bench.clock.now + 5)
        bench.clock.now += 61
        for number in range(3):
            in_time = bench.add([number] * 300, SHORT, identity=f"{number}", deadline=bench.clock.now + 5)
            bench.finish()
            assert bench.finished(in_time).reason is FinishReason.LENGTH
        # By what was measured just now, of which the slow run is no part any more.
        with pytest.raises(DeadlineTooShortError, match=r"in about 2\.5 s \(0\.0 s in the queue, 2\.5 s"):
            bench.add([5] * 1000, SHORT, deadline=bench.clock.now + 2)

    def test_a_deadline_is_judged_by_the_fastest_run_of_the_last_minute(self) -> None:
        bench, machine = on_machine()
        machine.prompt_seconds = 0.4
        bench.add([1] * 64, SHORT)
        bench.finish()
        machine.prompt_seconds = 0.0025
        in_time = bench.add([2] * 300, SHORT, deadline=bench.clock.now + 5)
        bench.finish()
        assert bench.finished(in_time).reason is FinishReason.LENGTH

    def test_answers_that_are_read_while_nobody_asks_are_measured_too(self) -> None:
        bench, machine = on_machine()
        machine.min_run = 2  # an answer's tokens are read again
        bench.add([1], replace(GREEDY, max_tokens=200))
        while not ends(bench)[1:]:
            bench.step()
        machine.prompt_seconds = 0.01
        bench.clock.now += 61
        bench.finish()
        with pytest.raises(DeadlineTooShortError, match=r"10\.0 s for 1000 tokens"):
            bench.add([2] * 1000, SHORT, deadline=bench.clock.now + 5)

    def test_a_place_counts_as_free_when_enough_of_the_others_have_ended(self) -> None:
        bench, _ = on_machine(num_slots=2)
        for length in (10, 4):
            bench.add([length] * 16, replace(GREEDY, max_tokens=length))
        bench.step(2)
        waiting = bench.add([2] * 16, SHORT)
        bench.step()
        (told,) = bench.of(waiting)
        assert isinstance(told, Queued)
        # Both prompts are read, and the second answer has one token of four.
        assert told.expected_wait_seconds == pytest.approx(3 * 0.02)


class TestEstimatesOfMemory:
    """Places are free all the time."""

    BUDGET = KVBudget(64, 30, 0)

    def test_who_waits_for_memory_hears_when_there_will_be_some(self) -> None:
        bench, _ = on_machine(kv_budget=self.BUDGET)
        usual = replace(GREEDY, max_tokens=1000)
        running = bench.add([1] * 40, usual)  # 17 blocks
        bench.step()
        waiting = bench.add([2] * 40, usual)
        behind = bench.add([3] * 40, SHORT)  # 1 block, but nobody overtakes
        bench.step()
        # Answers had 10 tokens so far; this one has 1 of them.
        assert bench.of(waiting) == [Queued(0, pytest.approx(9 * 0.02))]
        assert bench.of(behind) == [Queued(1, pytest.approx(9 * 0.02))]
        assert bench.engine.num_running == 1
        bench.engine.remove(running)

    def test_the_estimate_comes_true_where_answers_are_as_long_as_before(self) -> None:
        bench, _ = on_machine(kv_budget=KVBudget(64, 11, 4))
        usual = replace(GREEDY, max_tokens=10)
        sequences = [bench.add([number] * 100, usual) for number in range(4)]  # 2 blocks, and 8 while it is read
        began = bench.clock.now
        bench.finish()
        for sequence in sequences[1:]:
            told = bench.of(sequence)[0]
            assert isinstance(told, Queued)
            assert sequence.admitted is not None
            assert sequence.admitted - began == pytest.approx(told.expected_wait_seconds, rel=0.1)

    def test_a_deadline_before_which_memory_is_not_free_is_refused_at_once(self) -> None:
        bench, _ = on_machine(kv_budget=self.BUDGET)
        usual = replace(GREEDY, max_tokens=1000)
        bench.add([1] * 40, usual)
        bench.step()
        now = bench.clock.now
        with pytest.raises(DeadlineTooShortError) as caught:
            bench.add([2] * 200, usual, deadline=now + 0.6)
        assert str(caught.value) == (
            "the answer would begin in about 0.7 s (0.2 s in the queue, 0.5 s for 200 tokens of the prompt), and the "
            "deadline is in 0.6 s: give more time, or send a shorter or more urgent request"
        )
        # There is memory for a shorter one, and a more urgent one takes the other's.
        bench.add([2] * 200, SHORT, deadline=now + 0.6)
        bench.add([2] * 200, usual, deadline=now + 0.6, priority=INTERACTIVE)

    def test_the_reading_of_anothers_prompt_is_waited_for(self) -> None:
        bench, _ = on_machine(kv_budget=KVBudget(64, 36, 4))
        bench.add([1] * 400, LONG)  # 7 blocks, and 28 while it is read
        bench.step()
        waiting = bench.add([2] * 100, SHORT)  # 2
        bench.step()
        # 256 tokens were read before, and as many as fit 0.1 s are in each step since nobody decodes.
        (told,) = bench.of(waiting)
        assert isinstance(told, Queued)
        assert told.expected_wait_seconds == pytest.approx(144 * 0.0025)

    def test_who_gave_its_memory_has_its_tokens_to_run_again(self) -> None:
        bench, _ = on_machine(num_slots=1, num_paused=1, kv_budget=self.BUDGET)
        writing = bench.add([1] * 40, replace(GREEDY, max_tokens=1000))
        bench.step(5)
        bench.add([2] * 40, replace(GREEDY, max_tokens=1000), priority=INTERACTIVE)
        bench.step()
        assert writing.is_behind
        last = bench.add([3] * 40, SHORT)
        bench.step()
        (told,) = bench.of(last)
        assert isinstance(told, Queued)
        num_unread = 40 - writing.num_read
        # Of the urgent one 9 tokens are to come; then the prompt again, 4 tokens again, and 5 of 10 that are new.
        assert told.expected_wait_seconds == pytest.approx(9 * 0.02 + num_unread * 0.0025 + (4 + 5) * 0.02)
