"""An answer of the real default model that gave its memory to a more urgent request is the answer it would have been.

Its prompt is read again and its tokens are run again: the bits of its KV are those of before, with and without drafts.
"""

import random

import pytest

from hearthd.bundles.bundle import Bundle
from hearthd.generation.drafting import Drafting
from hearthd.generation.engine import Engine, Sequence
from hearthd.priority import Priority
from hearthd.runtime.runner import OnnxRunner
from hearthd.sequences.sampling import SamplingParams
from hearthd.sequences.sequence import SequenceState
from hearthd.text.tokenizer import ChatTokenizer, Message

pytestmark = pytest.mark.model

CONTEXT = 384
# A context of 6 blocks, and four times that while its prompt is read.
KV_BYTES = 30 * 64 * 11_520
MAX_TOKENS = 40
TALE = "Tell me a tale of a fox and a hen. Say each sentence twice."
STORY = "Write a long story about a lighthouse and those who live in it."


@pytest.fixture(scope="module")
def runner(default_bundle: Bundle) -> OnnxRunner:
    runner = OnnxRunner.from_bundle(
        default_bundle, num_slots=6, context_length=CONTEXT, num_threads=2, kv_bytes=KV_BYTES
    )
    assert runner.context_length == CONTEXT
    return runner


@pytest.fixture(scope="module")
def tokenizer(default_bundle: Bundle) -> ChatTokenizer:
    return ChatTokenizer.from_bundle(default_bundle)


def asked(
    tokenizer: ChatTokenizer, text: str, max_tokens: int, priority: Priority = Priority.NORMAL, temperature: float = 0.0
) -> Sequence:
    return Sequence(
        request_id="",
        prompt_ids=tuple(tokenizer.encode_chat([Message("user", text)])),
        params=SamplingParams(temperature=temperature, seed=5, max_tokens=max_tokens),
        cache_identity="house",
        arrived=0.0,
        priority=priority,
        account="somebody",
    )


def finish(engine: Engine, sequence: Sequence) -> None:
    while sequence.state is not SequenceState.ENDED:
        engine.step()


@pytest.mark.parametrize("has_drafts", [False, True])
def test_an_answer_that_gave_its_memory_goes_on_as_if_it_had_not(
    runner: OnnxRunner, tokenizer: ChatTokenizer, *, has_drafts: bool
) -> None:
    """The urgent requests need room at moments that are drawn from a seed."""
    told = [(TALE, 0.0), (STORY, 0.8)]
    alone = []
    for text, temperature in told:
        sequence = asked(tokenizer, text, MAX_TOKENS, temperature=temperature)
        undisturbed = Engine(runner, tokenizer, prefill_chunk=64)
        undisturbed.add(sequence)
        finish(undisturbed, sequence)
        alone.append(sequence.output_ids)
    assert list(map(len, alone)) == [MAX_TOKENS, MAX_TOKENS]
    drafting = Drafting(context_length=CONTEXT) if has_drafts and runner.can_verify else None
    engine = Engine(runner, tokenizer, num_slots=2, prefill_chunk=64, drafting=drafting)
    writing = [asked(tokenizer, text, MAX_TOKENS, temperature=temperature) for text, temperature in told]
    for sequence in writing:
        engine.add(sequence)
    chance = random.Random(3)
    num_given = num_compared = 0
    for number in range(2):
        for _ in range(chance.randint(6, 14)):
            engine.step()
        held = [each for each in writing if each.state in (SequenceState.DECODING, SequenceState.PAUSED)]
        kv = {each: read(runner, engine, each) for each in held if not each.is_behind}
        urgent = asked(tokenizer, f"{number} little ducks went out one day. " * 36, 4, Priority.INTERACTIVE)
        assert len(urgent.prompt_ids) > 320
        engine.add(urgent)
        engine.step()
        given = [each for each in writing if each.is_behind]
        num_given += len(given)
        finish(engine, urgent)
        for sequence in given:
            while sequence.is_behind:
                engine.step()
            if sequence in kv:
                num_tokens, before = kv[sequence]
                assert runner.read_kv(sequence.slot, 0, num_tokens) == before
                num_compared += 1
    for sequence in writing:
        finish(engine, sequence)
    assert [each.output_ids for each in writing] == alone
    assert num_given == 4
    assert num_compared >= 3


def read(runner: OnnxRunner, engine: Engine, sequence: Sequence) -> tuple[int, bytes]:
    """Return how many positions a sequence's slot has, and a copy of their KV."""
    num_tokens = engine._cache.num_tokens(sequence.slot)
    return num_tokens, runner.read_kv(sequence.slot, 0, num_tokens)
