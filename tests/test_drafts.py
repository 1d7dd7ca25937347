"""Drafts: what is guessed, when it is worth a run, and that no answer is another one for it."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeRunner
from hearthd.drafts.drafter import Drafter
from hearthd.drafts.exactness import is_exact
from hearthd.drafts.repeats import SHORTEST, Repeats
from hearthd.drafts.run_costs import LENGTHS, RunCosts
from hearthd.generation.drafting import drafting_for

# So few that texts repeat themselves all the time.
TEXTS = st.lists(st.integers(0, 3), max_size=40)


def costs(per_token: float = 0.1) -> RunCosts:
    """A runner on which each further token of a run takes so much of a step, measured."""
    found = RunCosts()
    for length in (1, *LENGTHS):
        found.note(length, 1 + per_token * (length - 1))
    return found


def longest_repeat(text: Sequence[int]) -> int:
    """Find how many tokens at the end stood there before, by looking everywhere."""
    return max(
        (
            length
            for length in range(SHORTEST, len(text))
            if any(text[end - length : end] == text[-length:] for end in range(length, len(text)))
        ),
        default=0,
    )


class TestRepeats:
    @given(given_ids=TEXTS, more_ids=TEXTS)
    def test_what_it_finds_stood_there_before(self, given_ids: list[int], more_ids: list[int]) -> None:
        """Whether the text came at once or token by token."""
        repeats, text = Repeats(given_ids), list(given_ids)
        for token_id in [*more_ids, None]:
            length = repeats.length
            assert (length == 0) == (longest_repeat(text) == 0)
            if length:
                following = repeats.following(5)
                assert following[0] == repeats.next_id
                seen = [*text, *following]
                places = range(length, len(text))
                assert any(
                    text[end - length : end] == text[-length:] and seen[end : end + 5] == following for end in places
                )
            else:
                assert repeats.following(5) == []
            if token_id is not None:
                repeats.append(token_id)
                text.append(token_id)
                assert len(repeats) == len(text)

    def test_the_longest_repeat_wins_over_a_later_one(self) -> None:
        assert Repeats([1, 2, 3, 4, 9, 3, 4, 8, 1, 2, 3, 4]).following(3) == [9, 3, 4]

    def test_of_equal_ones_the_last_wins(self) -> None:
        assert Repeats([3, 4, 7, 5, 3, 4, 8, 6, 3, 4]).following(2) == [8, 6]

    def test_a_text_that_goes_round_is_drafted_round_and_round(self) -> None:
        assert Repeats([1, 2, 3, 1, 2, 3, 1, 2]).following(7) == [3, 1, 2, 3, 1, 2, 3]

    def test_a_repeat_that_goes_on_grows_beyond_what_is_looked_back(self) -> None:
        text = list(range(100))
        repeats = Repeats(text)
        for token_id in text:
            repeats.append(token_id)
        assert repeats.length > 90


def answered(drafter: Drafter, answer: Sequence[int], run_costs: RunCosts, per_token: float) -> tuple[float, int]:
    """Let an answer come, drafted as far as the drafter likes; return the time in steps, and the tokens drafted."""
    output, time, num_drafted = list(answer[:1]), 0.0, 0
    while len(output) < len(answer):
        draft = drafter.draft(output, len(answer) - len(output) - 1)
        seconds = 1 + per_token * len(draft)
        run_costs.note(len(draft) + 1, seconds)
        time += seconds
        num_taken = 0
        for guess in (*draft, None):
            output.append(answer[len(output)])
            num_taken += 1
            if output[-1] != guess:
                break
        num_drafted += len(draft)
        if draft:
            drafter.note_taken(len(draft), num_taken)
    return time, num_drafted


class TestDrafter:
    def test_a_repeated_text_takes_a_fraction_of_the_steps(self) -> None:
        text = [place * 7 % 501 for place in range(200)]
        run_costs = costs()
        time, _ = answered(Drafter(text, run_costs), text[:150], run_costs, 0.1)
        assert time < 0.35 * 150

    def test_a_text_without_repeats_is_never_drafted(self) -> None:
        run_costs = costs()
        assert answered(Drafter(range(100), run_costs), range(100, 300), run_costs, 0.1) == (199, 0)

    @pytest.mark.parametrize("num_tokens", [8, 30, 400])
    @pytest.mark.parametrize("per_token", [0.02, 0.1, 0.4, 1.0])
    def test_a_text_that_misleads_costs_3_percent_at_most(self, per_token: float, num_tokens: int) -> None:
        """Pairs come again all the time, and are followed by something else each time, or nearly."""
        any_drafted = 0
        for seed in range(8):
            random = np.random.default_rng(seed)
            prompt, answer = random.integers(0, 6 + seed, (2, 400)).tolist()
            run_costs = costs(per_token)
            time, num_drafted = answered(Drafter(prompt, run_costs), answer[:num_tokens], run_costs, per_token)
            assert time <= 1.03 * (num_tokens - 1)
            any_drafted += num_drafted
        assert any_drafted > 0 or per_token > 0.1

    @pytest.mark.parametrize("per_token", [0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0])
    def test_whoever_makes_every_guess_wrong_makes_no_answer_3_percent_slower_at_any_length(
        self, per_token: float
    ) -> None:
        """Whatever is drafted is wrong from its first token on, and what is not drafted repeats the text."""
        num_drafted = 0
        for seed in range(60):
            random = np.random.default_rng(seed)
            run_costs = costs(per_token)
            prompt = random.integers(0, 3, int(random.choice([20, 60, 200]))).tolist()
            drafter = Drafter(prompt, run_costs)
            output, time = [int(random.integers(0, 3))], 0.0
            while len(output) <= 60:
                draft = drafter.draft(output, 60)
                seconds = 1 + per_token * len(draft)
                run_costs.note(len(draft) + 1, seconds)
                time += seconds
                if draft:
                    num_drafted += 1
                    output.append((draft[0] + 1) % 3)
                    drafter.note_taken(len(draft), 1)
                else:
                    output.append(int(random.integers(3, 40000) if random.random() < 0.3 else random.integers(0, 3)))
                assert time <= 1.03 * (len(output) - 1)
        assert num_drafted > 0 or per_token > 0.2

    def test_where_longer_runs_cost_their_length_nothing_is_drafted(self) -> None:
        text = [place * 7 % 501 for place in range(200)]
        run_costs = costs(1.0)
        assert answered(Drafter(text, run_costs), text[:150], run_costs, 1.0)[1] == 0

    def test_without_a_measured_step_nothing_is_drafted(self) -> None:
        assert Drafter([1, 2, 3, 1], RunCosts()).draft([2], 10) == []

    @given(prompt=TEXTS, answer=TEXTS.filter(bool), most=st.integers(0, 12))
    def test_no_more_is_drafted_than_there_is_room_for(self, prompt: list[int], answer: list[int], most: int) -> None:
        draft = Drafter(prompt, costs(0)).draft(answer, most)
        assert len(draft) <= most
        assert len(draft) + 1 in (1, *LENGTHS)

    def test_tokens_that_came_in_a_batch_are_read_as_well(self) -> None:
        """How they were computed makes no difference."""
        text = [place * 7 % 501 for place in range(60)]
        at_once, one_by_one = Drafter(text, costs()), Drafter(text, costs())
        for end in range(1, 21):
            expected = one_by_one.draft(text[:end], 11)
        assert at_once.draft(text[:20], 11) == expected != []


class TestRunCosts:
    def test_a_run_that_was_held_up_once_does_not_count(self) -> None:
        run_costs = RunCosts()
        for seconds in (1.0, 1.0, 50.0, 1.1, 1.0):
            run_costs.note(1, seconds)
            run_costs.note(4, 1.5 * seconds)
        assert run_costs.in_steps(4) == pytest.approx(1.5)

    def test_a_length_that_was_measured_badly_is_tried_again_some_day(self) -> None:
        run_costs = RunCosts()
        run_costs.note(1, 1.0)
        run_costs.note(4, 20.0)
        assert run_costs.in_steps(4) == 20
        for _ in range(2000):
            run_costs.note(1, 1.0)
        assert run_costs.in_steps(4) < 2
        run_costs.note(4, 1.2)
        assert run_costs.in_steps(4) == pytest.approx(1.2)

    def test_a_step_is_measured_again_now_and_then(self) -> None:
        run_costs = costs()
        run_costs.note(4, 1.0)
        assert run_costs.is_step_known
        for _ in range(100):
            run_costs.note(4, 1.0)
        assert not run_costs.is_step_known
        run_costs.note(1, 1.0)
        assert run_costs.is_step_known


class OtherBits(FakeRunner):
    """Whose runs of so many tokens give other bits in one place."""

    def __init__(self, length: int, place: int) -> None:
        super().__init__()
        self._length, self._place = length, place

    def verify(self, token_ids: np.ndarray, slot: int, num_past: int) -> np.ndarray:
        logits = super().verify(token_ids, slot, num_past)
        if len(token_ids) == self._length:
            logits[self._place, 3] = np.nextafter(logits[self._place, 3], np.inf, dtype=np.float32)
        return logits


class OtherKV(OtherBits):
    """Whose runs of so many tokens write other KV than steps do in one place."""

    def verify(self, token_ids: np.ndarray, slot: int, num_past: int) -> np.ndarray:
        logits = FakeRunner.verify(self, token_ids, slot, num_past)
        if len(token_ids) == self._length:
            self.slots[slot][num_past + self._place] += 1
        return logits


class NoKV(FakeRunner):
    """Whose runs of several tokens leave what stands there."""

    def verify(self, token_ids: np.ndarray, slot: int, num_past: int) -> np.ndarray:
        before = list(self.slots[slot])
        logits = super().verify(token_ids, slot, num_past)
        self.slots[slot] = before
        return logits


# Every position of every run that drafts may make.
PLACES = [(length, place) for length in LENGTHS for place in range(length)]


class TestExactness:
    def test_a_runner_whose_runs_agree_is_exact(self) -> None:
        assert is_exact(FakeRunner(), range(20))

    def test_all_lengths_that_drafts_have_are_tried_and_no_others(self) -> None:
        runner = FakeRunner()
        assert is_exact(runner, range(20))
        assert runner.verified == list(LENGTHS)

    @pytest.mark.parametrize(("length", "place"), PLACES)
    def test_one_other_bit_is_found(self, length: int, place: int) -> None:
        assert not is_exact(OtherBits(length, place), range(20))

    @pytest.mark.parametrize(("length", "place"), PLACES)
    def test_other_kv_is_found(self, length: int, place: int) -> None:
        assert not is_exact(OtherKV(length, place), range(20))

    def test_kv_that_is_not_written_is_found(self) -> None:
        assert not is_exact(NoKV(), range(20))

    @pytest.mark.parametrize("context_length", [64, 24, 12])
    def test_a_short_context_is_enough(self, context_length: int) -> None:
        assert is_exact(FakeRunner(context_length=context_length), range(20))

    def test_a_processor_of_other_bits_has_no_drafts_and_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        assert drafting_for(FakeRunner(), range(20)) is not None
        assert not caplog.messages
        assert drafting_for(OtherBits(2, 1), range(20)) is None
        assert caplog.messages == ["no drafts: on this processor they would change answers; nothing else is affected"]

    def test_a_model_without_logits_of_several_positions_is_not_tried(self) -> None:
        runner = FakeRunner()
        runner.can_verify = False
        assert drafting_for(runner, range(20)) is None
        assert not runner.calls
