"""Drafts on the real default model: runs of them are steps, bit for bit, and answers are the same ones, sooner."""

from dataclasses import replace

import numpy as np
import pytest

from hearthd.bundles.bundle import Bundle
from hearthd.drafts.exactness import is_exact
from hearthd.drafts.run_costs import LENGTHS
from hearthd.generation.drafting import Drafting
from hearthd.generation.engine import Engine, Failed, Sequence
from hearthd.runtime.runner import OnnxRunner
from hearthd.sequences.sampling import SamplingParams
from hearthd.text.tokenizer import ChatTokenizer, Message

pytestmark = pytest.mark.model

NOTE = (
    "The boiler stands in the basement, is serviced every September by the company Lindner, telephone 0151 2345678, "
    "and was replaced in 2019. If the display shows E4, the pressure is too low."
)
GREEDY = SamplingParams(max_tokens=40, temperature=0.0)
OPTIONS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=0.7, top_p=0.9, seed=5),
    "penalised": replace(GREEDY, temperature=0.5, repetition_penalty=1.05, frequency_penalty=0.1, seed=6),
}


@pytest.fixture(scope="module")
def tokenizer(default_bundle: Bundle) -> ChatTokenizer:
    return ChatTokenizer.from_bundle(default_bundle)


@pytest.fixture(scope="module")
def runner(default_bundle: Bundle) -> OnnxRunner:
    runner = OnnxRunner.from_bundle(default_bundle, num_slots=2, context_length=512, num_threads=2)
    # A failure and no skip, as when there is no bundle.
    assert runner.can_verify, "the bundle was built by an older hearthd, and has no drafts: run `make bundle`"
    return runner


@pytest.fixture(scope="module")
def prompt_ids(tokenizer: ChatTokenizer) -> list[int]:
    return list(tokenizer.encode_chat([Message("user", f"Repeat this text word for word:\n\n{NOTE}")]))


def answered(runner: OnnxRunner, tokenizer: ChatTokenizer, sequence: Sequence, drafting: Drafting | None) -> Sequence:
    engine = Engine(runner, tokenizer, drafting=drafting)
    engine.add(sequence)
    while engine.num_running or engine.num_waiting:
        assert not any(isinstance(event, Failed) for _, event in engine.step())
    return sequence


@pytest.mark.parametrize("num_past", [5, 16, 63, 64, 80])
def test_a_run_of_a_draft_is_bit_for_bit_as_many_steps(
    runner: OnnxRunner, prompt_ids: list[int], num_past: int
) -> None:
    # What is drafted need not be likely.
    drafted = np.asarray(prompt_ids[: LENGTHS[-1]][::-1], np.int64)
    for slot in range(2):
        runner.forward(np.asarray([prompt_ids[:num_past]]), slot, np.zeros(1, np.int32))
    steps = [
        runner.forward(drafted[None, at : at + 1], 0, np.asarray([num_past + at], np.int32))[0].copy()
        for at in range(len(drafted))
    ]
    for length in LENGTHS:
        found = runner.verify(drafted[:length], 1, num_past)
        np.testing.assert_array_equal(found, np.stack(steps[:length]))
        end = num_past + length
        np.testing.assert_array_equal(runner.read_slot(1, end), runner.read_slot(0, end))


def test_this_processor_is_found_exact(runner: OnnxRunner, prompt_ids: list[int]) -> None:
    assert is_exact(runner, prompt_ids[:31])


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_an_answer_is_the_same_one_with_drafts(
    runner: OnnxRunner, tokenizer: ChatTokenizer, prompt_ids: list[int], option: str
) -> None:
    plain, drafted = (
        Sequence(
            request_id="", prompt_ids=tuple(prompt_ids), params=OPTIONS[option], cache_identity=option, arrived=0.0
        )
        for _ in range(2)
    )
    answered(runner, tokenizer, plain, None)
    answered(runner, tokenizer, drafted, Drafting(context_length=runner.context_length))
    assert drafted.output_ids == plain.output_ids
    assert drafted.num_accepted > 0


def test_what_a_draft_wrote_is_what_steps_write(
    runner: OnnxRunner, tokenizer: ChatTokenizer, prompt_ids: list[int]
) -> None:
    """All KV of an answer, not only what its tokens show of it."""
    kv = []
    for drafting in (None, Drafting(context_length=runner.context_length)):
        sequence = Sequence(request_id="", prompt_ids=tuple(prompt_ids), params=GREEDY, cache_identity="", arrived=0.0)
        answered(runner, tokenizer, sequence, drafting)
        kv.append(runner.read_slot(sequence.slot, len(prompt_ids) + len(sequence.output_ids) - 1))
    np.testing.assert_array_equal(kv[1], kv[0])
