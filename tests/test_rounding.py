"""Rounding of weights: by hand, against the method's definition, and on inputs that it has not seen."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from hearthd.build.decoder.rounding import ErrorFeedback, Nearest


def correlated_inputs(num_tokens: int, num_features: int, seed: int) -> NDArray[np.float32]:
    """Inputs of which each is a mixture of a few hidden ones, as behind a norm of a decoder."""
    hidden = np.random.default_rng(seed).standard_normal((num_tokens, num_features // 4))
    mixture = np.random.default_rng(99).standard_normal((num_features // 4, num_features))
    noise = np.random.default_rng(seed + 1).standard_normal((num_tokens, num_features))
    return np.asarray(hidden @ mixture + 0.1 * noise, np.float32)


def feedback(directory: Path, inputs: NDArray[np.float32], name: str = "layers.0.qkv") -> ErrorFeedback:
    np.save(directory / f"{name}.npy", inputs.T @ inputs / np.float32(len(inputs)))
    return ErrorFeedback(directory)


def test_nearest_by_hand() -> None:
    integers, scales = Nearest().rounded("o", np.asarray([[1.0, 0.0], [-0.5, 0.0], [0.252, 0.0]], np.float32))
    assert scales[0] == pytest.approx(1 / 127)
    assert scales[1] > 0, "a column of zeros must not divide by zero"
    assert integers.tolist() == [[127, 0], [-64, 0], [32, 0]]


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(np.float32, (5, 3), elements=st.floats(-1e6, 1e6, width=32)))
def test_nearest_is_within_half_a_step(weight: NDArray[np.float32]) -> None:
    integers, scales = Nearest().rounded("o", weight)
    assert np.all(np.abs(integers.astype(int)) <= 127)
    assert np.all(np.abs(integers * scales - weight) <= 0.5001 * scales)


def test_feedback_loses_far_less_on_inputs_that_it_has_not_seen(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    rounding = feedback(tmp_path, correlated_inputs(2_000, 200, seed=1))
    held = correlated_inputs(500, 200, seed=50)

    def loss(integers: NDArray[np.int8], scales: NDArray[np.float32]) -> float:
        return float(np.square(held @ (integers * scales - weight)).mean())

    assert loss(*rounding.rounded("layers.0.qkv", weight)) < 0.3 * loss(*Nearest().rounded("o", weight))


def test_feedback_is_what_the_method_says(tmp_path: Path) -> None:
    """Frantar et al. 2022, equation 2, with the inverse computed anew for the features that are left at each step."""
    num_features = 150
    inputs = correlated_inputs(600, num_features, seed=1)
    weight = np.random.default_rng(0).standard_normal((num_features, 7)).astype(np.float32)
    integers, scales = feedback(tmp_path, inputs).rounded("layers.0.qkv", weight)

    moments = inputs.T.astype(np.float64) @ inputs / len(inputs)
    moments += 0.01 * np.diag(moments).mean() * np.eye(num_features)
    steps = (weight / scales).astype(np.float64)
    expected = np.empty((num_features, 7))
    left = list(np.argsort(-np.diag(moments), kind="stable"))
    while left:
        inverse = np.linalg.inv(moments[np.ix_(left, left)])
        first = left[0]
        expected[first] = np.clip(np.rint(steps[first]), -127, 127)
        steps[left] -= np.outer(inverse[:, 0] / inverse[0, 0], steps[first] - expected[first])
        left = left[1:]
    # A value half way between two steps may fall to either side in float32, and moves those after it.
    assert np.mean(integers == expected) > 0.98
    assert np.max(np.abs(integers - expected)) <= 1


def test_without_correlation_it_is_the_nearest(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.eye(16, dtype=np.float32))
    weight = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)
    found, expected = ErrorFeedback(tmp_path).rounded("o", weight), Nearest().rounded("o", weight)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("dead", [range(8), range(3, 5)])
def test_features_that_never_occurred_are_rounded_too(tmp_path: Path, dead: range) -> None:
    inputs = np.random.default_rng(1).standard_normal((50, 8)).astype(np.float32)
    inputs[:, list(dead)] = 0
    weight = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    integers, scales = feedback(tmp_path, inputs).rounded("layers.0.qkv", weight)
    # What is left of an error may add up to some steps, but nothing may run away.
    assert np.max(np.abs(integers * scales - weight)) < 10 * scales.max()


def test_what_has_no_moments_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    np.testing.assert_array_equal(ErrorFeedback(tmp_path).rounded("o", weight)[0], Nearest().rounded("o", weight)[0])


def test_the_same_weights_are_rounded_once(tmp_path: Path) -> None:
    rounding = feedback(tmp_path, correlated_inputs(100, 16, seed=1))
    weight = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)
    first = rounding.rounded("layers.0.qkv", weight)[0]
    (tmp_path / "layers.0.qkv.npy").unlink()
    np.testing.assert_array_equal(ErrorFeedback(tmp_path).rounded("layers.0.qkv", weight)[0], first)
