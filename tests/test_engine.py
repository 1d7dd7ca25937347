"""The engine with a runner that is strict and has no model: batching, isolation, ends, times, and events."""

from collections.abc import Sequence as Tokens
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine_bench import END, GREEDY, TOKENIZER, VOCAB, Bench, Clock, decoded, solo, spelling
from fakes import FakeRunner, hashed_logits, scripted
from hearthd.errors import InvalidRequestError
from hearthd.generation.drafting import Drafting
from hearthd.generation.engine import Delta, Finished, FinishReason, Queued, RunTerminated, Sequence
from hearthd.kv.budget import KVBudget
from hearthd.priority import Priority
from hearthd.sequences.sampling import NonFiniteLogitsError, SamplingParams
from hearthd.sequences.sequence import SequenceState


class TestBatching:
    def test_answer_is_that_of_the_model_alone(self) -> None:
        bench = Bench()
        sequence = bench.add([1, 2, 3])
        bench.finish()
        assert sequence.output_ids == solo([1, 2, 3])
        assert bench.text(sequence) == bytes(solo([1, 2, 3])).decode(errors="replace")

    def test_prompt_is_run_in_chunks(self) -> None:
        bench = Bench(prefill_chunk=4)
        sequence = bench.add(range(10), replace(GREEDY, max_tokens=1))
        bench.finish()
        assert bench.runner.calls == [(0, 1, 4), (0, 1, 4), (0, 1, 2)]
        assert sequence.output_ids == solo(range(10))[:1]

    def test_a_prompt_that_nobody_waits_for_is_run_in_larger_chunks(self) -> None:
        bench = Bench(prefill_chunk=4, solo_prefill_chunk=32)
        # The first run tells how fast the machine is.
        alone = bench.add(range(40), replace(GREEDY, max_tokens=3))
        bench.step(2)
        assert bench.runner.calls == [(0, 1, 4), (0, 1, 32)]
        bench.step()
        bench.runner.calls.clear()
        other = bench.add(range(50, 90), replace(GREEDY, max_tokens=1))
        bench.step(2)
        assert bench.runner.calls == [(1, 1, 4), (0, 1, 1), (1, 1, 4), (0, 1, 1)], "an answer waited for a large chunk"
        bench.finish()
        assert alone.output_ids == solo(range(40), replace(GREEDY, max_tokens=3))
        assert other.output_ids == solo(range(50, 90))[:1]

    def test_larger_chunks_are_no_longer_than_a_second(self) -> None:
        clock = Clock()
        answer = hashed_logits(VOCAB)

        def slowly(history: Tokens[int]) -> NDArray[np.float32]:
            # 4 tokens in 0.2 seconds: 20 in one second, and 16 is the step.
            clock.now += 0.2
            return answer(history)

        bench = Bench(runner=FakeRunner(logits_after=slowly), prefill_chunk=4, solo_prefill_chunk=512, clock=clock)
        bench.add(range(200), replace(GREEDY, max_tokens=1))
        bench.step(2)
        assert bench.runner.calls == [(0, 1, 4), (0, 1, 16)]

    def test_running_sequences_share_each_forward(self) -> None:
        bench = Bench()
        sequences = [bench.add([number]) for number in range(3)]
        bench.step(3)
        bench.runner.calls.clear()
        bench.step()
        assert bench.runner.calls == [(0, 3, 1)]
        bench.finish()
        assert [sequence.output_ids for sequence in sequences] == [solo([number]) for number in range(3)]

    def test_long_prompt_delays_running_answers_by_one_chunk(self) -> None:
        bench = Bench(prefill_chunk=4)
        running = bench.add([1], replace(GREEDY, max_tokens=50))
        bench.step(2)
        long = bench.add(range(100, 120))
        bench.runner.calls.clear()
        before = len(running.output_ids)
        bench.step(5)
        assert bench.runner.calls == [call for _ in range(5) for call in ((1, 1, 4), (0, 1, 1))]
        assert len(running.output_ids) == before + 5
        bench.finish()
        assert running.output_ids == solo([1], replace(GREEDY, max_tokens=50))
        assert long.output_ids == solo(range(100, 120))

    def test_prompts_are_run_in_order_of_arrival(self) -> None:
        bench = Bench(prefill_chunk=4)
        first, second = bench.add(range(12)), bench.add(range(50, 54))
        bench.step(3)
        assert (len(first.output_ids), len(second.output_ids)) == (1, 0)
        bench.step()
        assert len(second.output_ids) == 1

    def test_first_token_does_not_wait_for_the_second(self) -> None:
        bench = Bench()
        sequence = bench.add([1, 2])
        bench.step()
        assert len(sequence.output_ids) == 1

    def test_chunk_length_does_not_change_the_answer(self) -> None:
        answers = []
        for chunk in (1, 3, 7, 64):
            bench = Bench(prefill_chunk=chunk)
            sequence = bench.add(range(20))
            bench.finish()
            answers.append(sequence.output_ids)
        assert answers == [solo(range(20))] * 4

    def test_nothing_to_do_does_nothing(self) -> None:
        bench = Bench()
        assert not bench.engine.has_work
        assert bench.engine.step() == []
        assert bench.runner.num_forwards == 0

    def test_counts(self) -> None:
        bench = Bench(runner=FakeRunner(num_slots=2))
        for number in range(3):
            bench.add([number])
        assert (bench.engine.num_running, bench.engine.num_waiting) == (0, 3)
        bench.step()
        assert (bench.engine.num_running, bench.engine.num_waiting) == (2, 1)
        assert (bench.engine.num_slots, bench.engine.context_length) == (2, 256)
        bench.finish()
        assert (bench.engine.num_running, bench.engine.num_waiting) == (0, 0)


prompts = st.lists(st.integers(0, 255), min_size=1, max_size=20)
any_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**64 - 1),
)
shared_beginnings = st.sampled_from([(), (1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10), (1, 2)])


class TestInterleaved:
    @settings(max_examples=500, deadline=None)
    @given(data=st.data())
    def test_any_mix_gives_each_its_solo_answer(self, data: st.DataObject) -> None:
        """Sequences come and go at any step, pause each other, take each other's memory, share prefixes, runs are
        stopped: no token changes.

        And all who stay come to an end; whoever leaves has given its slot back before the next step.
        """
        preset = data.draw(shared_beginnings)
        num_slots = data.draw(st.integers(1, 4))
        runner = FakeRunner(
            num_slots=num_slots + data.draw(st.integers(0, 3)),
            context_length=48,
            preset_tokens=preset,
            min_run=data.draw(st.integers(1, 2)),
            # For one full context, the reading of its prompt, and not much more; or for all.
            kv_budget=data.draw(st.sampled_from([None, KVBudget(4, 60, 4), KVBudget(4, 70, 4), KVBudget(4, 16, 0)])),
        )
        drafting = Drafting(context_length=48) if data.draw(st.booleans()) else None
        bench = Bench(runner=runner, num_slots=num_slots, prefill_chunk=data.draw(st.integers(2, 9)), drafting=drafting)
        alive: list[Sequence] = []
        removed: list[Sequence] = []
        late: list[Sequence] = []
        past: list[tuple[int, ...]] = []
        actions = data.draw(st.lists(st.sampled_from("aaasssssssrtcdl"), min_size=20, max_size=80))
        for action in actions:
            if action in "ac":  # c: go on with an earlier conversation
                beginning = data.draw(shared_beginnings if action == "a" or not past else st.sampled_from(past))
                prompt = (*beginning, *data.draw(prompts))[:40]
                options = {
                    "identity": data.draw(st.sampled_from("ab")),
                    "account": data.draw(st.sampled_from("xyz")),
                    "priority": data.draw(st.sampled_from(Priority)),
                }
                alive.append(bench.add(prompt, data.draw(any_params), **options))
            elif action == "d":
                deadline = bench.clock.now + data.draw(st.integers(0, 2))
                late.append(bench.add(data.draw(prompts), data.draw(any_params), deadline=deadline))
            elif action == "l":
                bench.clock.now += 1
            elif action == "s":
                bench.step()
                past = [(*sequence.prompt_ids, *sequence.output_ids) for sequence in alive]
            elif action == "t":
                runner.fail_next = RunTerminated()
                bench.step()
            elif alive:
                sequence = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
                bench.engine.remove(sequence)
                removed.append(sequence)
            held = bench.engine.num_running + bench.engine.num_paused
            assert bench.engine.num_running <= num_slots
            assert held <= runner.num_slots
            assert held <= len(alive) + len(late)
        runner.fail_next = None
        bench.finish()
        for sequence in alive:
            expected = solo(sequence.prompt_ids, sequence.params, context_length=48)
            assert sequence.output_ids == expected
            answer = expected[:-1] if expected[-1] == END else expected
            assert bench.text(sequence) == decoded(answer)
            finished = bench.finished(sequence)
            assert finished.completion_tokens == len(expected)
            kinds = [type(event) for event in bench.of(sequence)]
            assert Queued not in kinds[kinds.index(Delta) :] if Delta in kinds else True
            assert finished.cached_prompt_tokens < finished.prompt_tokens == len(sequence.prompt_ids)
        assert all(isinstance(bench.of(sequence)[-1], Finished) for sequence in late)
        for sequence in [*removed, *late]:
            expected = solo(sequence.prompt_ids, sequence.params, context_length=48)
            assert sequence.output_ids == expected[: len(sequence.output_ids)]

    def test_batch_closes_up_when_one_in_the_middle_ends(self) -> None:
        bench = Bench()
        lengths = [12, 3, 12, 5]
        sequences = [
            bench.add([number] * 5, replace(GREEDY, max_tokens=length)) for number, length in enumerate(lengths)
        ]
        bench.finish()
        for number, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            assert sequence.output_ids == solo([number] * 5, replace(GREEDY, max_tokens=length))

    def test_seeded_answer_does_not_depend_on_company(self) -> None:
        params = SamplingParams(max_tokens=20, temperature=1.5, top_p=0.95, seed=11)
        alone, together = Bench(), Bench()
        first = alone.add([1, 2], params)
        alone.finish()
        for number in range(3):
            together.add([number], SamplingParams(max_tokens=30, seed=number))
            together.step()
        second = together.add([1, 2], params)
        together.finish()
        assert first.output_ids == second.output_ids


class TestQueue:
    def test_positions_come_at_once_and_at_each_change(self) -> None:
        bench = Bench(runner=FakeRunner(num_slots=1))
        running = bench.add([1], replace(GREEDY, max_tokens=3))
        first, second, third = (bench.add([number]) for number in (2, 3, 4))
        bench.step()
        assert [bench.positions(sequence) for sequence in (running, first, second, third)] == [[], [0], [1], [2]]
        bench.step()
        assert bench.positions(third) == [2]
        bench.engine.remove(first)
        bench.step()
        assert [bench.positions(sequence) for sequence in (second, third)] == [[1, 0], [2, 1]]
        bench.finish()
        assert [bench.positions(sequence) for sequence in (running, second, third)] == [[], [1, 0], [2, 1, 0]]
        assert all(isinstance(bench.of(each)[-1], Finished) for each in (running, second, third))

    def test_who_need_not_wait_is_not_told_to(self) -> None:
        bench = Bench()
        sequences = [bench.add([number]) for number in range(4)]
        bench.finish()
        assert all(bench.positions(sequence) == [] for sequence in sequences)

    def test_slots_are_given_in_order_of_arrival(self) -> None:
        bench = Bench(runner=FakeRunner(num_slots=1))
        sequences = [bench.add([number]) for number in range(4)]
        bench.finish()
        ends = [owner for owner, event in bench.events if isinstance(event, Finished)]
        assert ends == sequences


class TestRemove:
    @pytest.mark.parametrize("steps", [0, 1, 2, 4, 6])
    def test_wherever_it_is_its_slot_is_free_before_the_next_step(self, steps: int) -> None:
        bench = Bench(runner=FakeRunner(num_slots=1), prefill_chunk=4)
        leaving = bench.add(range(12), replace(GREEDY, max_tokens=50))
        bench.step(steps)
        waiting = bench.add([9])
        num_events = len(bench.of(leaving))
        bench.engine.remove(leaving)
        assert bench.engine.num_running == 0
        bench.step()
        assert len(waiting.output_ids) == 1
        bench.engine.remove(leaving)
        bench.finish()
        assert waiting.output_ids == solo([9])
        assert len(bench.of(leaving)) == num_events

    def test_waiting_one_leaves_the_queue(self) -> None:
        bench = Bench(runner=FakeRunner(num_slots=1))
        bench.add([1])
        waiting = bench.add([2])
        bench.step()
        bench.engine.remove(waiting)
        assert bench.engine.num_waiting == 0
        bench.finish()
        assert bench.of(waiting) == [Queued(0)]

    def test_ended_or_unknown_one_changes_nothing(self) -> None:
        bench = Bench()
        ended = bench.add([1], replace(GREEDY, max_tokens=1))
        bench.finish()
        other = bench.add([2])
        bench.step()
        bench.engine.remove(ended)
        unknown = Sequence(request_id="x", prompt_ids=(1,), params=GREEDY, cache_identity="", arrived=0.0)
        bench.engine.remove(unknown)
        bench.finish()
        assert other.output_ids == solo([2])

    def test_what_was_computed_is_kept_for_the_next_try(self) -> None:
        bench = Bench(prefill_chunk=4)
        leaving = bench.add(range(12))
        bench.step(2)
        bench.engine.remove(leaving)
        again = bench.add(range(12))
        bench.finish()
        assert bench.finished(again).cached_prompt_tokens == 8
        assert again.output_ids == solo(range(12))


class TestFailures:
    def test_sampling_error_fails_that_sequence_alone(self) -> None:
        def sick(history: Tokens[int]) -> NDArray[np.float32]:
            logits = hashed_logits(VOCAB)(history)
            return np.full_like(logits, np.nan) if history[0] == 7 and len(history) == 4 else logits

        bench = Bench(runner=FakeRunner(logits_after=sick))
        first, failing, last = bench.add([1]), bench.add([7, 7]), bench.add([2])
        bench.finish()
        assert isinstance(bench.failure(failing), NonFiniteLogitsError)
        assert len(failing.output_ids) == 2
        assert first.output_ids == solo([1])
        assert last.output_ids == solo([2])

    def test_failed_prefill_fails_its_sequence_alone(self) -> None:
        bench = Bench(prefill_chunk=4)
        running = bench.add([1], replace(GREEDY, max_tokens=12))
        bench.step(2)
        failing = bench.add(range(20))
        bench.step()
        error = RuntimeError("out of memory")
        bench.runner.fail_next = error
        bench.step()
        assert bench.failure(failing) is error
        retried = bench.add(range(20))
        bench.finish()
        assert running.output_ids == solo([1], replace(GREEDY, max_tokens=12))
        assert retried.output_ids == solo(range(20))
        assert bench.finished(retried).cached_prompt_tokens == 0

    def test_failed_decode_fails_the_rows_it_held_and_the_engine_goes_on(self) -> None:
        bench = Bench(prefill_chunk=4)
        rows = [bench.add([number, 5]) for number in range(2)]
        bench.step(3)
        prefilling, waiting = bench.add(range(20)), bench.add([9])

        calls = 0

        def fail_second(history: Tokens[int]) -> NDArray[np.float32]:
            nonlocal calls
            calls += 1
            if calls == 2:  # the first is the chunk's
                raise RuntimeError("broken")
            return hashed_logits(VOCAB)(history)

        bench.runner.logits_after = fail_second
        bench.step()
        bench.runner.logits_after = hashed_logits(VOCAB)
        assert [str(bench.failure(sequence)) for sequence in rows] == ["broken", "broken"]
        again = bench.add([1, 5])
        bench.finish()
        assert bench.finished(again).cached_prompt_tokens == 0
        assert again.output_ids == solo([1, 5])
        assert prefilling.output_ids == solo(range(20))
        assert waiting.output_ids == solo([9])

    def test_sequence_that_joins_during_a_failed_decode_goes_on(self) -> None:
        bench = Bench()
        row = bench.add([1])
        bench.step(2)
        joining = bench.add([2, 3])

        def fail_for_row(history: Tokens[int]) -> NDArray[np.float32]:
            if history[0] == 1:
                raise RuntimeError("broken")
            return hashed_logits(VOCAB)(history)

        bench.runner.logits_after = fail_for_row
        bench.step()
        assert str(bench.failure(row)) == "broken"
        bench.finish()
        assert joining.output_ids == solo([2, 3])

    def test_bad_parameters_fail_that_sequence_alone(self) -> None:
        bench = Bench()
        failing = bench.add([1], replace(GREEDY, seed=-1))
        other = bench.add([2])
        bench.finish()
        assert isinstance(bench.failure(failing), ValueError)
        assert other.output_ids == solo([2])

    def test_stopped_run_is_repeated_for_those_still_there(self) -> None:
        bench = Bench(prefill_chunk=4)
        staying, leaving = bench.add([1]), bench.add([2])
        bench.step(3)
        before = list(staying.output_ids)
        bench.runner.fail_next = RunTerminated()
        bench.step()
        assert staying.output_ids == before
        bench.engine.remove(leaving)
        prefilling = bench.add(range(6))
        bench.runner.fail_next = RunTerminated()
        bench.step()
        assert prefilling.output_ids == []
        bench.finish()
        assert staying.output_ids == solo([1])
        assert prefilling.output_ids == solo(range(6))

    def test_prefilling_names_the_sequence_only_while_its_chunk_runs(self) -> None:
        seen: list[Sequence | None] = []

        def watch(history: Tokens[int]) -> NDArray[np.float32]:
            seen.append(bench.engine.prefilling)
            return hashed_logits(VOCAB)(history)

        bench = Bench(runner=FakeRunner(logits_after=watch), prefill_chunk=2)
        sequence = bench.add([1, 2, 3])
        bench.step(3)
        assert seen == [sequence, sequence, None]
        assert bench.engine.prefilling is None


class TestEnds:
    def test_end_of_turn_is_counted_and_has_no_text(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=spelling("Hi")))
        sequence = bench.add([5])
        bench.finish()
        assert bench.text(sequence) == "Hi"
        finished = bench.finished(sequence)
        assert finished.reason is FinishReason.END_OF_TURN
        assert finished.completion_tokens == 3

    def test_empty_answer(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=spelling("")))
        sequence = bench.add([5])
        bench.finish()
        assert bench.of(sequence) == [bench.finished(sequence)]
        assert bench.finished(sequence).completion_tokens == 1

    def test_max_tokens(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=spelling("abcdef")))
        sequence = bench.add([5], replace(GREEDY, max_tokens=3))
        bench.finish()
        assert bench.text(sequence) == "abc"
        assert bench.finished(sequence).reason is FinishReason.LENGTH
        assert bench.finished(sequence).completion_tokens == 3

    def test_end_of_turn_as_the_last_allowed_token_is_an_end_of_turn(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=spelling("abc")))
        sequence = bench.add([5], replace(GREEDY, max_tokens=4))
        bench.finish()
        assert bench.finished(sequence).reason is FinishReason.END_OF_TURN

    @pytest.mark.parametrize("num_prompt_tokens", [1, 10, 15])
    def test_end_of_the_context(self, num_prompt_tokens: int) -> None:
        bench = Bench(runner=FakeRunner(context_length=16, logits_after=spelling("x" * 30, num_prompt_tokens)))
        sequence = bench.add([5] * num_prompt_tokens, replace(GREEDY, max_tokens=30))
        bench.finish()
        assert bench.finished(sequence).reason is FinishReason.LENGTH
        assert bench.finished(sequence).completion_tokens == 16 - num_prompt_tokens

    @pytest.mark.parametrize("num_prompt_tokens", [0, 16, 17])
    def test_prompt_that_leaves_no_room_is_refused_before_any_compute(self, num_prompt_tokens: int) -> None:
        bench = Bench(runner=FakeRunner(context_length=16))
        with pytest.raises(InvalidRequestError, match=rf"messages: have {num_prompt_tokens} tokens; give 1 to 15"):
            bench.add([5] * num_prompt_tokens)
        assert not bench.engine.has_work

    def test_sequence_is_added_once(self) -> None:
        bench = Bench()
        sequence = bench.add([1])
        with pytest.raises(ValueError, match="was added before"):
            bench.engine.add(sequence)

    def test_stop_string_across_tokens_is_never_emitted(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=spelling("one END two")))
        sequence = bench.add([5], replace(GREEDY, max_tokens=50, stop=("END", "two")))
        bench.finish()
        assert bench.text(sequence) == "one "
        assert bench.finished(sequence).reason is FinishReason.STOP_STRING
        assert bench.finished(sequence).completion_tokens == len("one END")

    def test_partial_stop_string_is_emitted_at_the_end(self) -> None:
        for max_tokens, reason in ((3, FinishReason.LENGTH), (8, FinishReason.END_OF_TURN)):
            bench = Bench(runner=FakeRunner(logits_after=spelling("xEN")))
            sequence = bench.add([5], replace(GREEDY, max_tokens=max_tokens, stop=("END",)))
            bench.finish()
            assert bench.text(sequence) == "xEN"
            assert bench.finished(sequence).reason is reason

    def test_stop_string_that_waited_for_a_longer_one_is_found_at_the_end(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=spelling("xabc")))
        sequence = bench.add([5], replace(GREEDY, stop=("abcd", "bc")))
        bench.finish()
        assert bench.text(sequence) == "xa"
        assert bench.finished(sequence).reason is FinishReason.STOP_STRING

    def test_character_cut_by_max_tokens_is_flushed_as_a_full_decode_gives_it(self) -> None:
        for max_tokens in range(1, 6):
            bench = Bench(runner=FakeRunner(logits_after=spelling("a😀", end=False)))
            sequence = bench.add([5], replace(GREEDY, max_tokens=max_tokens))
            bench.finish()
            assert bench.text(sequence) == "a😀".encode()[:max_tokens].decode(errors="replace")

    def test_deltas_are_valid_text_and_never_empty(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=spelling("né 😀 日本")))
        sequence = bench.add([5], replace(GREEDY, max_tokens=50))
        bench.finish()
        deltas = [event.text for event in bench.of(sequence) if isinstance(event, Delta)]
        assert deltas == ["n", "é", " ", "😀", " ", "日", "本"]


class TestTime:
    def test_timings_are_those_of_the_clock(self) -> None:
        bench = Bench(runner=FakeRunner(num_slots=1, logits_after=hashed_logits(VOCAB, seed=1)), prefill_chunk=4)
        first = bench.add([1], replace(GREEDY, max_tokens=2))
        sequence = bench.add(range(8), replace(GREEDY, max_tokens=3))
        bench.step()
        bench.clock.now += 2
        bench.step()
        bench.clock.now += 3
        bench.step()  # first chunk, 5 s after its arrival
        bench.clock.now += 7
        bench.step()  # second chunk: first token
        bench.clock.now += 11
        bench.step()
        bench.clock.now += 13
        bench.step()
        assert bench.finished(first).queue_seconds == 0
        finished = bench.finished(sequence)
        assert finished.queue_seconds == 5
        assert finished.prefill_seconds == 7
        assert finished.time_to_first_token_seconds == 12
        assert finished.decode_seconds == 24

    def test_answer_ends_at_the_time_limit_with_what_was_held_back(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=spelling("xxEN", end=False)), max_answer_seconds=10)
        sequence = bench.add([5], replace(GREEDY, max_tokens=1000, stop=("END",)))
        bench.step(4)
        bench.clock.now += 9.9
        bench.step()
        assert bench.engine.has_work
        bench.clock.now += 0.1
        bench.step()
        assert not bench.engine.has_work
        assert bench.finished(sequence).reason is FinishReason.TIME_LIMIT
        assert bench.text(sequence).startswith("xxEN")
        assert bench.finished(sequence).completion_tokens == len(sequence.output_ids) == 5

    def test_time_limit_counts_from_the_slot(self) -> None:
        bench = Bench(runner=FakeRunner(num_slots=1), max_answer_seconds=10)
        bench.add([1], replace(GREEDY, max_tokens=1))
        waiting = bench.add([2], replace(GREEDY, max_tokens=5))
        bench.step()
        bench.clock.now += 100
        bench.finish()
        assert bench.finished(waiting).reason is FinishReason.LENGTH

    def test_time_limit_holds_during_the_prompt(self) -> None:
        bench = Bench(prefill_chunk=1, max_answer_seconds=10)
        sequence = bench.add(range(50))
        bench.step()
        bench.clock.now += 10
        bench.step()
        finished = bench.finished(sequence)
        assert finished.reason is FinishReason.TIME_LIMIT
        assert (finished.completion_tokens, finished.prefill_seconds) == (0, 10)
        assert (finished.time_to_first_token_seconds, finished.decode_seconds) == (0, 0)

    def test_deadline_ends_waiting_prefilling_and_decoding_sequences(self) -> None:
        bench = Bench(runner=FakeRunner(num_slots=2), prefill_chunk=4)
        deadline = bench.clock.now + 5
        decoding = bench.add([1], replace(GREEDY, max_tokens=50), deadline=deadline)
        bench.step(2)
        prefilling = bench.add(range(40), deadline=deadline)
        waiting = bench.add([2], deadline=deadline)
        unhurried = bench.add([3])
        bench.step()
        bench.clock.now += 5
        num_forwards = bench.runner.num_forwards
        bench.step()
        for sequence in (decoding, prefilling, waiting):
            assert bench.finished(sequence).reason is FinishReason.TIME_LIMIT
        assert bench.finished(waiting).queue_seconds == 5
        assert bench.runner.num_forwards == num_forwards + 1  # that of the one which waited behind them
        bench.finish()
        assert unhurried.output_ids == solo([3])


class TestPrefixReuse:
    def test_next_turn_reuses_prompt_and_answer(self) -> None:
        bench = Bench()
        first = bench.add(range(10))
        bench.finish()
        # The KV of an answer's last token was never computed.
        second = bench.add([*range(10), *first.output_ids, 1, 2, 3])
        bench.finish()
        assert bench.finished(first).cached_prompt_tokens == 0
        assert bench.finished(second).cached_prompt_tokens == 10 + len(first.output_ids) - 1
        assert second.output_ids == solo(second.prompt_ids)

    def test_same_prompt_again_runs_one_token(self) -> None:
        bench = Bench()
        bench.add(range(10))
        bench.finish()
        again = bench.add(range(10))
        bench.runner.calls.clear()
        bench.step()
        assert [(rows, length) for _, rows, length in bench.runner.calls] == [(1, 1)]
        bench.finish()
        assert again.output_ids == solo(range(10))

    @pytest.mark.parametrize("num_tokens", [8, 9, 10, 16, 17, 18, 25])
    def test_no_part_of_a_prompt_is_shorter_than_the_runner_wants(self, num_tokens: int) -> None:
        bench = Bench(FakeRunner(min_run=2, preset_tokens=(0,)))
        for _ in range(2):
            bench.runner.calls.clear()
            sequence = bench.add(range(num_tokens), replace(GREEDY, max_tokens=1))
            bench.finish()
            assert [length for _, _, length in bench.runner.calls if length < 2] == []
        assert bench.finished(sequence).cached_prompt_tokens == num_tokens - 2

    def test_answer_is_read_again_where_decoding_writes_other_bits(self) -> None:
        bench = Bench(FakeRunner(min_run=2))
        first = bench.add(range(10))
        while first.state is not SequenceState.ENDED:
            bench.step()
        second = bench.add([*range(10), *first.output_ids, 1, 2, 3])
        bench.finish()
        assert bench.finished(second).cached_prompt_tokens == 10
        assert second.output_ids == solo(second.prompt_ids)

    def test_answer_is_read_while_nobody_asks(self) -> None:
        bench = Bench(FakeRunner(min_run=2))
        first = bench.add(range(10), replace(GREEDY, max_tokens=20))
        bench.finish()
        # The last token of all was chosen and never run.
        assert len(first.output_ids) == 20
        assert bench.runner.num_rests == 1
        bench.runner.calls.clear()
        second = bench.add([*range(10), *first.output_ids, 1, 2, 3])
        bench.finish()
        assert bench.finished(second).cached_prompt_tokens == 29
        assert second.output_ids == solo(second.prompt_ids)

    def test_who_asks_waits_for_one_chunk_of_an_old_answer_at_most(self) -> None:
        bench = Bench(FakeRunner(min_run=2))
        first = bench.add(range(10), replace(GREEDY, max_tokens=30))
        while first.state is not SequenceState.ENDED:
            bench.step()
        bench.runner.calls.clear()
        bench.step()
        assert bench.runner.calls == [(first.slot, 1, bench.prefill_chunk)]
        second = bench.add([7, 7, 7], identity="b")
        bench.step()
        assert second.output_ids
        bench.finish()
        again = bench.add([*range(10), *first.output_ids, 1, 2, 3])
        bench.finish()
        assert bench.finished(again).cached_prompt_tokens == 39

    def test_an_answer_that_cannot_be_read_again_is_forgotten(self) -> None:
        bench = Bench(FakeRunner(min_run=2))
        first = bench.add(range(10))
        while first.state is not SequenceState.ENDED:
            bench.step()
        bench.runner.fail_next = OSError("canary")
        bench.finish()
        second = bench.add([*range(10), *first.output_ids, 1, 2, 3])
        bench.finish()
        assert bench.finished(second).cached_prompt_tokens == 0
        assert second.output_ids == solo(second.prompt_ids)

    def test_one_conversation_at_a_time_moves_no_kv(self) -> None:
        bench = Bench()
        conversations: list[list[int]] = [[1], [2], [3]]
        for _ in range(3):
            for conversation in conversations:
                conversation += [4, 5]
                sequence = bench.add(conversation)
                bench.finish()
                assert sequence.output_ids == solo(conversation)
                conversation += sequence.output_ids
        assert bench.runner.num_copied == 0
        assert bench.finished(sequence).cached_prompt_tokens > 0

    def test_other_identity_reuses_nothing(self) -> None:
        bench = Bench()
        bench.add(range(10), identity="alice")
        bench.finish()
        bob, alice = bench.add(range(10), identity="bob"), bench.add(range(10), identity="alice")
        bench.finish()
        assert bench.finished(bob).cached_prompt_tokens == 0
        assert bench.finished(alice).cached_prompt_tokens == 9
        assert bob.output_ids == alice.output_ids == solo(range(10))

    def test_sequences_that_run_at_once_share_a_beginning(self) -> None:
        bench = Bench()
        first = bench.add([*range(20), 100], replace(GREEDY, max_tokens=30))
        bench.step(5)
        second = bench.add([*range(20), 200])
        bench.finish()
        assert bench.finished(second).cached_prompt_tokens == 20
        assert first.output_ids == solo(first.prompt_ids, first.params)
        assert second.output_ids == solo(second.prompt_ids)

    def test_preset_is_not_run_and_not_counted(self) -> None:
        bench = Bench(runner=FakeRunner(preset_tokens=(9, 8, 7)))
        sequence = bench.add([9, 8, 7, 1, 2])
        bench.step()
        assert bench.runner.calls == [(0, 1, 2)]
        bench.finish()
        assert bench.finished(sequence).cached_prompt_tokens == 0
        assert sequence.output_ids == solo([9, 8, 7, 1, 2])


class TestLogprobs:
    def test_only_if_asked(self) -> None:
        bench = Bench()
        sequence = bench.add([1])
        bench.finish()
        assert bench.logprobs(sequence) == []

    def test_are_those_of_the_raw_logits(self) -> None:
        bench = Bench()
        params = SamplingParams(max_tokens=6, temperature=1.7, top_k=3, seed=4, presence_penalty=1.0, top_logprobs=2)
        sequence = bench.add([1, 2], params)
        bench.finish()
        reported = bench.logprobs(sequence)
        assert [each.token_id for each in reported] == sequence.output_ids
        history = [1, 2]
        for each in reported:
            logits = hashed_logits(VOCAB)(history).astype(np.float64)
            distribution = logits - np.log(np.exp(logits).sum())
            order = np.argsort(-distribution)[:2]
            assert each.logprob == pytest.approx(distribution[each.token_id])
            assert [top.token_id for top in each.top] == order.tolist()
            assert [top.logprob for top in each.top] == pytest.approx(distribution[order])
            assert each.text == TOKENIZER.token_bytes(each.token_id)
            history.append(each.token_id)

    def test_come_with_the_delta_that_completes_their_text(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=spelling("aé")))
        sequence = bench.add([5], replace(GREEDY, top_logprobs=0))
        bench.finish()
        deltas = [event for event in bench.of(sequence) if isinstance(event, Delta)]
        assert [(delta.text, [each.text for each in delta.token_logprobs]) for delta in deltas] == [
            ("a", [b"a"]),
            ("é", ["é".encode()[:1], "é".encode()[1:]]),
        ]

    def test_wait_with_text_that_may_begin_a_stop_string(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=spelling("xENx")))
        sequence = bench.add([5], replace(GREEDY, top_logprobs=0, stop=("END",)))
        bench.finish()
        deltas = [event for event in bench.of(sequence) if isinstance(event, Delta)]
        assert [(delta.text, b"".join(each.text for each in delta.token_logprobs)) for delta in deltas] == [
            ("x", b"x"),
            ("ENx", b"ENx"),
        ]

    def test_stop_strings_own_tokens_have_none(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=spelling("abEND")))
        sequence = bench.add([5], replace(GREEDY, top_logprobs=0, stop=("END",)))
        bench.finish()
        assert b"".join(each.text for each in bench.logprobs(sequence)) == b"ab"

    def test_control_token_within_the_answer_has_one_without_text(self) -> None:
        bench = Bench(runner=FakeRunner(logits_after=scripted(VOCAB, 1, [97, 256, 98, END])))
        sequence = bench.add([5], replace(GREEDY, top_logprobs=0))
        bench.finish()
        assert [(each.token_id, each.text) for each in bench.logprobs(sequence)] == [(97, b"a"), (256, b""), (98, b"b")]
        assert bench.text(sequence) == "ab"

    @settings(max_examples=200)
    @given(
        st.lists(st.sampled_from([*"aé😀".encode(), 97, 98, 256, 258, 261]), max_size=20),
        st.lists(st.sampled_from(["ab", "b", "aé", "😀a", "<think"]), max_size=2).map(tuple),
    )
    def test_each_token_outside_of_a_stop_string_has_exactly_one(
        self, answer: list[int], stop: tuple[str, ...]
    ) -> None:
        bench = Bench(runner=FakeRunner(logits_after=scripted(VOCAB, 1, [*answer, END])))
        sequence = bench.add([5], replace(GREEDY, max_tokens=30, top_logprobs=1, stop=stop))
        bench.finish()
        reported = [each.token_id for each in bench.logprobs(sequence)]
        assert reported == answer[: len(reported)]
        if bench.finished(sequence).reason is FinishReason.END_OF_TURN:
            assert reported == answer
        # A delta with text has at least as many bytes of tokens, counted from the beginning.
        num_bytes = num_token_bytes = 0
        for event in bench.of(sequence):
            if isinstance(event, Delta):
                assert event.text or event.token_logprobs
                num_bytes += len(event.text.replace("\N{REPLACEMENT CHARACTER}", "").encode())
                num_token_bytes += sum(len(each.text) for each in event.token_logprobs)
        assert num_bytes <= num_token_bytes
