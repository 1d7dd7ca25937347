"""Answers of the real default model depend on no schedule: who came when, who was paused, who left, what was cached.

Mixes are drawn from a seed; each answer is compared, token by token, with that of an engine that has no company and no
cache. Half of them are greedy, half are sampled with a seed. Once there is memory enough, once so little that answers
have to give theirs up. The same over a model of hashes, hundreds of times: `test_engine.py`, `test_scheduling.py`.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest

from hearthd.bundles.bundle import Bundle
from hearthd.generation.drafting import Drafting
from hearthd.generation.engine import Engine, Failed, RunTerminated, Sequence
from hearthd.priority import Priority
from hearthd.runtime.runner import OnnxRunner
from hearthd.sequences.sampling import SamplingParams
from hearthd.sequences.sequence import SequenceState
from hearthd.text.tokenizer import ChatTokenizer, Message

pytestmark = pytest.mark.model

SLOTS, PLACES, CONTEXT = 2, 6, 384
HOUSE = "You are the voice of a house. There is a kitchen with two lamps, a bath with one, and a cellar with none. " * 2
# One context of 6 blocks while its prompt is read, which takes five times as much then.
LITTLE_KV_BYTES = 30 * 64 * 11_520
QUESTIONS = (
    "Which rooms have a lamp?",
    "Turn the lights in the kitchen off. " * 8,
    "Repeat after me: one two three four five six seven, one two three four five six seven, one two",
    "Why is the sky blue?",
)
TALES = ("Tell me a tale of a fox and a hen. Say each sentence twice.", "Write a story about a lighthouse.")


@dataclass(frozen=True)
class Asked:
    """A request, and what it gives alone."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    answer: list[int]


def sequence_of(prompt_ids: tuple[int, ...], params: SamplingParams, priority: Priority, account: str) -> Sequence:
    return Sequence(
        request_id="",
        prompt_ids=prompt_ids,
        params=params,
        cache_identity="house",
        arrived=0.0,
        priority=priority,
        account=account,
    )


@pytest.fixture(scope="module")
def runner(default_bundle: Bundle) -> OnnxRunner:
    return OnnxRunner.from_bundle(default_bundle, num_slots=PLACES, context_length=CONTEXT, num_threads=2)


@pytest.fixture(scope="module")
def tokenizer(default_bundle: Bundle) -> ChatTokenizer:
    return ChatTokenizer.from_bundle(default_bundle)


@pytest.fixture(scope="module")
def little_runner(default_bundle: Bundle) -> OnnxRunner:
    runner = OnnxRunner.from_bundle(
        default_bundle, num_slots=PLACES, context_length=CONTEXT, num_threads=2, kv_bytes=LITTLE_KV_BYTES
    )
    assert runner.context_length == CONTEXT
    return runner


def ask_alone(runner: OnnxRunner, tokenizer: ChatTokenizer, messages: list[Message], params: SamplingParams) -> Asked:
    prompt_ids = tuple(tokenizer.encode_chat(messages))
    alone = sequence_of(prompt_ids, params, Priority.NORMAL, "alone")
    engine = Engine(runner, tokenizer, prefill_chunk=256)
    engine.add(alone)
    while alone.state is not SequenceState.ENDED:
        engine.step()
    return Asked(prompt_ids, params, alone.output_ids)


@pytest.fixture(scope="module")
def requests(runner: OnnxRunner, tokenizer: ChatTokenizer) -> list[Asked]:
    greedy = SamplingParams(temperature=0.0, max_tokens=20)
    sampled = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=7, max_tokens=20)
    requests = [
        ask_alone(runner, tokenizer, [Message("system", HOUSE), Message("user", question)], params)
        for number, question in enumerate(QUESTIONS)
        for params in (greedy, replace(sampled, seed=number))
    ]
    assert len({tuple(each.answer) for each in requests}) > len(QUESTIONS)
    return requests


@pytest.mark.parametrize("seed", range(3))
def test_no_schedule_changes_an_answer(
    runner: OnnxRunner, tokenizer: ChatTokenizer, requests: list[Asked], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    drafting = Drafting(context_length=CONTEXT) if runner.can_verify else None
    engine = Engine(
        runner,
        tokenizer,
        num_slots=SLOTS,
        prefill_chunk=chance.choice((16, 48, 64)),
        solo_prefill_chunk=128,
        drafting=drafting,
    )
    forward, terminated = runner.forward, 0

    def stopped_sometimes(*arguments: object) -> object:
        nonlocal terminated
        if chance.random() < 0.05:
            terminated += 1
            raise RunTerminated
        return forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "forward", stopped_sometimes)
    running: dict[Sequence, Asked] = {}
    left: dict[Sequence, Asked] = {}
    seen: Counter[SequenceState] = Counter()
    to_come = 12
    for _ in range(2000):
        if to_come and chance.random() < 0.25:
            asked = chance.choice(requests)
            sequence = sequence_of(asked.prompt_ids, asked.params, chance.choice(list(Priority)), chance.choice("ab"))
            engine.add(sequence)
            running[sequence] = asked
            to_come -= 1
        if running and chance.random() < 0.02:
            sequence = chance.choice(list(running))
            left[sequence] = running.pop(sequence)
            engine.remove(sequence)
        assert not any(isinstance(event, Failed) for _, event in engine.step())
        seen.update(sequence.state for sequence in running)
        if not to_come and not engine.has_work:
            break
    assert not engine.has_work, "somebody waits for ever"
    assert (engine.num_running, engine.num_paused, engine.num_waiting) == (0, 0, 0)
    for sequence, asked in running.items():
        assert sequence.output_ids == asked.answer
    for sequence, asked in left.items():
        assert sequence.output_ids == asked.answer[: len(sequence.output_ids)]
    assert seen[SequenceState.PAUSED], "nobody was paused"
    assert seen[SequenceState.WAITING], "nobody waited"
    assert any(sequence.num_cached for sequence in running), "nothing was cached"


@pytest.fixture(scope="module")
def tales(runner: OnnxRunner, tokenizer: ChatTokenizer) -> list[Asked]:
    """Short prompts with long answers."""
    greedy = SamplingParams(temperature=0.0, max_tokens=48)
    sampled = SamplingParams(temperature=0.8, repetition_penalty=1.1, seed=3, max_tokens=48)
    return [
        ask_alone(runner, tokenizer, [Message("user", tale)], params) for tale in TALES for params in (greedy, sampled)
    ]


@pytest.fixture(scope="module")
def calls(runner: OnnxRunner, tokenizer: ChatTokenizer) -> list[Asked]:
    """Prompts that need most of the little memory, with short answers."""
    params = SamplingParams(temperature=0.0, max_tokens=4)
    texts = [f"{number} little ducks went out one day. " * 33 for number in range(2)]
    return [ask_alone(runner, tokenizer, [Message("user", text)], params) for text in texts]


@pytest.mark.parametrize("has_drafts", [False, True])
def test_no_schedule_changes_an_answer_where_memory_is_short(
    little_runner: OnnxRunner, tokenizer: ChatTokenizer, tales: list[Asked], calls: list[Asked], *, has_drafts: bool
) -> None:
    """Answers give their KV up at moments that are drawn from a seed, some of them twice, and are run again."""
    chance = random.Random(has_drafts)
    drafting = Drafting(context_length=CONTEXT) if has_drafts and little_runner.can_verify else None
    engine = Engine(little_runner, tokenizer, num_slots=SLOTS, prefill_chunk=64, drafting=drafting)
    asked_of: dict[Sequence, Asked] = {}
    behind: set[Sequence] = set()
    num_given: Counter[Sequence] = Counter()
    left: set[Sequence] = set()

    def step() -> None:
        assert not any(isinstance(event, Failed) for _, event in engine.step())
        now = {each for each in asked_of if each.is_behind and each not in left}
        num_given.update(now - behind)
        behind.clear()
        behind.update(now)

    for number in range(12):
        # Who is urgent is done soon, so that others get to write.
        is_call = number % 3 == 2
        asked = chance.choice(calls if is_call else tales)
        priority = Priority.INTERACTIVE if is_call else chance.choice((Priority.NORMAL, Priority.BACKGROUND))
        sequence = sequence_of(asked.prompt_ids, asked.params, priority, chance.choice("ab"))
        engine.add(sequence)
        asked_of[sequence] = asked
        for _ in range(chance.randint(4, 24)):
            step()
        if number == 7:
            leaver = next(each for each in asked_of if each.state is not SequenceState.ENDED)
            left.add(leaver)
            engine.remove(leaver)
    for _ in range(2000):
        if not engine.has_work:
            break
        step()
    assert not engine.has_work, "somebody waits for ever"
    for sequence, asked in asked_of.items():
        answer = asked.answer[: len(sequence.output_ids)] if sequence in left else asked.answer
        assert sequence.output_ids == answer
    assert num_given.total() >= 3, "hardly anybody gave memory up"
