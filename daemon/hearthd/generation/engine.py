"""Continuous batching: one short step, again and again.

A step gives waiting sequences their places (`placing`), runs at most one chunk of one prompt (`prompt_step`), then one
token of every sequence that is past its prompt, in one batch (`decode_step`); `collector` says what comes of it. So a
long prompt delays running answers by one chunk at most, and whoever is removed stops costing time within one run of the
model. A step with nobody to serve prepares for those who come next (`idle_time`). Who goes before whom: `scheduling`.

One thread calls it. Knows no asyncio, no gRPC and no threads; time comes from the clock that it is given. Called by
`worker`.
"""

import time
from collections.abc import Callable

from hearthd.errors import DeadlineTooShortError, InvalidRequestError
from hearthd.generation.batch import Batch
from hearthd.generation.collector import Collector
from hearthd.generation.decode_step import DecodeStep
from hearthd.generation.drafting import Drafting
from hearthd.generation.idle_time import IdleTime
from hearthd.generation.placing import Placing
from hearthd.generation.prompt_step import PromptStep
from hearthd.kv.kv_cache import KVCache, Runner, RunTerminated
from hearthd.kv.shared import SharedPrompts
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
        self._pace = Pace(clock)
        self._cache = KVCache(runner, stored)
        self.stored = stored
        """Its figures are for any thread to read."""
        self.has_others: Callable[[Priority], bool] = lambda _: False
        """Whether anybody that urgent, or more, waits for another model."""
        self._num_slots = runner.num_slots if num_slots is None else num_slots
        self._scheduler = Scheduler(self._num_slots)
        self._waits = Waits(self._scheduler, self._pace, runner.kv_budget, runner.context_length)
        self._batch = Batch(self._cache, runner.num_slots)
        self._collector = Collector(tokenizer, context_length=runner.context_length, clock=clock, remove=self._end)
        self._placing = Placing(
            self._cache,
            self._scheduler,
            self._batch,
            self._collector,
            self._waits,
            context_length=runner.context_length,
            clock=clock,
        )
        chunks = ChunkSizes(
            self._pace,
            beside=prefill_chunk,
            alone=prefill_chunk if solo_prefill_chunk is None else solo_prefill_chunk,
            max_stall_seconds=max_stall_seconds,
        )
        self._prompt_step = PromptStep(
            runner,
            self._cache,
            self._scheduler,
            self._batch,
            self._collector,
            self._pace,
            chunks,
            clock,
            has_others=lambda priority: self.has_others(priority),  # noqa: PLW0108 - `inference_thread` sets it later
        )
        self._decode_step = DecodeStep(
            runner, self._cache, self._scheduler, self._collector, self._pace, drafting, clock
        )
        self._idle_time = IdleTime(self._cache, runner, self._pace, prefill_chunk, clock)

    def step(self) -> list[tuple[Sequence, Event]]:
        """Schedule, run, collect: at most one chunk of one prompt, and one token of every sequence that decodes.

        Returns what happened, each sequence's events in their order. A run that `Runner.terminate` stopped has not
        happened: the next step runs it again, with the sequences that are there then.
        """
        self._end_overdue()
        self._placing.schedule()
        batch = list(self._batch)
        try:
            if self._scheduler.is_idle:
                self._idle_time.use()
            else:
                self._prompt_step.run()
                self._decode_step.run(batch)
        except RunTerminated:
            pass
        if not self.has_work:
            self._runner.rest()
        return self._collector.take_events()

    def _end_overdue(self) -> None:
        now = self._clock()
        for sequence in [*self._scheduler.running, *self._scheduler.paused, *self._scheduler.waiting]:
            is_late = sequence.deadline is not None and now >= sequence.deadline
            if is_late or (sequence.admitted is not None and now - sequence.admitted >= self._max_answer_seconds):
                self._collector.finish(sequence, FinishReason.TIME_LIMIT)

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
        """KV memory in use, and the most that may be. For any thread to read."""
        return self._cache.num_bytes

    @property
    def num_waiting(self) -> int:
        """Sequences that have no KV: they have not begun, or gave it up."""
        return self._scheduler.num_waiting

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return not self._scheduler.is_idle or self._idle_time.has_work

    @property
    def urgency(self) -> Priority | None:
        """Of the most urgent sequence that runs, is paused or waits; None if there is nobody."""
        return self._scheduler.urgency

    @property
    def prefilling(self) -> Sequence | None:
        """The sequence of whose prompt a chunk is being run at this moment. For any thread to read."""
        return self._prompt_step.reading

    def stops_for(self, priority: Priority) -> bool:
        """Whether the run of this moment is to be stopped for somebody so urgent who comes. For any thread to ask.

        What nobody has asked for is, and so is a long run of a less urgent prompt, whose next runs are short.
        """
        return self._idle_time.is_reading or self._prompt_step.stops_for(priority)

    @property
    def seconds_until_end(self) -> float | None:
        """When the first of those that run will have ended, at the last step's estimate. For any thread to read."""
        return self._placing.seconds_until_end

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
        sequence.num_read = self._cache.num_found(sequence.prompt_ids, sequence.cache_identity, sequence.audience)
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

    def share_prompts(self, shared: SharedPrompts) -> None:
        """Share these beginnings of prompts, and no others; read them as soon as nobody asks."""
        self._cache.share(shared)

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
