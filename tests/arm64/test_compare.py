"""The comparison of two greedy answers: what passes as rounding and what does not. Emulation itself: `make arm64`."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from compare import MAX_KL, Answer, compare, mean_kl, table
from rig import RASPBERRY_PI_4, RASPBERRY_PI_5

REFERENCE = Answer(
    prompt_ids=[1, 2, 3],
    token_ids=[10, 11, 12],
    leads=[2.0, 0.01, 3.0],
    text="a b c",
    reason="length",
    load_seconds=1.0,
    prefill_seconds=0.5,
    decode_seconds=0.2,
    completion_tokens=3,
    num_other_bits=0,
)


def test_an_equal_answer_is_accepted() -> None:
    found = compare(REFERENCE, REFERENCE, 0.01)
    assert (found.num_same_tokens, found.kl_mean, found.finding, found.is_accepted) == (3, 0.01, "same", True)


def test_two_nearly_equal_logits_may_change_places() -> None:
    found = compare(REFERENCE, replace(REFERENCE, token_ids=[10, 99, 98], leads=[2.0, 0.02, 5.0], text="a x y"), 0.01)
    assert found.num_same_tokens == 1
    assert found.is_accepted
    assert found.finding == "token 1 is 99, here 11 with a lead of 0.0100"


@pytest.mark.parametrize(
    ("changed", "kl_mean"),
    [
        ({"prompt_ids": [1, 2, 4]}, 0.0),
        ({"num_other_bits": 1}, 0.0),
        ({"token_ids": [99, 11, 12], "text": "x b c"}, 0.0),
        ({"token_ids": [10, 11], "text": "a b"}, 0.0),
        ({"text": "a b"}, 0.0),
        ({"reason": "end_of_turn"}, 0.0),
        ({}, MAX_KL * 1.01),
        ({}, float("nan")),
    ],
    ids=["prompt", "other bits", "sure token", "shorter", "text", "end", "far", "no number"],
)
def test_any_other_difference_is_refused(changed: dict[str, Any], kl_mean: float) -> None:
    assert not compare(REFERENCE, replace(REFERENCE, **changed), kl_mean).is_accepted


def test_the_divergence_is_the_mean_over_tokens() -> None:
    ours = np.log(np.array([[0.5, 0.5], [0.5, 0.5]], np.float32))
    theirs = np.log(np.array([[2.0, 2.0], [0.25, 0.75]], np.float32))  # logits: the first row is the same at any height
    # The second row alone: 0.5 ln 2 + 0.5 ln (2/3) = 0.14384.
    assert mean_kl(ours, theirs) == pytest.approx(0.14384 / 2, abs=1e-5)


def test_the_table_names_every_processor() -> None:
    lines = table([("here", REFERENCE, None), ("board", REFERENCE, compare(REFERENCE, REFERENCE, 0.0))]).splitlines()
    assert len(lines) == 3
    assert (lines[1].split()[0], lines[1].split()[-1]) == ("here", "reference")
    assert (lines[2].split()[0], lines[2].split()[-1]) == ("board", "same")
    assert "0.1000" in lines[1]  # decode seconds over the tokens after the first


def test_a_board_describes_four_cores_and_only_the_newer_one_has_a_dot_product() -> None:
    assert RASPBERRY_PI_4.cpuinfo().count("processor") == RASPBERRY_PI_5.cpuinfo().count("processor") == 4
    assert "asimddp" not in RASPBERRY_PI_4.cpuinfo()
    assert "asimddp" in RASPBERRY_PI_5.cpuinfo()
