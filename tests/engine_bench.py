"""An engine on a runner without a model, with a clock that a test moves, and all that has come of it."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Any

import tiny_tokenizers as tiny
from fakes import FakeRunner, Logits, expected_tokens, hashed_logits, scripted
from hearthd.generation.drafting import Drafting
from hearthd.generation.engine import Delta, Engine, Event, Failed, Finished, Queued, Sequence, TokenLogprob
from hearthd.kv.stored_prefixes import StoredPrefixes
from hearthd.priority import Priority
from hearthd.sequences.sampling import SamplingParams

__all__ = ["END", "GREEDY", "NO_EOS", "TOKENIZER", "VOCAB", "Bench", "Clock", "decoded", "solo", "spelling"]

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
TOKENIZER = tiny.chat_tokenizer("byte_per_token")
VOCAB = 262
END = 257
NO_EOS = frozenset({END})


class Clock:
    """Time that moves only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """An engine, its parts, and every event so far."""

    runner: FakeRunner = field(default_factory=FakeRunner)
    num_slots: int | None = None
    prefill_chunk: int = 8
    solo_prefill_chunk: int | None = None
    max_stall_seconds: float = 0.1
    max_answer_seconds: float = 600.0
    drafting: Drafting | None = None
    stored: StoredPrefixes | None = None
    clock: Clock = field(default_factory=Clock)
    events: list[tuple[Sequence, Event]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = Engine(
            self.runner,
            TOKENIZER,
            num_slots=self.num_slots,
            prefill_chunk=self.prefill_chunk,
            solo_prefill_chunk=self.solo_prefill_chunk,
            max_stall_seconds=self.max_stall_seconds,
            max_answer_seconds=self.max_answer_seconds,
            drafting=self.drafting,
            stored=self.stored,
            clock=self.clock,
        )

    def add(
        self,
        prompt: Tokens[int],
        params: SamplingParams = GREEDY,
        *,
        identity: str = "a",
        priority: Priority = Priority.NORMAL,
        account: str = "somebody",
        deadline: float | None = None,
    ) -> Sequence:
        sequence = Sequence(
            request_id="r",
            prompt_ids=tuple(prompt),
            params=params,
            cache_identity=identity,
            arrived=self.clock.now,
            priority=priority,
            account=account,
            deadline=deadline,
        )
        self.engine.add(sequence)
        return sequence

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.events += self.engine.step()

    def finish(self) -> None:
        for _ in range(10_000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine never comes to an end")

    def of(self, sequence: Sequence) -> list[Event]:
        return [event for owner, event in self.events if owner is sequence]

    def text(self, sequence: Sequence) -> str:
        return "".join(event.text for event in self.of(sequence) if isinstance(event, Delta))

    def logprobs(self, sequence: Sequence) -> list[TokenLogprob]:
        return [each for event in self.of(sequence) if isinstance(event, Delta) for each in event.token_logprobs]

    def positions(self, sequence: Sequence) -> list[int]:
        return [event.position for event in self.of(sequence) if isinstance(event, Queued)]

    def finished(self, sequence: Sequence) -> Finished:
        event = self.of(sequence)[-1]
        assert isinstance(event, Finished)
        return event

    def failure(self, sequence: Sequence) -> Exception:
        event = self.of(sequence)[-1]
        assert isinstance(event, Failed)
        return event.error


def solo(prompt: Tokens[int], params: SamplingParams = GREEDY, **changes: Any) -> list[int]:
    return expected_tokens(hashed_logits(VOCAB), prompt, params, eos_ids=NO_EOS, **changes)


def spelling(text: str | bytes, num_prompt_tokens: int = 1, *, end: bool = True) -> Logits:
    """Logits of an answer with this text, for a prompt of so many tokens."""
    answer = text.encode() if isinstance(text, str) else text
    return scripted(VOCAB, num_prompt_tokens, [*answer, *([END] if end else [])])


def decoded(token_ids: list[int]) -> str:
    # Ids over 257 are other control tokens: two with text, the rest without.
    text = {260: b"<think>", 261: b"</think>"}
    return b"".join(text.get(token_id, bytes([token_id]) if token_id < 256 else b"") for token_id in token_ids).decode(
        errors="replace"
    )
