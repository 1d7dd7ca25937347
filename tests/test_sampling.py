"""Sampling: each filter by hand-computed vectors, the sampler's promises, and every range of the parameters."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hearthd.errors import InvalidRequestError
from hearthd.sequences.logits import (
    apply_answer_penalties,
    apply_repetition_penalty,
    apply_temperature,
    draw,
    logprobs,
    min_p_places,
    top_k_places,
    top_p_places,
)
from hearthd.sequences.sampling import NonFiniteLogitsError, Sampler, SamplingParams, validate

PLAIN = SamplingParams(max_tokens=100)
GREEDY = SamplingParams(max_tokens=100, temperature=0.0)


def row(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def log_of(*probabilities: float) -> NDArray[np.float32]:
    return np.log(np.array(probabilities, np.float64)).astype(np.float32)


logit_rows = st.lists(
    st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -math.inf]), min_size=1, max_size=40
).filter(lambda values: max(values) > -math.inf)


class TestPenalties:
    def test_repetition_divides_positive_and_multiplies_negative_logits(self) -> None:
        logits = row(4, -4, 0, 3)
        changed = apply_repetition_penalty(logits, np.array([0, 1, 2]), 2.0)
        assert changed.tolist() == [2, -8, 0, 3]
        assert logits.tolist() == [4, -4, 0, 3]

    def test_repetition_below_one_favours_what_was_seen(self) -> None:
        assert apply_repetition_penalty(row(4, -4), np.array([0, 1]), 0.5).tolist() == [8, -2]

    def test_tiny_repetition_penalty_stays_finite(self) -> None:
        for penalty in (1e-45, 1e-300, 5e-324):
            changed = apply_repetition_penalty(row(4, -4, 1), np.array([0, 1]), penalty)
            assert np.isfinite(changed).all()
            assert changed[0] == np.finfo(np.float32).max

    def test_presence_counts_once_and_frequency_each_time(self) -> None:
        logits = row(1, 1, 1, 1)
        changed = apply_answer_penalties(logits, np.array([0, 1, 3]), np.array([1, 3, 0]), 0.5, 0.25)
        assert changed.tolist() == [0.25, -0.25, 1, 1]
        assert logits.tolist() == [1, 1, 1, 1]

    def test_sampler_penalises_prompt_by_repetition_only(self) -> None:
        logits = row(1.0, 0.9, 0.0)
        assert Sampler(replace(GREEDY, repetition_penalty=1.2), [0, 0]).sample(logits) == 1
        assert Sampler(replace(GREEDY, presence_penalty=2.0, frequency_penalty=2.0), [0, 0]).sample(logits) == 0

    def test_sampler_counts_the_answer_as_it_grows(self) -> None:
        logits = row(1.0, 0.7, 0.0)
        # 0 is 0.4 lower each time: 1.0 | 0.6 against 0.7 | 0.6 against 0.3 | 0.2 against 0.3
        sampler = Sampler(replace(GREEDY, frequency_penalty=0.4), [])
        assert [sampler.sample(logits) for _ in range(4)] == [0, 1, 0, 1]
        sampler = Sampler(replace(GREEDY, presence_penalty=0.4), [])
        assert [sampler.sample(logits) for _ in range(4)] == [0, 1, 0, 0]

    def test_penalties_reach_every_token_of_a_long_answer(self) -> None:
        # With the strongest presence penalty over equal logits, no token comes twice before each came once.
        sampler = Sampler(replace(GREEDY, presence_penalty=2.0), list(range(5)))
        assert [sampler.sample(np.zeros(300, np.float32)) for _ in range(300)] == list(range(300))


class TestTopK:
    def test_keeps_the_likeliest(self) -> None:
        assert top_k_places(row(1, 5, 3, 4), 2).tolist() == [1, 3]

    def test_ties_go_to_the_lowest_ids(self) -> None:
        assert top_k_places(row(2, 7, 2, 2, 7), 3).tolist() == [0, 1, 4]
        assert top_k_places(row(2, 2, 2), 1).tolist() == [0]

    def test_k_over_size_keeps_all(self) -> None:
        assert top_k_places(row(1, 2), 5).tolist() == [0, 1]

    @given(logit_rows, st.integers(1, 50))
    def test_equals_a_stable_sort(self, values: list[float], k: int) -> None:
        logits = row(*values)
        expected = sorted(np.argsort(-logits, kind="stable")[:k].tolist())
        assert top_k_places(logits, k).tolist() == expected


class TestTopP:
    def test_keeps_the_fewest_that_reach_p(self) -> None:
        logits = log_of(0.1, 0.5, 0.15, 0.25)
        assert top_p_places(logits, 0.4).tolist() == [1]
        assert top_p_places(logits, 0.6).tolist() == [1, 3]
        assert top_p_places(logits, 0.76).tolist() == [1, 2, 3]
        assert top_p_places(logits, 0.95).tolist() == [0, 1, 2, 3]

    def test_p_reached_exactly_needs_no_more(self) -> None:
        assert top_p_places(row(0, 0, 0, 0), 0.5).tolist() == [0, 1]

    def test_tiny_p_keeps_one(self) -> None:
        assert top_p_places(row(0, 1, 0), 5e-324).tolist() == [1]
        assert top_p_places(row(1, 1, 1), 5e-324).tolist() == [0]

    @given(logit_rows, st.floats(0.01, 0.99))
    def test_equals_the_definition(self, values: list[float], top_p: float) -> None:
        logits = row(*values)
        weights = np.exp(logits.astype(np.float64) - float(logits.max()))
        probabilities = weights / weights.sum()
        order = np.argsort(-probabilities, kind="stable")
        kept = top_p_places(logits, top_p)
        assert set(kept.tolist()) == set(order[: kept.size].tolist())
        rounding = 1e-12
        assert probabilities[kept].sum() >= top_p - rounding
        assert probabilities[order[: kept.size - 1]].sum() < top_p + rounding


class TestMinP:
    def test_keeps_what_is_likely_enough(self) -> None:
        logits = log_of(0.5, 0.3, 0.16, 0.04)
        assert min_p_places(logits, 0.5).tolist() == [0, 1]
        assert min_p_places(logits, 0.3).tolist() == [0, 1, 2]
        assert min_p_places(logits, 0.01).tolist() == [0, 1, 2, 3]

    def test_one_keeps_only_the_likeliest(self) -> None:
        assert min_p_places(row(3, 1, 3), 1.0).tolist() == [0, 2]

    def test_tiny_value_keeps_all_finite(self) -> None:
        assert min_p_places(row(3, 1, -math.inf), 5e-324).tolist() == [0, 1]


class TestTemperature:
    def test_divides_and_shifts_the_maximum_to_zero(self) -> None:
        assert apply_temperature(row(1, 3, 2), 0.5).tolist() == [-4, 0, -2]

    def test_tiny_temperature_gives_no_nan(self) -> None:
        for temperature in (1e-45, 5e-324):
            scaled = apply_temperature(row(1, 3, 3, -math.inf), temperature)
            assert scaled[[1, 2]].tolist() == [0, 0]
            assert (scaled[[0, 3]] < -1e40).all()


class TestDraw:
    def test_follows_the_cumulative_distribution(self) -> None:
        logits = np.log(np.array([0.25, 0.5, 0.25]))
        chosen = [draw(logits, uniform) for uniform in (0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999)]
        assert chosen == [0, 0, 1, 1, 2, 2]

    def test_never_chooses_the_impossible(self) -> None:
        logits = row(-math.inf, 0, -math.inf)
        largest = np.nextafter(1.0, 0.0)
        assert [draw(logits, uniform) for uniform in (0.0, 0.5, float(largest))] == [1, 1, 1]

    @given(logit_rows, st.sampled_from([0.0, 0.5, float(np.nextafter(1.0, 0.0))]))
    def test_is_always_a_possible_place(self, values: list[float], uniform: float) -> None:
        logits = row(*values)
        assert np.exp(float(logits[draw(logits, uniform)]) - float(logits.max())) > 0


class TestLogprobs:
    def test_are_of_the_raw_distribution(self) -> None:
        chosen, top = logprobs(log_of(0.1, 0.6, 0.3), 0, 2)
        assert chosen == pytest.approx(math.log(0.1), abs=1e-6)
        assert [token_id for token_id, _ in top] == [1, 2]
        assert [logprob for _, logprob in top] == pytest.approx([math.log(0.6), math.log(0.3)], abs=1e-6)

    def test_none_asked_gives_the_chosen_alone(self) -> None:
        chosen, top = logprobs(row(0, 0), 1, 0)
        assert chosen == pytest.approx(math.log(0.5))
        assert top == ()

    def test_ties_come_by_lowest_id(self) -> None:
        assert [token_id for token_id, _ in logprobs(row(1, 2, 1, 2), 0, 3)[1]] == [1, 3, 0]

    @given(logit_rows)
    def test_never_exceed_zero(self, values: list[float]) -> None:
        logits = row(*values)
        _, top = logprobs(logits, 0, len(values))
        assert all(logprob <= 0 for _, logprob in top)
        assert sum(math.exp(logprob) for _, logprob in top) == pytest.approx(1.0)


class TestSampler:
    def test_temperature_zero_is_greedy_with_ties_to_the_lowest_id(self) -> None:
        assert Sampler(GREEDY, [1]).sample(row(1, 3, 3, 2)) == 1

    def test_same_seed_gives_same_tokens(self) -> None:
        params = replace(PLAIN, seed=7, temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
        rows = np.random.default_rng(1).standard_normal((50, 500)).astype(np.float32)
        first, second = Sampler(params, [1, 2]), Sampler(params, [1, 2])
        tokens = [first.sample(logits) for logits in rows]
        np.random.default_rng().random(10)  # numbers that others take
        assert [second.sample(logits) for logits in rows] == tokens
        other = Sampler(replace(params, seed=8), [1, 2])
        assert [other.sample(logits) for logits in rows] != tokens

    def test_without_seed_each_request_differs(self) -> None:
        logits = np.zeros(100_000, np.float32)
        assert len({Sampler(PLAIN, []).sample(logits) for _ in range(5)}) > 1

    def test_frequencies_follow_the_probabilities(self) -> None:
        sampler = Sampler(replace(PLAIN, seed=3), [])
        counts = np.bincount([sampler.sample(log_of(0.2, 0.5, 0.3)) for _ in range(4000)], minlength=3)
        assert np.abs(counts / 4000 - [0.2, 0.5, 0.3]).max() < 0.03

    def test_options_work_together_by_hand(self) -> None:
        # top-k leaves 1, 2, 3; temperature 0.5 squares 0.4, 0.3, 0.2 to shares 0.55, 0.31, 0.14; top-p 0.8 leaves 1, 2.
        params = replace(PLAIN, seed=5, top_k=3, temperature=0.5, top_p=0.8)
        sampler = Sampler(params, [])
        tokens = [sampler.sample(log_of(0.1, 0.4, 0.3, 0.2)) for _ in range(2000)]
        assert set(tokens) == {1, 2}
        assert tokens.count(1) / 2000 == pytest.approx(16 / 25, abs=0.04)

    def test_top_k_before_temperature_equals_after(self) -> None:
        logits = np.random.default_rng(2).standard_normal(200).astype(np.float32)
        before = apply_temperature(logits[top_k_places(logits, 20)], 0.7)
        scaled = apply_temperature(logits, 0.7)
        assert before.tolist() == scaled[top_k_places(scaled, 20)].tolist()

    def test_does_not_change_the_logits(self) -> None:
        logits = np.random.default_rng(4).standard_normal(50).astype(np.float32)
        kept = logits.copy()
        params = replace(PLAIN, top_k=5, top_p=0.9, min_p=0.1, temperature=0.5, repetition_penalty=1.3)
        Sampler(replace(params, presence_penalty=1.0, frequency_penalty=1.0), [1, 2, 3]).sample(logits)
        assert (logits == kept).all()

    @pytest.mark.parametrize("broken", [row(0, math.nan, 1), row(0, math.inf), row(-math.inf, -math.inf)])
    @pytest.mark.parametrize("params", [GREEDY, PLAIN, replace(PLAIN, top_k=1), replace(PLAIN, repetition_penalty=2.0)])
    def test_logits_that_are_not_finite_are_an_error(self, broken: NDArray[np.float32], params: SamplingParams) -> None:
        with pytest.raises(NonFiniteLogitsError, match="must be finite"):
            Sampler(params, [0]).sample(broken)

    @given(
        logit_rows,
        st.builds(
            SamplingParams,
            max_tokens=st.just(10),
            temperature=st.floats(0, 2),
            top_k=st.integers(0, 40),
            top_p=st.floats(0, 1, exclude_min=True),
            min_p=st.floats(0, 1),
            repetition_penalty=st.floats(0, 10, exclude_min=True),
            presence_penalty=st.floats(-2, 2),
            frequency_penalty=st.floats(-2, 2),
            seed=st.integers(0, 2**64 - 1),
        ),
    )
    def test_any_valid_options_choose_a_possible_token(self, values: list[float], params: SamplingParams) -> None:
        validate(params, 40)
        sampler = Sampler(params, [0, len(values) - 1])
        for _ in range(3):
            assert values[sampler.sample(row(*values))] > -math.inf


any_number: st.SearchStrategy[Any] = st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.booleans()
anything: st.SearchStrategy[Any] = st.one_of(
    any_number,
    st.sampled_from([math.nan, math.inf, -math.inf, -1, 0, 1, 2, 10, 2**31, 2**64, -(2**64), 10**5000, 5e-324, 1e308]),
    st.none(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.tuples(st.text(max_size=70)),
    st.just(np.float32("nan")),
)


def is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


ACCEPTED: dict[str, Callable[[object], bool]] = {
    "max_tokens": lambda value: is_integer(value, 1, 2**31 - 1),
    "temperature": lambda value: is_number(value, 0, 2),
    "top_k": lambda value: is_integer(value, 0, 1000),
    "top_p": lambda value: is_number(value, 0, 1) and value != 0,
    "min_p": lambda value: is_number(value, 0, 1),
    "repetition_penalty": lambda value: is_number(value, 0, 10) and value != 0,
    "presence_penalty": lambda value: is_number(value, -2, 2),
    "frequency_penalty": lambda value: is_number(value, -2, 2),
    "seed": lambda value: value is None or is_integer(value, 0, 2**64 - 1),
    "top_logprobs": lambda value: value is None or is_integer(value, 0, 20),
    "stop": lambda value: (
        isinstance(value, tuple) and len(value) <= 4 and all(isinstance(s, str) and 1 <= len(s) <= 64 for s in value)
    ),
}


class TestValidate:
    @settings(max_examples=12_000)
    @given(st.sampled_from(sorted(ACCEPTED)), anything)
    def test_each_field_takes_its_range_and_nothing_else(self, field: str, value: Any) -> None:
        changes: dict[str, Any] = {field: value}
        params = replace(PLAIN, **changes)
        if ACCEPTED[field](value):
            validate(params, 1000)
        else:
            with pytest.raises(InvalidRequestError) as caught:
                validate(params, 1000)
            assert caught.value.field.removesuffix("[0]") == f"sampling.{field}"
            assert len(str(caught.value)) < 200

    def test_message_has_value_and_limit(self) -> None:
        with pytest.raises(InvalidRequestError, match=r"^sampling.top_p: is 1.5; give over 0 to 1$"):
            validate(replace(PLAIN, top_p=1.5), 10)
        with pytest.raises(InvalidRequestError, match=r"^sampling.top_k: is 11; give 0 to 10$"):
            validate(replace(PLAIN, top_k=11), 10)

    def test_stop_strings_are_at_most_four_of_64_characters(self) -> None:
        validate(replace(PLAIN, stop=("é" * 64,) * 4), 10)
        with pytest.raises(InvalidRequestError, match=r"sampling.stop: has 5 strings; give at most 4"):
            validate(replace(PLAIN, stop=("a",) * 5), 10)
        with pytest.raises(InvalidRequestError, match=r"sampling.stop\[1\]: has 65 characters; give at most 64"):
            validate(replace(PLAIN, stop=("a", "b" * 65)), 10)
        with pytest.raises(InvalidRequestError, match=r"sampling.stop\[0\]: is empty"):
            validate(replace(PLAIN, stop=("",)), 10)

    def test_no_text_of_the_caller_in_the_message(self) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            validate(replace(PLAIN, stop=("secret" * 20,)), 10)
        assert "secret" not in str(caught.value)
