"""Greedy answers of the real default model depend on their prompt alone: not on company, chunks or what is cached.

And the KV that a prompt leaves behind does not either, bit for bit: whatever is built on it later is the same then.
"""

from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import pytest
from numpy.typing import NDArray

from hearthd.bundles.bundle import Bundle
from hearthd.generation.engine import Engine, Failed, Sequence
from hearthd.runtime.runner import OnnxRunner
from hearthd.sequences.sampling import SamplingParams
from hearthd.text.tokenizer import ChatTokenizer, Message

pytestmark = pytest.mark.model

SLOTS, CONTEXT, MAX_TOKENS = 8, 512, 24
CHUNKS = (2, 16, 64, 100, 256)
TURNS = (
    ("What is the capital of France, and what is it known for?", "And what do people eat there?"),
    ("Name three things that one finds in a kitchen.", "Which of them is the most dangerous? " * 12),
    ("Turn the lights in the living room off. " * 16, "Now turn them on again, please."),
    ("Why is the sky blue?", "Explain it to a child of five, in two sentences."),
)


@dataclass(frozen=True)
class Turn:
    """A prompt, and what an engine gives that has neither company nor cache."""

    prompt_ids: tuple[int, ...]
    answer: list[int]
    kv: NDArray[np.float32]


@pytest.fixture(scope="module")
def tokenizer(default_bundle: Bundle) -> ChatTokenizer:
    return ChatTokenizer.from_bundle(default_bundle)


@pytest.fixture(scope="module")
def runner(default_bundle: Bundle) -> OnnxRunner:
    return OnnxRunner.from_bundle(default_bundle, num_slots=SLOTS, context_length=CONTEXT, num_threads=2)


def asked(prompt_ids: tuple[int, ...], identity: str = "") -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    return Sequence(request_id="", prompt_ids=prompt_ids, params=params, cache_identity=identity, arrived=0.0)


def run(engine: Engine, *sequences: Sequence) -> None:
    """Run sequences that begin together to their ends."""
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        assert not any(isinstance(event, Failed) for _, event in engine.step())


def cold(runner: OnnxRunner, tokenizer: ChatTokenizer, messages: list[Message]) -> Turn:
    sequence = asked(tuple(tokenizer.encode_chat(messages)))
    run(Engine(runner, tokenizer), sequence)
    return Turn(sequence.prompt_ids, sequence.output_ids, runner.read_slot(sequence.slot, len(sequence.prompt_ids)))


@pytest.fixture(scope="module")
def conversations(runner: OnnxRunner, tokenizer: ChatTokenizer) -> list[tuple[Turn, Turn]]:
    """First and second turns; the second prompts hold the first answers."""
    pairs = []
    for question, next_question in TURNS:
        first = cold(runner, tokenizer, [Message("user", question)])
        said = [token_id for token_id in first.answer if token_id not in tokenizer.eos_ids]
        text = b"".join(map(tokenizer.token_bytes, said))
        history = [Message("user", question), Message("assistant", text.decode()), Message("user", next_question)]
        second = cold(runner, tokenizer, history)
        # The answer stands there as it was given, not cut into other tokens: so a cache could hold it.
        assert second.prompt_ids[: len(first.prompt_ids) + 16] == (*first.prompt_ids, *first.answer[:16])
        pairs.append((first, second))
    return pairs


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_change_nothing(
    runner: OnnxRunner, tokenizer: ChatTokenizer, conversations: list[tuple[Turn, Turn]], chunk: int
) -> None:
    for turn in (turn for pair in conversations for turn in pair):
        sequence = asked(turn.prompt_ids)
        run(Engine(runner, tokenizer, prefill_chunk=chunk), sequence)
        assert sequence.output_ids == turn.answer
        np.testing.assert_array_equal(runner.read_slot(sequence.slot, len(turn.prompt_ids)), turn.kv)


@pytest.mark.parametrize("num_together", [2, 4, 8])
def test_company_changes_nothing(
    runner: OnnxRunner, tokenizer: ChatTokenizer, conversations: list[tuple[Turn, Turn]], num_together: int
) -> None:
    turns = [turn for pair in conversations for turn in pair]
    for start in range(0, len(turns), num_together):
        batch = list(islice(cycle(turns), start, start + num_together))
        sequences = [asked(turn.prompt_ids, str(number)) for number, turn in enumerate(batch)]
        run(Engine(runner, tokenizer), *sequences)
        for turn, sequence in zip(batch, sequences, strict=True):
            assert sequence.output_ids == turn.answer


@pytest.mark.parametrize("chunk", [16, 64])
def test_a_cache_changes_nothing(
    runner: OnnxRunner, tokenizer: ChatTokenizer, conversations: list[tuple[Turn, Turn]], chunk: int
) -> None:
    """The same prompt again; then the next turn, which holds the answer; then the first one over the second's KV."""
    for first, second in conversations:
        engine = Engine(runner, tokenizer, prefill_chunk=chunk)
        for turn in (first, first, second, second, first):
            sequence = asked(turn.prompt_ids)
            run(engine, sequence)
            assert sequence.output_ids == turn.answer
            np.testing.assert_array_equal(runner.read_slot(sequence.slot, len(turn.prompt_ids)), turn.kv)
        assert sequence.num_cached > 0


def test_a_cache_shared_with_company_changes_nothing(
    runner: OnnxRunner, tokenizer: ChatTokenizer, conversations: list[tuple[Turn, Turn]]
) -> None:
    """Second turns that begin while first turns of the same conversations still decode, in every slot."""
    engine = Engine(runner, tokenizer)
    firsts = [asked(first.prompt_ids) for first, _ in conversations]
    for sequence in firsts:
        engine.add(sequence)
    # However small the chunks are that a busy machine gets: until all prompts are read.
    while not all(sequence.output_ids for sequence in firsts):
        engine.step()
    seconds = [asked(second.prompt_ids) for _, second in conversations]
    run(engine, *seconds)
    for (first, second), begun, followed in zip(conversations, firsts, seconds, strict=True):
        assert (begun.output_ids, followed.output_ids) == (first.answer, second.answer)
        assert followed.num_cached >= len(first.prompt_ids)
