"""The real model over a restart: KV from the disk is bit for bit what a prefill writes, and so is the answer."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hearthd.bundles.bundle import Bundle
from hearthd.configuration.config import CacheConfig, Config, EngineConfig, ModelConfig
from hearthd.generation.engine import Failed, Sequence
from hearthd.inference.model import Model, load_model
from hearthd.runtime.runner import OnnxRunner
from hearthd.sequences.sampling import SamplingParams
from hearthd.text.chat_template import Message

pytestmark = pytest.mark.model

SYSTEM = Message("system", "The house has a kitchen with two lamps, a bedroom, and a garden with a pump. " * 8)
QUESTIONS = ("Which lamps are there?", "Where is the pump?")


def start(bundle: Bundle, directory: Path | None, shared: tuple[str, ...] = (), *, context_length: int = 512) -> Model:
    config = Config(
        model=ModelConfig(directory=bundle.path.parent, name=bundle.path.name),
        engine=EngineConfig(slots=1, context_length=context_length, threads=2, drafts=False),
        cache=CacheConfig(directory=directory, min_tokens=64, shared_prompts=shared),
    )
    return load_model(bundle, config)


def ask(model: Model, question: str, identity: str = "a", system: Message = SYSTEM) -> Sequence:
    messages = [system, Message("user", question)]
    prompt_ids = tuple(model.tokenizer.encode_chat(messages))
    sequence = Sequence(
        request_id="",
        prompt_ids=prompt_ids,
        num_first=model.tokenizer.count_beginning(messages, prompt_ids),
        params=SamplingParams(temperature=0.0, max_tokens=12),
        cache_identity=identity,
        arrived=time.monotonic(),
    )
    model.engine.add(sequence)
    use_idle_time(model)
    return sequence


def use_idle_time(model: Model) -> None:
    """Let the engine do all that it has to do, and the disk too."""
    moved = threading.Event()
    stored = model.engine.stored
    if stored is not None:
        stored.on_room = moved.set
    while True:
        moved.clear()
        while model.engine.has_work:
            assert not any(isinstance(event, Failed) for _, event in model.engine.step())
        if stored is None or stored._outgoing is None:
            return
        assert moved.wait(30)


def kv(model: Model, sequence: Sequence) -> np.ndarray:
    assert isinstance(model.runner, OnnxRunner)
    return model.runner.read_slot(sequence.slot, len(sequence.prompt_ids))


def test_with_and_without_the_disk_answers_and_kv_are_the_same(default_bundle: Bundle, tmp_path: Path) -> None:
    plain = start(default_bundle, None)
    expected = [(sequence := ask(plain, question, question), kv(plain, sequence)) for question in QUESTIONS]
    assert all(sequence.num_cached == 0 for sequence, _ in expected)

    first = start(default_bundle, tmp_path)
    assert first.engine.stored is not None
    ask(first, QUESTIONS[0])
    assert first.engine.stored.store.num_saved == 0
    ask(first, QUESTIONS[1])
    assert first.engine.stored.store.num_saved == 1

    again = start(default_bundle, tmp_path)
    assert again.engine.stored is not None
    for (cold, cold_kv), question in zip(expected, QUESTIONS, strict=True):
        sequence = ask(again, question)
        assert sequence.num_cached >= sequence.num_first > 100
        assert sequence.output_ids == cold.output_ids
        np.testing.assert_array_equal(kv(again, sequence), cold_kv)
    # The second one found it in memory.
    assert again.engine.stored.store.num_hits == 1


def test_a_shared_prompt_is_there_for_everybody_before_anybody_asks(default_bundle: Bundle, tmp_path: Path) -> None:
    prompt = tmp_path / "house.txt"
    prompt.write_text(SYSTEM.content)
    system = Message("system", SYSTEM.content.strip())
    for num_hits in (0, 1):
        model = start(default_bundle, tmp_path / "prefixes", (str(prompt),))
        use_idle_time(model)
        messages = [system, Message("user", QUESTIONS[0])]
        prompt_ids = tuple(model.tokenizer.encode_chat(messages))
        for identity in ("a", "b"):
            sequence = Sequence(
                request_id="",
                prompt_ids=prompt_ids,
                params=SamplingParams(temperature=0.0, max_tokens=2),
                cache_identity=identity,
                arrived=time.monotonic(),
            )
            model.engine.add(sequence)
            use_idle_time(model)
            assert sequence.num_cached >= model.tokenizer.count_beginning(messages, prompt_ids) > 100
        assert model.engine.stored is not None
        assert model.engine.stored.store.num_hits == num_hits


def test_a_house_of_3000_tokens_is_not_read_again_after_a_restart(default_bundle: Bundle, tmp_path: Path) -> None:
    rooms = (f"Room {number} has {number % 5 + 1} lamps, a heater and a window to the garden." for number in range(170))
    house = Message("system", "You are the voice of this house. " + " ".join(rooms))
    before = start(default_bundle, tmp_path, context_length=4096)
    cold = ask(before, QUESTIONS[0], system=house)
    assert cold.num_cached == 0
    cold_kv = kv(before, cold)
    # Now it has been seen again.
    ask(before, QUESTIONS[1], system=house)
    assert before.engine.stored is not None
    assert before.engine.stored.store.num_saved == 1

    after = start(default_bundle, tmp_path, context_length=4096)
    first = ask(after, QUESTIONS[0], system=house)
    assert after.engine.stored is not None
    assert after.engine.stored.store.num_hits == 1
    assert first.num_cached >= first.num_first > 3000
    assert len(first.prompt_ids) - first.num_cached < 40
    assert first.output_ids == cold.output_ids
    np.testing.assert_array_equal(kv(after, first), cold_kv)
