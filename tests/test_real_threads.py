"""The number of threads changes no bit of what the real model computes, also in the middle of an answer."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from hearthd.bundles.bundle import Bundle
from hearthd.runtime.runner import OnnxRunner

pytestmark = pytest.mark.model

PROMPT = np.random.default_rng(7).integers(100, 40_000, 101)
# Two chunks, and a last one of an odd size.
CUTS = (0, 48, 96, 101)


def run(runner: OnnxRunner, changes: dict[int, int]) -> tuple[list[NDArray[np.float32]], NDArray[np.int8]]:
    """Read the prompt and write five tokens. changes: run to number of threads before it. Returns logits and KV."""
    found = []
    runs = [(PROMPT[start:end], start) for start, end in itertools.pairwise(CUTS)]
    runs += [(np.array([500 + step]), len(PROMPT) + step) for step in range(5)]
    for number, (tokens, past) in enumerate(runs):
        if number in changes:
            runner.change_threads(changes[number])
        found.append(runner.forward(tokens[None].astype(np.int64), 0, np.array([past], np.int32)).copy())
    return found, runner.read_slot(0, len(PROMPT) + 5)


def test_threads_may_change_between_any_two_runs(default_bundle: Bundle) -> None:
    runner = OnnxRunner.from_bundle(default_bundle, num_slots=1, context_length=256, num_threads=2)
    logits, kv = run(runner, {})
    assert np.abs(logits[-1]).max() > 0
    # In the middle of the prompt, before the first token, in the middle of the answer; more than the machine has, too.
    changed, changed_kv = run(runner, {1: 1, 3: 3, 5: 1, 7: 2})
    assert runner.num_threads == 2
    for number, (before, after) in enumerate(zip(logits, changed, strict=True)):
        assert np.array_equal(before, after), f"run {number}"
    assert np.array_equal(kv, changed_kv)
