"""Continuous batching: `scheduling` says who runs, the engine runs it, `collector` says what comes of it.

A step admits waiting sequences to free slots, runs at most one chunk of one prompt, then one token of every sequence
that is past its prompt, in one batch. So a long prompt delays running answers by one chunk at most, and whoever is
removed stops costing time within one run of the model. A step with nobody to serve reads a chunk of an answer that was
written before, so that the conversation's next turn finds it in the cache.

One thread calls it. Knows no asyncio, no gRPC and no threads; time comes from the clock that it is given. Called by
`worker`.
"""

import logging
import time
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from hearthd.batch import Batch
from hearthd.collector import Collector
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
from hearthd.scheduling.chunks import ChunkSizes
from hearthd.scheduling.scheduler import Scheduler
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
        machine runs them within a second; None for the same size.
        max_answer_seconds: from the slot to the end.
        """
        self._runner = runner
        self._max_answer_seconds = max_answer_seconds
        self._clock = clock
        self._chunks = ChunkSizes(prefill_chunk, prefill_chunk if solo_prefill_chunk is None else solo_prefill_chunk)
        self._cache = KVCache(runner)
        self._scheduler = Scheduler()
        self._batch = Batch(self._cache, runner.num_slots)
        self._collector = Collector(tokenizer, context_length=runner.context_length, clock=clock, remove=self.remove)
        self._in_prefill: Sequence | None = None

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
        return len(self._scheduler.prefilling) + len(self._batch)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._scheduler.waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._is_asked or self._cache.next_unread(self._chunks.beside) is not None

    @property
    def _is_asked(self) -> bool:
        return bool(self.num_waiting or self.num_running)

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
        self._scheduler.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; it has no further event. No effect on one that has ended."""
        self._scheduler.remove(sequence)
        if sequence.state in (SequenceState.PREFILLING, SequenceState.DECODING):
            self._batch.release(sequence)
        sequence.state = SequenceState.ENDED

    def step(self) -> list[tuple[Sequence, Event]]:
        """Schedule, run, collect: at most one chunk of one prompt, and one token of every running sequence.

        Returns what happened, each sequence's events in their order. A run that `Runner.terminate` stopped has not
        happened: the next step runs it again, with the sequences that are there then.
        """
        self._end_overdue()
        self._admit()
        self._announce_positions()
        batch = list(self._batch)
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
        return self._collector.take_events()

    # Schedule.

    def _end_overdue(self) -> None:
        now = self._clock()
        for sequence in [*self._scheduler.waiting, *self._scheduler.prefilling, *self._batch]:
            is_late = sequence.deadline is not None and now >= sequence.deadline
            if is_late or (sequence.admitted is not None and now - sequence.admitted >= self._max_answer_seconds):
                self._collector.finish(sequence, FinishReason.TIME_LIMIT)

    def _admit(self) -> None:
        for sequence in self._scheduler.waiting:
            if not self._cache.has_idle_slot:
                break
            now = self._clock()
            try:
                self._collector.begin(sequence)
                place = self._cache.acquire(sequence.prompt_ids, sequence.cache_identity)
            except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
                self._collector.fail(sequence, error)
                continue
            sequence.slot = place.slot
            sequence.num_cached = place.num_cached
            sequence.admitted = now
            self._batch.hold(sequence)
            self._scheduler.start(sequence)

    def _announce_positions(self) -> None:
        for position, sequence in enumerate(self._scheduler.waiting):
            self._collector.announce(sequence, position)

    # Run.

    def _prefill(self) -> None:
        if not self._scheduler.prefilling:
            return
        sequence = self._scheduler.prefilling[0]
        done = self._cache.num_tokens(sequence.slot)
        left = len(sequence.prompt_ids) - done
        most = self._chunks.choose(is_alone=not self._batch)
        # A rest that is too small for a run of its own goes along.
        size = left if left - most < self._runner.min_run else most
        chunk = sequence.prompt_ids[done : done + size]
        self._in_prefill = sequence
        try:
            started = self._clock()
            logits = self._run([chunk], sequence.slot, [done])
            self._chunks.note(len(chunk), self._clock() - started)
        except RunTerminated:
            raise
        except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
            self._cache.forget(sequence.slot)
            self._collector.fail(sequence, error)
            return
        finally:
            self._in_prefill = None
        self._cache.extend(sequence.slot, chunk)
        if done + len(chunk) == len(sequence.prompt_ids):
            sequence.prefilled = self._clock()
            self._scheduler.remove(sequence)
            sequence.state = SequenceState.DECODING
            self._batch.join(sequence)
            self._collector.take_token(sequence, logits[0], sequence.prefilled)

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
                self._collector.fail(sequence, error)
            return
        for sequence in batch:
            self._cache.extend(sequence.slot, sequence.output_ids[-1:])
        now = self._clock()
        for row, sequence in enumerate(batch):
            self._collector.take_token(sequence, logits[row], now)

    def _read_answers(self) -> None:
        """Read a chunk of what was written: only KV that a prompt's run wrote can be reused."""
        unread = self._cache.next_unread(self._chunks.beside)
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
