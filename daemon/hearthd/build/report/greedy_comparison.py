"""Greedy answers of the float32 graph and of a bundle's own graph, side by side, and where they part.

At every token of the float32 graph's answer the bundle's graph is asked what it would say there, given the same text
before it. Where that is another token, the float32 graph's lead is how much more likely it holds its own of the two:
with a small lead either word would have done, with a large one the int8 graph is wrong.

Knows sessions and a tokenizer, no recipes and no pages. Called by `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.graph import MODEL_FILE
from hearthd.build.quantization.quality import ReferenceGraph
from hearthd.build.quantization.session import GraphSession
from hearthd.text.tokenizer import ChatTokenizer, Message

__all__ = ["MAX_TOKENS", "NEAR_TIE", "PROMPTS", "Comparison", "Parting", "compare_answers", "pieces"]

# Long enough to see whether an answer goes astray, short enough for a board: 6 answers are some 300 tokens of float32.
MAX_TOKENS = 48
# Nats: up to here the float32 graph gives its own token at most 1.65 times the probability of the other one. A mean KL
# of 0.01 is what two logits that each move by some 0.1 cause; a gap of this size is then rarely crossed by accident.
NEAR_TIE = 0.5
# By kind; none of them, nor anything close, stands in the calibration text.
PROMPTS = (
    ("chat", "I have a free evening at home. Give me three ideas for it, please."),
    ("home", "Turn on the lamp in the kitchen and tell me in one sentence what you did."),
    ("prose", "Explain in two sentences why the sea is salty."),
    ("code", "Write a Python function that returns the largest number in a list."),
    ("numbers", "A train leaves at 14:25 and takes 95 minutes. When does it arrive?"),
    ("multilingual", "Wie kocht man eine einfache Linsensuppe? Antworte in drei Sätzen."),
)


@dataclass(frozen=True, slots=True)
class Parting:
    """A token of the float32 graph's answer that the bundle's graph would not have chosen.

    position: in the answer. lead: nats by which the float32 graph holds its own token likelier than the other.
    """

    position: int
    reference_token: int
    tested_token: int
    lead: float

    @property
    def is_near_tie(self) -> bool:
        """Whether either token would have done."""
        return self.lead <= NEAR_TIE


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt and both answers, as token ids, each with its end-of-turn token if it came to that.

    partings: all along the float32 graph's answer, the text before each being that answer's; the first is where the two
    answers part.
    """

    kind: str
    prompt: str
    reference: tuple[int, ...]
    tested: tuple[int, ...]
    partings: tuple[Parting, ...]

    @property
    def parting(self) -> Parting | None:
        """Where the two answers part; None if they are the same."""
        return self.partings[0] if self.partings else None

    @property
    def num_agreed(self) -> int:
        """Tokens of the float32 graph's answer that the bundle's graph would have chosen too."""
        return len(self.reference) - len(self.partings)


def compare_answers(
    reference: ReferenceGraph,
    directory: Path,
    spec: DecoderSpec,
    tokenizer: ChatTokenizer,
    *,
    preset: NDArray[np.int8] | None,
    context_length: int,
    num_threads: int,
    prompts: Sequence[tuple[str, str]] = PROMPTS,
    max_tokens: int = MAX_TOKENS,
    report: Callable[[float], None],
) -> tuple[Comparison, ...]:
    """Ask both graphs each prompt, of (kind, text), as the first message of a chat.

    directory: a bundle's, or one with the same graph files. preset: as in the bundle. context_length: of the reference;
    a prompt that leaves no room for an answer is left out. report: called with the share that is done, 0 to 1.
    """
    model = (directory / MODEL_FILE).read_bytes()
    tested = GraphSession(
        model,
        spec,
        data_directory=directory,
        context_length=context_length,
        num_threads=num_threads,
        preset=preset,
        prepacked=True,
    )
    pair = _Pair(reference, tested, spec.vocab_size, 0 if preset is None else preset.shape[3], tokenizer.eos_ids)
    found: list[Comparison] = []
    for index, (kind, text) in enumerate(prompts):
        prompt = tokenizer.encode_chat([Message("user", text)])
        room = min(max_tokens, context_length - len(prompt))
        if room > 0:
            found.append(pair.compared(kind, text, prompt, room))
        report((index + 1) / len(prompts))
    return tuple(found)


def pieces(tokenizer: ChatTokenizer, token_ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text that each token adds to an answer; empty for a control token and within a character."""
    decoder = tokenizer.decoder()
    texts = [decoder.push(token_id) for token_id in token_ids]
    if texts:
        texts[-1] += decoder.flush()
    return tuple(texts)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both graphs; `start` tokens of each conversation are the bundle's preset."""

    reference: ReferenceGraph
    tested: GraphSession
    vocab_size: int
    start: int
    eos_ids: frozenset[int]

    def compared(self, kind: str, text: str, prompt: list[int], max_tokens: int) -> Comparison:
        answer, chosen_by = self._reference_answer(prompt, max_tokens)
        choices = self._tested_choices(prompt, answer)
        partings = tuple(
            Parting(position, token, choice, float(logits[token] - logits[choice]))
            for position, (token, choice, logits) in enumerate(zip(answer, choices, chosen_by, strict=True))
            if token != choice
        )
        tested = answer
        if partings:
            kept = partings[0].position
            tested = self._tested_rest(prompt, [*answer[:kept], choices[kept]], max_tokens)
        return Comparison(kind, text, tuple(answer), tuple(tested), partings)

    def _reference_answer(self, prompt: list[int], max_tokens: int) -> tuple[list[int], list[NDArray[np.float32]]]:
        """Return the float32 graph's answer and the logits that each of its tokens was chosen by."""
        if self.start:
            self.reference.keys_and_values(prompt[: self.start])
        chosen_by = [self._last(self.reference.session.continue_from(prompt, self.start))]
        answer = [int(chosen_by[0].argmax())]
        while len(answer) < max_tokens and answer[-1] not in self.eos_ids:
            written = [*prompt, *answer]
            chosen_by.append(self._last(self.reference.session.continue_from(written, len(written) - 1)))
            answer.append(int(chosen_by[-1].argmax()))
        return answer, chosen_by

    def _tested_choices(self, prompt: list[int], answer: list[int]) -> list[int]:
        """Return the bundle's choice at each token of an answer, given what the answer has before it."""
        choices = [int(self._last(self.tested.run(prompt, start=self.start)).argmax())]
        return choices + [self._next([*prompt, *answer[:length]]) for length in range(1, len(answer))]

    def _tested_rest(self, prompt: list[int], answer: list[int], max_tokens: int) -> list[int]:
        """Return the bundle's own answer, which begins with `answer`; KV of all but its last token is there."""
        answer = list(answer)
        while len(answer) < max_tokens and answer[-1] not in self.eos_ids:
            answer.append(self._next([*prompt, *answer]))
        return answer

    def _next(self, written: list[int]) -> int:
        return int(self._last(self.tested.continue_from(written, len(written) - 1)).argmax())

    def _last(self, runs: Iterator[tuple[NDArray[np.float32], object]]) -> NDArray[np.float32]:
        """Run to the end; return the last position's logits, (vocab_size,)."""
        *_, (logits, _) = runs
        last: NDArray[np.float32] = logits.reshape(-1, self.vocab_size)[-1]
        return last
