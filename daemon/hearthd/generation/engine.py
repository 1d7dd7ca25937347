"""Continuous batching: `scheduling` says who runs, the engine runs it, `collector` says what comes of it.

A step admits waiting sequences to free slots, runs at most one chunk of one prompt, then one token of every sequence
that is past its prompt, in one batch. So a long prompt delays running answers by one chunk at most, and whoever is
removed stops costing time within one run of the model. A step with nobody to serve reads a chunk of an answer that was
written before, so that the conversation's next turn finds it in the cache.

One thread calls it. Knows no asyncio, no gRPC and no threads; time comes from the clock that it is given. Called by
`worker`.
"""

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Tokens

import numpy as np

from hearthd.errors import DeadlineTooShortError, InvalidRequestError
from hearthd.generation.batch import Batch
from hearthd.generation.collector import Collector
from hearthd.generation.decode_step import DecodeStep
from hearthd.generation.drafting import Drafting
from hearthd.generation.idle_time import IdleTime
from hearthd.kv.kv_cache import KVCache, Runner, RunTerminated
from hearthd.kv.stored_prefixes import StoredPrefixes
from hearthd.priority import Priority
from hearthd.scheduling.chunks import ChunkSizes
from hearthd.scheduling.pace import Pace
from hearthd.scheduling.scheduler import Scheduler
from hearthd.scheduling.waits import Waits
from hearthd.sequences.events import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    Queued,
    TokenLogprob,
    TokenProbability,
)
from hearthd.sequences.sequence import Sequence, SequenceState
from hearthd.text.tokenizer import ChatTokenizer

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

# Where only the disk is waited for, somebody who comes or goes is heard that soon.
_DISK_SECONDS = 0.02
# Room that background work leaves for an urgent request: an ordinary prompt and its answer.
_SPARE_TOKENS = 1024


class Engine:
    """Runs sequences on one model. What one of them does or suffers never changes another's tokens."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: ChatTokenizer,
        *,
        num_slots: int | None = None,
        prefill_chunk: int = 64,
        solo_prefill_chunk: int | None = None,
        max_stall_seconds: float = 0.1,
        max_answer_seconds: float = 600.0,
        drafting: Drafting | None = None,
        stored: StoredPrefixes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """num_slots: sequences that run at once; the runner has more slots if others can be paused. None: all of them.

        prefill_chunk: the prompt tokens that one run takes; the last one may take a few more.

        solo_prefill_chunk: the most of them while nobody decodes, so that no answer waits for the run, as far as the
        machine runs them within a second; None for the same size.
        max_stall_seconds: what a run of a prompt may take while answers are written, as far as can be told before.
        max_answer_seconds: from the slot to the end.
        stored: prefixes on disk.
        drafting: guesses further tokens where that is faster; only with `Runner.can_verify`.
        """
        self._runner = runner
        self._max_answer_seconds = max_answer_seconds
        self._clock = clock
        self._pace = Pace()
        self._chunks = ChunkSizes(
            self._pace,
            beside=prefill_chunk,
            alone=prefill_chunk if solo_prefill_chunk is None else solo_prefill_chunk,
            max_stall_seconds=max_stall_seconds,
        )
        self._cache = KVCache(runner, stored)
        self.stored = stored
        """Its figures are for any thread to read."""
        self._idle_time = IdleTime(self._cache, runner, prefill_chunk)
        self._num_slots = runner.num_slots if num_slots is None else num_slots
        self._scheduler = Scheduler(self._num_slots)
        self._waits = Waits(self._scheduler, self._pace)
        self._batch = Batch(self._cache, runner.num_slots)
        self._collector = Collector(tokenizer, context_length=runner.context_length, clock=clock, remove=self._end)
        self._decode_step = DecodeStep(
            runner, self._cache, self._scheduler, self._collector, self._pace, drafting, clock
        )
        self._in_prefill: Sequence | None = None
        self.has_others: Callable[[], bool] = bool
        """Whether other models wait for this one's step to end."""
        self._seconds_until_end: float | None = None

    @property
    def num_slots(self) -> int:
        """Sequences that can run at once."""
        return self._num_slots

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._runner.context_length

    @property
    def num_running(self) -> int:
        """Sequences that run."""
        return len(self._scheduler.running)

    @property
    def num_paused(self) -> int:
        """Sequences that keep their KV while more urgent ones run."""
        return len(self._scheduler.paused)

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """KV memory in use or reserved, and the most that may be. For any thread to read."""
        return self._cache.num_bytes

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun."""
        return self._scheduler.num_waiting

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return not self._scheduler.is_idle or self._idle_time.has_work

    @property
    def prefilling(self) -> Sequence | None:
        """The sequence of whose prompt a chunk is being run at this moment. For any thread to read."""
        return self._in_prefill

    @property
    def seconds_until_end(self) -> float | None:
        """When the first of those that run will have ended, at the last step's estimate. For any thread to read."""
        return self._seconds_until_end

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for a slot; the next step gives it one, or says how many are before it.

        Raises InvalidRequestError if the prompt is empty or leaves no room for an answer, DeadlineTooShortError if the
        answer would not begin in time.
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
        sequence.num_read = self._cache.num_found(sequence.prompt_ids, sequence.cache_identity)
        self._scheduler.add(sequence)
        try:
            self._waits.check_deadline(sequence, self._clock())
        except DeadlineTooShortError:
            self.remove(sequence)
            raise

    def limit_running(self, num_places: int) -> None:
        """Run so many sequences at once, at most `num_slots`; those that are too many are paused by the next step."""
        self._scheduler.num_places = max(1, min(num_places, self._num_slots))

    def close(self, seconds: float) -> None:
        """Use so long at most for what must be done before the process ends."""
        self._cache.close(seconds)

    def share_prompts(self, prompts: Iterable[Tokens[int]]) -> None:
        """Share these beginnings of prompts with all callers, and no others; read them as soon as nobody asks."""
        self._cache.share(list(prompts))

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; it has no further event. No effect on one that has ended."""
        if sequence.state in (SequenceState.PREFILLING, SequenceState.DECODING, SequenceState.PAUSED):
            self._batch.release(sequence)
        self._scheduler.remove(sequence)
        sequence.state = SequenceState.ENDED

    def _end(self, sequence: Sequence) -> None:
        """Take a sequence out whose last event has come."""
        # The start-up proof, which is nobody's, says nothing of how long answers are.
        if sequence.account and sequence.output_ids:
            self._pace.note_answer(len(sequence.output_ids))
        self.remove(sequence)

    def step(self) -> list[tuple[Sequence, Event]]:
        """Schedule, run, collect: at most one chunk of one prompt, and one token of every sequence that decodes.

        Returns what happened, each sequence's events in their order. A run that `Runner.terminate` stopped has not
        happened: the next step runs it again, with the sequences that are there then.
        """
        self._end_overdue()
        self._schedule()
        batch = list(self._batch)
        try:
            if self._scheduler.is_idle:
                self._idle_time.use()
            else:
                self._prefill()
                self._decode_step.run(batch)
        except RunTerminated:
            pass
        if not self.has_work:
            self._runner.rest()
        return self._collector.take_events()

    # Schedule.

    def _end_overdue(self) -> None:
        now = self._clock()
        for sequence in [*self._scheduler.running, *self._scheduler.paused, *self._scheduler.waiting]:
            is_late = sequence.deadline is not None and now >= sequence.deadline
            if is_late or (sequence.admitted is not None and now - sequence.admitted >= self._max_answer_seconds):
                self._collector.finish(sequence, FinishReason.TIME_LIMIT)

    def _schedule(self) -> None:
        """Let the next ones in line run, as far as there are places, and room for their KV; tell the rest."""
        while self._scheduler.is_crowded:
            self._make_place()
        has_room = True
        for sequence in self._scheduler.in_line():
            if not self._scheduler.has_place_for(sequence):
                break
            if sequence.state is SequenceState.PAUSED:
                self._make_place()
                self._resume(sequence)
            # Nobody else gets the room for which one waits; who is paused needs none.
            elif has_room:
                has_room = self._admit(sequence)
        self._announce(has_room=has_room)

    def _announce(self, *, has_room: bool) -> None:
        """Tell those who wait their places, where these have changed. When memory will be free nobody knows."""
        self._seconds_until_end = self._waits.until_end()
        waiting = self._scheduler.waiting
        if any(sequence.queue_position != position for position, sequence in enumerate(waiting)):
            waits = self._waits.until_start() if has_room else {}
            for position, sequence in enumerate(waiting):
                self._collector.announce(sequence, position, waits.get(sequence))

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence begin. Returns False if there is no room for its KV."""
        num_prompt = len(sequence.prompt_ids)
        num_tokens = min(num_prompt + sequence.params.max_tokens, self.context_length)
        if not self._has_room_for(sequence, num_tokens) and not self._clear_room_for(sequence, num_tokens):
            return False
        try:
            place = self._cache.acquire(sequence.prompt_ids, sequence.cache_identity, num_tokens, sequence.num_first)
        except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
            self._collector.fail(sequence, error)
            return True
        if place is None:
            return False
        try:
            self._collector.begin(sequence)
        except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
            self._cache.release(place.slot)
            self._collector.fail(sequence, error)
            return True
        self._make_place()
        sequence.slot = place.slot
        sequence.num_read = place.num_past
        now = self._clock()
        if sequence.admitted is None:
            sequence.admitted = now
            sequence.num_cached = place.num_cached
        else:
            # What it has read itself before it was put back came from nobody else.
            sequence.resume(now)
            sequence.num_cached = min(sequence.num_cached, place.num_cached)
        self._batch.hold(sequence)
        self._scheduler.start(sequence, num_prompt - place.num_past)
        return True

    def _has_room_for(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether there is room for a sequence's KV, and for an urgent one's besides if it is in the background."""
        others = self._scheduler.running or self._scheduler.paused
        is_last = sequence.priority is Priority.BACKGROUND and others
        num_spare = min(_SPARE_TOKENS, self.context_length // 2) if is_last else 0
        return self._cache.has_room_for(num_tokens, len(sequence.prompt_ids), num_spare=num_spare)

    def _clear_room_for(self, sequence: Sequence, num_tokens: int) -> bool:
        """Put less urgent ones back that still read their prompts, if that makes room enough.

        What they have read stays in the cache, as far as it is not needed: a prompt's KV can be had again, bit for bit.
        """
        readers = self._scheduler.who_could_begin_again(sequence)
        slots = {reader.slot for reader in readers}
        if not readers or not self._cache.has_room_for(num_tokens, len(sequence.prompt_ids), without=slots):
            return False
        for reader in readers:
            self._put_back(reader)
            if self._has_room_for(sequence, num_tokens):
                break
        return True

    def _put_back(self, sequence: Sequence) -> None:
        self._batch.release(sequence)
        self._scheduler.put_back(sequence)
        sequence.num_read = self._cache.num_found(sequence.prompt_ids, sequence.cache_identity)
        sequence.queue_position = None
        if sequence.paused is None:
            sequence.pause(self._clock())

    def _make_place(self) -> None:
        """Pause whoever has to make room for another one."""
        sequence = self._scheduler.next_to_pause()
        if sequence is not None:
            if sequence in self._batch:
                self._batch.leave(sequence)
            sequence.pause(self._clock())
            self._scheduler.pause(sequence)

    def _resume(self, sequence: Sequence) -> None:
        sequence.resume(self._clock())
        self._scheduler.resume(sequence)
        if sequence.state is SequenceState.DECODING:
            self._batch.join(sequence)

    # Run.

    def _next_prompt(self) -> Sequence | None:
        """Choose whose prompt is read next. Whom the disk keeps waiting keeps nobody else waiting."""
        prompts = self._scheduler.prompts()
        ready = next((sequence for sequence in prompts if self._fetch(sequence, 0.0)), None)
        if ready is None and prompts and not self._batch and self._fetch(prompts[0], _DISK_SECONDS):
            return prompts[0]
        return ready

    def _fetch(self, sequence: Sequence, wait_seconds: float) -> bool:
        """Take what has come of a prompt from the disk. Returns whether no more is to come."""
        num_fetched = self._cache.fetch(sequence.slot, wait_seconds)
        if num_fetched:
            sequence.num_from_disk = num_fetched - sequence.num_cached
            sequence.num_cached = num_fetched
        return num_fetched is not None

    def _prefill(self) -> None:
        sequence = self._next_prompt()
        if sequence is None or self._chunks.must_wait(sequence, self._batch):
            return
        done = self._cache.num_tokens(sequence.slot)
        left = len(sequence.prompt_ids) - done
        most = self._chunks.choose(sequence, self._batch, has_others=self.has_others())
        # A rest that is too small for a run of its own goes along.
        size = left if left - most < self._runner.min_run else most
        chunk = sequence.prompt_ids[done : done + size]
        self._in_prefill = sequence
        try:
            started = self._clock()
            logits = self._runner.forward(np.array([chunk], np.int64), sequence.slot, np.array([done], np.int32))
            self._pace.note_prompt_run(len(chunk), self._clock() - started)
        except RunTerminated:
            raise
        except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
            self._cache.forget(sequence.slot)
            self._collector.fail(sequence, error)
            return
        finally:
            self._in_prefill = None
        self._cache.extend(sequence.slot, chunk)
        sequence.num_read = done + len(chunk)
        if sequence.num_read == len(sequence.prompt_ids):
            sequence.prefilled = self._clock()
            sequence.state = SequenceState.DECODING
            self._batch.join(sequence)
            self._collector.take_token(sequence, logits[0], sequence.prefilled)
