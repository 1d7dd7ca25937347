"""The engine with drafts, right and wrong ones: nobody can tell an answer from one without."""

from collections.abc import Sequence as Tokens
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine_bench import END, GREEDY, VOCAB, Bench, solo, spelling
from fakes import FakeRunner, expected_tokens, hashed_logits
from hearth._responses import parse_answer
from hearthd.generation.drafting import Drafting
from hearthd.generation.engine import Event, Finished, FinishReason, RunTerminated, Sequence
from hearthd.sequences.sampling import NonFiniteLogitsError, SamplingParams
from hearthd.services.convert import to_chat_response

CONTEXT = 40
LOOP = "round and round it goes, and "


class Guessing(Drafting):
    """Guesses that are right as often as a test likes, of any length, whatever they cost."""

    def __init__(self, runner: FakeRunner, *, share_right: float, seed: int = 0) -> None:
        super().__init__(context_length=runner.context_length)
        self._runner = runner
        self._share_right = share_right
        self._random = np.random.default_rng(seed)

    def draft(self, batch: Tokens[Sequence]) -> list[int]:
        if len(batch) != 1:
            return []
        (sequence,) = batch
        context_length = self._runner.context_length
        answer = expected_tokens(
            self._runner.logits_after, sequence.prompt_ids, sequence.params, context_length=context_length
        )
        # The run's last token is not drafted.
        room = min(sequence.params.max_tokens, context_length - len(sequence.prompt_ids)) - len(sequence.output_ids) - 1
        length = int(self._random.integers(0, room + 1))
        guess = answer[len(sequence.output_ids) :][:length]
        wrong = self._random.random(len(guess)) > self._share_right
        return [
            (token_id + 1) % VOCAB if is_wrong else token_id for token_id, is_wrong in zip(guess, wrong, strict=True)
        ]


def bench_with(runner: FakeRunner, share_right: float, seed: int = 0) -> Bench:
    return Bench(runner=runner, drafting=Guessing(runner, share_right=share_right, seed=seed))


def comparable(events: list[Event]) -> list[Event]:
    """What a caller sees of an answer, without what tells of drafts."""
    return [
        replace(each, drafted_tokens=0, accepted_tokens=0) if isinstance(each, Finished) else each for each in events
    ]


prompts = st.lists(st.integers(0, 255), min_size=1, max_size=CONTEXT - 1)
any_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**64 - 1),
    stop=st.sampled_from([(), ("a",), ("e", "th")]),
    top_logprobs=st.sampled_from([None, 2]),
)


class TestExactness:
    @settings(max_examples=150, deadline=None)
    @given(
        prompt=prompts,
        params=any_params,
        share_right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        seed=st.integers(0, 99),
        min_run=st.integers(1, 2),
    )
    def test_events_kv_and_the_next_turn_are_those_without_drafts(
        self, prompt: list[int], params: SamplingParams, share_right: float, seed: int, min_run: int
    ) -> None:
        """Also with sampling: each place has its own draw, from the same logits, in the same order."""
        seen = []
        for has_drafts in (False, True):
            runner = FakeRunner(context_length=CONTEXT, min_run=min_run)
            bench = bench_with(runner, share_right, seed) if has_drafts else Bench(runner=runner)
            first = bench.add(prompt, params)
            bench.finish()
            held = runner.slots[first.slot][: len(prompt) + len(first.output_ids) - 1]
            second = bench.add([*prompt, *first.output_ids, 7][: CONTEXT - 1], params)
            bench.finish()
            seen.append((comparable(bench.of(first)), held, comparable(bench.of(second)), second.output_ids))
        assert seen[0] == seen[1]

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_whoever_comes_and_goes_each_gets_its_solo_answer(self, data: st.DataObject) -> None:
        runner = FakeRunner(num_slots=3, context_length=CONTEXT)
        bench = bench_with(runner, 0.8, data.draw(st.integers(0, 99)))
        alive: list[Sequence] = []
        for action in data.draw(st.lists(st.sampled_from("asssstr"), max_size=40)):
            if action == "a":
                alive.append(bench.add(data.draw(prompts), replace(data.draw(any_params), stop=())))
            elif action == "r" and alive:
                bench.engine.remove(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
            else:
                runner.fail_next = RunTerminated() if action == "t" else None
                bench.step()
        runner.fail_next = None
        bench.finish()
        for sequence in alive:
            assert sequence.output_ids == solo(sequence.prompt_ids, sequence.params, context_length=CONTEXT)

    def test_a_draft_that_ends_the_answer_ends_it_there(self) -> None:
        runner = FakeRunner(logits_after=spelling("short."))
        bench = bench_with(runner, 1.0)
        sequence = bench.add([1], replace(GREEDY, max_tokens=50))
        bench.finish()
        assert sequence.output_ids == [*b"short.", END]
        assert bench.finished(sequence).reason is FinishReason.END_OF_TURN
        assert max(runner.verified) > 7

    def test_a_stop_string_within_a_draft_ends_the_answer_there(self) -> None:
        runner = FakeRunner(logits_after=spelling("one two three four"))
        bench = bench_with(runner, 1.0)
        sequence = bench.add([1], replace(GREEDY, max_tokens=50, stop=("two",)))
        bench.finish()
        assert bench.text(sequence) == "one "
        assert bench.finished(sequence).completion_tokens == len("one two")
        assert bench.finished(sequence).reason is FinishReason.STOP_STRING


class TestErrors:
    def test_a_run_that_fails_fails_its_sequence_alone(self) -> None:
        runner = FakeRunner()
        bench = bench_with(runner, 1.0)
        sequence = bench.add([1, 2], replace(GREEDY, max_tokens=40))
        bench.step(2)
        runner.fail_next = OSError("broken")
        while not runner.verified or runner.fail_next is not None:
            bench.step()
        assert isinstance(bench.failure(sequence), OSError)
        after = bench.add([1, 2])
        bench.finish()
        assert after.output_ids == solo([1, 2])

    def test_logits_that_nothing_can_be_chosen_from_fail_it_where_they_come(self) -> None:
        answer = hashed_logits(VOCAB)

        def sick(history: Tokens[int]) -> NDArray[np.float32]:
            return np.full(VOCAB, np.nan, np.float32) if len(history) == 9 else answer(history)

        class Blind(Guessing):
            def draft(self, batch: Tokens[Sequence]) -> list[int]:
                return solo([1, 2], replace(GREEDY, max_tokens=20))[len(batch[0].output_ids) :]

        runner = FakeRunner(logits_after=sick)
        bench = Bench(runner=runner, drafting=Blind(runner, share_right=1))
        sequence = bench.add([1, 2], replace(GREEDY, max_tokens=40))
        bench.finish()
        assert isinstance(bench.failure(sequence), NonFiniteLogitsError)
        assert sequence.output_ids == solo([1, 2])[:7]


class TestDrafting:
    def test_a_text_that_goes_round_is_run_in_fewer_runs(self) -> None:
        params = replace(GREEDY, max_tokens=200)
        runner = FakeRunner(logits_after=spelling(LOOP * 10, end=False), context_length=512)
        bench = Bench(runner=runner, drafting=Drafting(context_length=runner.context_length))
        sequence = bench.add([1], params)
        bench.finish()
        assert bytes(sequence.output_ids).decode() == (LOOP * 10)[:200]
        finished = bench.finished(sequence)
        assert finished.accepted_tokens >= 100
        assert finished.accepted_tokens <= finished.drafted_tokens == sum(runner.verified) - len(runner.verified)

    def test_it_steps_aside_in_a_batch(self) -> None:
        params = replace(GREEDY, max_tokens=100)
        runner = FakeRunner(logits_after=spelling(LOOP * 10, end=False))
        bench = Bench(runner=runner, drafting=Drafting(context_length=runner.context_length))
        sequences = [bench.add([1], params), bench.add([1], params)]
        bench.finish()
        assert not runner.verified
        assert [bench.finished(sequence).drafted_tokens for sequence in sequences] == [0, 0]

    @pytest.mark.parametrize("max_tokens", range(60, 75))
    def test_no_draft_goes_beyond_the_answers_end(self, max_tokens: int) -> None:
        """The KV that is set aside for an answer has no room for it."""
        runner = FakeRunner(logits_after=spelling(LOOP * 10, end=False))
        bench = Bench(runner=runner, drafting=Drafting(context_length=runner.context_length))
        sequence = bench.add([1], replace(GREEDY, max_tokens=max_tokens))
        bench.finish()
        assert len(sequence.output_ids) == max_tokens
        assert runner.verified
        assert len(runner.slots[sequence.slot]) <= max_tokens


def test_a_client_is_told_of_drafts_in_the_usage() -> None:
    runner = FakeRunner()
    bench = bench_with(runner, 0.8)
    sequence = bench.add([1], replace(GREEDY, max_tokens=60))
    bench.finish()
    finished = bench.finished(sequence)
    usage = parse_answer(to_chat_response(finished, "r", "m").final, "", ()).usage
    assert (usage.drafted_tokens, usage.accepted_tokens) == (finished.drafted_tokens, finished.accepted_tokens)
    assert usage.completion_tokens == 60


def test_the_guesses_of_these_tests_are_right_and_wrong() -> None:
    """Or else they would show nothing."""
    runner = FakeRunner()
    bench = bench_with(runner, 0.8)
    sequence = bench.add([1], replace(GREEDY, max_tokens=60))
    bench.finish()
    assert 0 < bench.finished(sequence).accepted_tokens < bench.finished(sequence).drafted_tokens
