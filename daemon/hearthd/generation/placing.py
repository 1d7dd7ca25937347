"""Who gets a place and room for its KV: does what `scheduling` decides, with the batch and the cache.

Runs nothing of the model. Called by `engine`, before each run.
"""

from collections.abc import Callable
from typing import Final

from hearthd.generation.batch import Batch
from hearthd.generation.collector import Collector
from hearthd.kv.kv_cache import KVCache
from hearthd.priority import Priority
from hearthd.scheduling.scheduler import Scheduler
from hearthd.scheduling.waits import Waits
from hearthd.sequences.sequence import Sequence, SequenceState

__all__ = ["Placing"]

# Room that background work leaves for an urgent request: an ordinary prompt and its answer.
_SPARE_TOKENS: Final = 1024


class Placing:
    """The parts of the engine that this takes."""

    def __init__(
        self,
        cache: KVCache,
        scheduler: Scheduler,
        batch: Batch,
        collector: Collector,
        waits: Waits,
        *,
        context_length: int,
        clock: Callable[[], float],
    ) -> None:
        self._cache = cache
        self._scheduler = scheduler
        self._batch = batch
        self._collector = collector
        self._waits = waits
        self._context_length = context_length
        self._clock = clock
        self.seconds_until_end: float | None = None
        """When the first of those that run will have ended, at the last estimate."""

    def schedule(self) -> None:
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
        self.seconds_until_end = self._waits.until_end()
        waiting = self._scheduler.waiting
        if any(sequence.queue_position != position for position, sequence in enumerate(waiting)):
            waits = self._waits.until_start() if has_room else {}
            for position, sequence in enumerate(waiting):
                self._collector.announce(sequence, position, waits.get(sequence))

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence begin. Returns False if there is no room for its KV."""
        num_prompt = len(sequence.prompt_ids)
        num_tokens = min(num_prompt + sequence.params.max_tokens, self._context_length)
        if not self._has_room_for(sequence, num_tokens) and not self._clear_room_for(sequence, num_tokens):
            return False
        try:
            place = self._cache.acquire(
                sequence.prompt_ids, sequence.cache_identity, num_tokens, sequence.num_first, sequence.audience
            )
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
        num_spare = min(_SPARE_TOKENS, self._context_length // 2) if is_last else 0
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
        sequence.num_read = self._cache.num_found(sequence.prompt_ids, sequence.cache_identity, sequence.audience)
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
