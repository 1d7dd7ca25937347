"""What comes of a run: logits become tokens, tokens become events, and some of them are an answer's last.

Knows no slots and no order of service. Called by `engine`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hearthd.sequences.answer import Answer
from hearthd.sequences.events import Event, Failed, FinishReason, Queued, TokenLogprob, TokenProbability
from hearthd.sequences.logits import logprobs
from hearthd.sequences.sampling import Sampler
from hearthd.sequences.sequence import Sequence
from hearthd.text.tokenizer import ChatTokenizer

__all__ = ["Collector"]


class Collector:
    """Collects the events of a step. What is wrong with one sequence fails that one alone."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        context_length: int,
        clock: Callable[[], float],
        remove: Callable[[Sequence], None],
    ) -> None:
        """remove: called for each sequence that has ended, after its last event."""
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._clock = clock
        self._remove = remove
        self._events: list[tuple[Sequence, Event]] = []

    def take_events(self) -> list[tuple[Sequence, Event]]:
        """Return what has happened since the last call, each sequence's events in their order."""
        events, self._events = self._events, []
        return events

    def begin(self, sequence: Sequence) -> None:
        """Make what a sequence's tokens need. Raises whatever is wrong with its parameters."""
        sequence.sampler = Sampler(sequence.params, sequence.prompt_ids)
        sequence.answer = Answer(self._tokenizer.decoder(), sequence.params.stop, sequence.screen)

    def announce(self, sequence: Sequence, position: int, expected_wait_seconds: float | None) -> None:
        """Tell a waiting sequence its place in the queue, if it is another one than before.

        One that waits again in the middle of its answer is told nothing, as in a pause.
        """
        if sequence.queue_position != position:
            sequence.queue_position = position
            if not sequence.output_ids:
                self._events.append((sequence, Queued(position, expected_wait_seconds)))

    def take_token(self, sequence: Sequence, logits: NDArray[np.float32], now: float) -> None:
        """Choose a sequence's next token. logits: float32 (V,)."""
        try:
            token_id = sequence.sampler.sample(logits)
            is_end = token_id in self._tokenizer.eos_ids
            logprob = None if is_end else self._logprob(sequence, logits, token_id)
            delta = None if is_end else sequence.answer.push(token_id, logprob)
        except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
            self.fail(sequence, error)
            return
        sequence.note_token(token_id, now)
        if delta is not None:
            self._events.append((sequence, delta))
        num_tokens = len(sequence.output_ids)
        if is_end:
            self.finish(sequence, FinishReason.END_OF_TURN)
        elif (stopped_by := sequence.answer.stopped_by) is not None:
            self.finish(sequence, stopped_by)
        elif num_tokens >= sequence.params.max_tokens or len(sequence.prompt_ids) + num_tokens >= self._context_length:
            self.finish(sequence, FinishReason.LENGTH)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End an answer, with what was held back of its text."""
        if sequence.admitted is not None:
            try:
                rest = sequence.answer.end()
            except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
                self.fail(sequence, error)
                return
            if rest is not None:
                self._events.append((sequence, rest))
            # What ends a text may have waited for something longer that did not come.
            reason = sequence.answer.stopped_by or reason
        self._events.append((sequence, sequence.finished(reason, self._clock())))
        self._remove(sequence)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence with an error."""
        self._events.append((sequence, Failed(error)))
        self._remove(sequence)

    def _logprob(self, sequence: Sequence, logits: NDArray[np.float32], token_id: int) -> TokenLogprob | None:
        num_top = sequence.params.top_logprobs
        if num_top is None:
            return None
        text_of = self._tokenizer.token_bytes
        chosen, top = logprobs(logits, token_id, num_top)
        return TokenLogprob(
            token_id, text_of(token_id), chosen, tuple(TokenProbability(other, text_of(other), p) for other, p in top)
        )
