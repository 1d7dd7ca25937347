"""Continuous batching: who runs, what is run, and what comes of it.

A step admits waiting sequences to free slots, runs at most one chunk of one prompt, then one token of every sequence
that is past its prompt, in one batch. So a long prompt delays running answers by one chunk at most, and whoever is
removed stops costing time within one run of the model. A step with nobody to serve reads a chunk of an answer that was
written before, so that the conversation's next turn finds it in the cache.

One thread calls it. Knows no asyncio, no gRPC and no threads; time comes from the clock that it is given. Called by
`worker`.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from hearthd.answer import Answer
from hearthd.errors import InvalidRequestError
from hearthd.events import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    Queued,
    TokenLogprob,
    TokenProbability,
)
from hearthd.kv_cache import KVCache, Runner, RunTerminated
from hearthd.logits import logprobs
from hearthd.sampling import Sampler
from hearthd.sequence import Sequence, SequenceState
from hearthd.tokenizer import ChatTokenizer

__all__ = [
    "Delta",
    "Engine",
    "Event",
    "Failed",
    "FinishReason",
    "Finished",
    "Queued",
    "RunTerminated",
    "Runner",
    "Sequence",
    "TokenLogprob",
    "TokenProbability",
]

_logger = logging.getLogger(__name__)

# What a run of a prompt may take where no answer waits for it: a cancelled prompt is dropped and the next one is begun
# that soon, and the watchdog is fed.
_SOLO_SECONDS = 1.0
# The runner keeps what belongs to a run's size ready for multiples of this.
_CHUNK_STEP = 16


class Engine:
    """Runs sequences on one model. What one of them does or suffers never changes another's tokens."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: ChatTokenizer,
        *,
        prefill_chunk: int = 64,
        solo_prefill_chunk: int | None = None,
        max_answer_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """prefill_chunk: the prompt tokens that one run takes; the last one may take a few more.

        solo_prefill_chunk: the most of them while nobody decodes, so that no answer waits for the run, as far as the
        machine runs them in `_SOLO_SECONDS`; None for the same size.
        max_answer_seconds: from the slot to the end.
        """
        self._runner = runner
        self._tokenizer = tokenizer
        self._prefill_chunk = prefill_chunk
        self._solo_prefill_chunk = prefill_chunk if solo_prefill_chunk is None else solo_prefill_chunk
        self._max_answer_seconds = max_answer_seconds
        self._clock = clock
        self._cache = KVCache(runner)
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        # In the order of their slots, which stand side by side: a batch needs them so.
        self._decoding: list[Sequence] = []
        self._events: list[tuple[Sequence, Event]] = []
        self._in_prefill: Sequence | None = None
        # Of the last run of a prompt; None before the first.
        self._seconds_per_token: float | None = None

    @property
    def num_slots(self) -> int:
        """Sequences that can run at once."""
        return self._runner.num_slots

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._runner.context_length

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._is_asked or self._cache.next_unread(self._prefill_chunk) is not None

    @property
    def _is_asked(self) -> bool:
        return bool(self._waiting or self._prefilling or self._decoding)

    @property
    def prefilling(self) -> Sequence | None:
        """The sequence of whose prompt a chunk is being run at this moment. For any thread to read."""
        return self._in_prefill

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for a slot; the next step gives it one, or says how many are before it.

        Raises InvalidRequestError if the prompt is empty or leaves no room for an answer.
        """
        if sequence.state is not SequenceState.NEW:
            raise ValueError(f"sequence {sequence.request_id} was added before")
        num_tokens = len(sequence.prompt_ids)
        if not 0 < num_tokens < self.context_length:
            raise InvalidRequestError(
                "messages",
                f"have {num_tokens} tokens; give 1 to {self.context_length - 1}, so that prompt and answer fit the "
                f"context of {self.context_length}",
            )
        sequence.state = SequenceState.WAITING
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; it has no further event. No effect on one that has ended."""
        match sequence.state:
            case SequenceState.WAITING:
                self._waiting.remove(sequence)
            case SequenceState.PREFILLING:
                self._prefilling.remove(sequence)
                self._cache.release(sequence.slot)
            case SequenceState.DECODING:
                self._leave_batch(sequence)
            case SequenceState.NEW | SequenceState.ENDED:
                pass
        sequence.state = SequenceState.ENDED

    def step(self) -> list[tuple[Sequence, Event]]:
        """Schedule, run, collect: at most one chunk of one prompt, and one token of every running sequence.

        Returns what happened, each sequence's events in their order. A run that `Runner.terminate` stopped has not
        happened: the next step runs it again, with the sequences that are there then.
        """
        self._end_overdue()
        self._admit()
        self._announce_positions()
        batch = list(self._decoding)
        try:
            if self._is_asked:
                self._prefill()
                self._decode(batch)
            else:
                self._read_answers()
        except RunTerminated:
            pass
        if not self.has_work:
            self._runner.rest()
        events, self._events = self._events, []
        return events

    # Schedule.

    def _end_overdue(self) -> None:
        now = self._clock()
        for sequence in [*self._waiting, *self._prefilling, *self._decoding]:
            is_late = sequence.deadline is not None and now >= sequence.deadline
            if is_late or (sequence.admitted is not None and now - sequence.admitted >= self._max_answer_seconds):
                self._finish(sequence, FinishReason.TIME_LIMIT)

    def _admit(self) -> None:
        while self._waiting and self._cache.has_idle_slot:
            sequence = self._waiting[0]
            now = self._clock()
            try:
                sequence.sampler = Sampler(sequence.params, sequence.prompt_ids)
                sequence.answer = Answer(self._tokenizer.decoder(), sequence.params.stop, sequence.screen)
                place = self._cache.acquire(sequence.prompt_ids, sequence.cache_identity)
            except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
                self._fail(sequence, error)
                continue
            self._waiting.popleft()
            sequence.slot = place.slot
            sequence.num_cached = place.num_cached
            sequence.admitted = now
            sequence.state = SequenceState.PREFILLING
            self._prefilling.append(sequence)

    def _announce_positions(self) -> None:
        for position, sequence in enumerate(self._waiting):
            if sequence.queue_position != position:
                sequence.queue_position = position
                self._events.append((sequence, Queued(position)))

    # Run.

    def _prefill(self) -> None:
        if not self._prefilling:
            return
        sequence = self._prefilling[0]
        done = self._cache.num_tokens(sequence.slot)
        left = len(sequence.prompt_ids) - done
        most = self._chunk_size()
        # A rest that is too small for a run of its own goes along.
        size = left if left - most < self._runner.min_run else most
        chunk = sequence.prompt_ids[done : done + size]
        self._in_prefill = sequence
        try:
            started = self._clock()
            logits = self._run([chunk], sequence.slot, [done])
            self._seconds_per_token = (self._clock() - started) / len(chunk)
        except RunTerminated:
            raise
        except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
            self._cache.forget(sequence.slot)
            self._fail(sequence, error)
            return
        finally:
            self._in_prefill = None
        self._cache.extend(sequence.slot, chunk)
        if done + len(chunk) == len(sequence.prompt_ids):
            sequence.prefilled = self._clock()
            self._prefilling.remove(sequence)
            self._join_batch(sequence)
            self._take_token(sequence, logits[0], sequence.prefilled)

    def _chunk_size(self) -> int:
        """Return the prompt tokens of the next run: larger runs are faster, as long as nobody waits for them."""
        if self._decoding or self._seconds_per_token is None:
            return self._prefill_chunk
        in_time = int(min(_SOLO_SECONDS / max(self._seconds_per_token, 1e-9), self._solo_prefill_chunk))
        return max(self._prefill_chunk, in_time // _CHUNK_STEP * _CHUNK_STEP)

    def _decode(self, batch: list[Sequence]) -> None:
        """Run the last token of the sequences that decoded before this step, in one batch."""
        if not batch:
            return
        lengths = [self._cache.num_tokens(sequence.slot) for sequence in batch]
        try:
            logits = self._run([sequence.output_ids[-1:] for sequence in batch], batch[0].slot, lengths)
        except RunTerminated:
            raise
        except Exception as error:  # noqa: BLE001 - of these sequences; the engine goes on
            for sequence in batch:
                self._cache.forget(sequence.slot)
            for sequence in batch:
                self._fail(sequence, error)
            return
        for sequence in batch:
            self._cache.extend(sequence.slot, sequence.output_ids[-1:])
        now = self._clock()
        for row, sequence in enumerate(batch):
            self._take_token(sequence, logits[row], now)

    def _read_answers(self) -> None:
        """Read a chunk of what was written: only KV that a prompt's run wrote can be reused."""
        unread = self._cache.next_unread(self._prefill_chunk)
        if unread is None:
            return
        slot, chunk = unread
        try:
            self._run([chunk], slot, [self._cache.num_tokens(slot)])
        except RunTerminated:
            raise
        except Exception as error:  # noqa: BLE001 - of nobody's answer; who asks next hears of it
            # Its type alone: a message could quote what was said.
            _logger.warning("an answer could not be read again, and is not cached: %s", type(error).__name__)
            self._cache.forget(slot)
        else:
            self._cache.note_read(slot, len(chunk))

    def _run(self, rows: list[Iterable[int]], first_slot: int, past_lengths: list[int]) -> NDArray[np.float32]:
        return self._runner.forward(np.array(rows, np.int64), first_slot, np.array(past_lengths, np.int32))

    # Collect.

    def _take_token(self, sequence: Sequence, logits: NDArray[np.float32], now: float) -> None:
        """Choose a sequence's next token. logits: float32 (V,)."""
        try:
            token_id = sequence.sampler.sample(logits)
            is_end = token_id in self._tokenizer.eos_ids
            logprob = None if is_end else self._logprob(sequence, logits, token_id)
            delta = None if is_end else sequence.answer.push(token_id, logprob)
        except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
            self._fail(sequence, error)
            return
        sequence.output_ids.append(token_id)
        sequence.last_token = now
        if sequence.first_token is None:
            sequence.first_token = now
        if delta is not None:
            self._events.append((sequence, delta))
        num_tokens = len(sequence.output_ids)
        if is_end:
            self._finish(sequence, FinishReason.END_OF_TURN)
        elif (stopped_by := sequence.answer.stopped_by) is not None:
            self._finish(sequence, stopped_by)
        elif num_tokens >= sequence.params.max_tokens or len(sequence.prompt_ids) + num_tokens >= self.context_length:
            self._finish(sequence, FinishReason.LENGTH)

    def _logprob(self, sequence: Sequence, logits: NDArray[np.float32], token_id: int) -> TokenLogprob | None:
        num_top = sequence.params.top_logprobs
        if num_top is None:
            return None
        text_of = self._tokenizer.token_bytes
        chosen, top = logprobs(logits, token_id, num_top)
        return TokenLogprob(
            token_id, text_of(token_id), chosen, tuple(TokenProbability(other, text_of(other), p) for other, p in top)
        )

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.admitted is not None:
            try:
                rest = sequence.answer.end()
            except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
                self._fail(sequence, error)
                return
            if rest is not None:
                self._events.append((sequence, rest))
            # What ends a text may have waited for something longer that did not come.
            reason = sequence.answer.stopped_by or reason
        self._events.append((sequence, sequence.finished(reason, self._clock())))
        self.remove(sequence)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._events.append((sequence, Failed(error)))
        self.remove(sequence)

    # Slots.

    def _join_batch(self, sequence: Sequence) -> None:
        """Put a sequence beside those that decode. Where it stands already, if it can: moving KV takes time."""
        sequence.state = SequenceState.DECODING
        before = self._decoding[0].slot - 1 if self._decoding else sequence.slot
        behind = before + len(self._decoding) + 1
        if sequence.slot == before:
            self._decoding.insert(0, sequence)
        elif sequence.slot == behind or behind < self.num_slots:
            self._move(sequence, behind)
            self._decoding.append(sequence)
        else:
            self._move(sequence, before)
            self._decoding.insert(0, sequence)

    def _leave_batch(self, sequence: Sequence) -> None:
        """Give up a slot. Into one between others the last one of them moves, so that no hole is left."""
        place = self._decoding.index(sequence)
        if 0 < place < len(self._decoding) - 1:
            last = self._decoding.pop()
            self._decoding[place] = last
            self._cache.swap(sequence.slot, last.slot)
            sequence.slot, last.slot = last.slot, sequence.slot
        else:
            del self._decoding[place]
        self._cache.release(sequence.slot)

    def _move(self, sequence: Sequence, target: int) -> None:
        """Exchange a sequence's slot for another one, which no sequence that decodes holds."""
        if sequence.slot == target:
            return
        for other in self._prefilling:
            if other.slot == target:
                other.slot = sequence.slot
        self._cache.swap(sequence.slot, target)
        sequence.slot = target
