"""The comparison of two greedy answers: what passes as rounding and what does not. Emulation itself: `make arm64`."""

from dataclasses import replace
from typing import Any

import pytest
from compare import MAX_NOISE, Answer, compare, table
from rig import RASPBERRY_PI_4, RASPBERRY_PI_5

REFERENCE = Answer(
    prompt_ids=[1, 2, 3],
    token_ids=[10, 11, 12],
    gaps=[2.0, 0.01, 3.0],
    logprobs=[-0.5, -1.0, -0.25],
    text="a b c",
    reason="length",
    load_seconds=1.0,
    prefill_seconds=0.5,
    decode_seconds=0.2,
    completion_tokens=3,
)


def test_an_equal_answer_is_accepted() -> None:
    found = compare(REFERENCE, replace(REFERENCE, logprobs=[-0.5, -1.125, -0.25]))
    assert (found.num_same_tokens, found.noise, found.is_accepted) == (3, 0.125, True)


def test_two_nearly_equal_logits_may_change_places() -> None:
    found = compare(REFERENCE, replace(REFERENCE, token_ids=[10, 99, 98], gaps=[2.0, 0.02, 5.0], text="a x y"))
    assert found.num_same_tokens == 1
    assert found.is_accepted
    assert "token 1 is 99, here 11; leads 0.0200 and 0.0100" in found.finding


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt_ids": [1, 2, 4]},
        {"token_ids": [99, 11, 12], "text": "x b c"},
        {"token_ids": [10, 99, 12], "gaps": [2.0, MAX_NOISE + 0.1, 3.0]},
        {"token_ids": [10, 11], "logprobs": [-0.5, -1.0], "gaps": [2.0, 0.01], "text": "a b"},
        {"text": "a b"},
        {"reason": "end_of_turn"},
        {"logprobs": [-0.5, -1.0 - MAX_NOISE - 0.1, -0.25]},
    ],
    ids=["prompt", "sure token", "sure there", "shorter", "text", "end", "noise"],
)
def test_any_other_difference_is_refused(changed: dict[str, Any]) -> None:
    assert not compare(REFERENCE, replace(REFERENCE, **changed)).is_accepted


def test_the_table_names_every_processor() -> None:
    lines = table([("here", REFERENCE, None), ("board", REFERENCE, compare(REFERENCE, REFERENCE))]).splitlines()
    assert len(lines) == 3
    assert (lines[1].split()[0], lines[1].split()[-1]) == ("here", "reference")
    assert (lines[2].split()[0], lines[2].split()[-1]) == ("board", "same")
    assert "0.1000" in lines[1]  # decode seconds over the tokens after the first


def test_a_board_describes_four_cores_and_only_the_newer_one_has_a_dot_product() -> None:
    assert RASPBERRY_PI_4.cpuinfo().count("processor") == RASPBERRY_PI_5.cpuinfo().count("processor") == 4
    assert "asimddp" not in RASPBERRY_PI_4.cpuinfo()
    assert "asimddp" in RASPBERRY_PI_5.cpuinfo()
