"""Who gets a place and room for its KV: does what `scheduling` decides, with the batch and the cache.

Runs nothing of the model. Called by `engine`, before each run.
"""

from collections.abc import Callable, Collection

from hearthd.generation.batch import Batch
from hearthd.generation.collector import Collector
from hearthd.kv.kv_cache import KVCache
from hearthd.scheduling.demand import num_reserved, num_spare
from hearthd.scheduling.scheduler import Scheduler
from hearthd.scheduling.waits import Waits
from hearthd.sequences.sequence import Sequence, SequenceState

__all__ = ["Placing"]


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
        self._announce()

    def _announce(self) -> None:
        """Tell those who wait their places, where these have changed. Who has written something is told nothing."""
        self.seconds_until_end = self._waits.until_end()
        waiting = self._scheduler.waiting
        if any(sequence.queue_position != position for position, sequence in enumerate(waiting)):
            waits = self._waits.until_start()
            for position, sequence in enumerate(waiting):
                self._collector.announce(sequence, position, waits.get(sequence))

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence begin. Returns False if there is no room for its KV."""
        if not self._has_room_for(sequence) and not self._clear_room_for(sequence):
            return False
        is_new = sequence.admitted is None
        num_tokens = num_reserved(sequence, self._context_length)
        try:
            place = self._cache.acquire(
                sequence.prompt_ids,
                sequence.cache_identity,
                num_tokens,
                sequence.num_first,
                sequence.audience,
                is_new=is_new,
            )
        except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
            self._collector.fail(sequence, error)
            return True
        if place is None:
            return False
        try:
            if is_new:
                self._collector.begin(sequence)
        except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
            self._cache.release(place.slot)
            self._collector.fail(sequence, error)
            return True
        self._make_place()
        sequence.slot = place.slot
        sequence.num_read = place.num_past
        now = self._clock()
        if is_new:
            sequence.admitted = now
            sequence.num_cached = place.num_cached
        else:
            # What was cached for it stays what it was at first, as what it is charged: this is no further use.
            sequence.resume(now)
        self._batch.hold(sequence)
        self._scheduler.start(sequence, len(sequence.prompt_ids) - place.num_past)
        return True

    def _has_room_for(self, sequence: Sequence, without: Collection[Sequence] = ()) -> bool:
        """Whether there is room for a sequence's KV, once some others have given theirs up."""
        is_alone = not self._scheduler.running and not self._scheduler.paused
        return self._cache.has_room_for(
            num_reserved(sequence, self._context_length),
            len(sequence.prompt_ids),
            num_spare=num_spare(sequence, self._context_length, is_alone=is_alone),
            without={other.slot for other in without},
        )

    def _clear_room_for(self, sequence: Sequence) -> bool:
        """Put less urgent ones back, if that makes room enough: no more of them than that takes.

        All that they had can be had again, bit for bit: prompts are read once more, as far as they are not cached, and
        the tokens of answers are run one after the other as they were.
        """
        chosen: list[Sequence] = []
        for other in self._scheduler.who_gives_way(sequence):
            chosen.append(other)
            if self._has_room_for(sequence, chosen):
                break
        else:
            return False
        for other in chosen[::-1]:
            rest = [each for each in chosen if each is not other]
            if self._has_room_for(sequence, rest):
                chosen = rest
        for other in chosen:
            self._put_back(other)
        return True

    def _put_back(self, sequence: Sequence) -> None:
        self._batch.release(sequence)
        self._scheduler.put_back(sequence)
        num_found = self._cache.num_found(sequence.prompt_ids, sequence.cache_identity, sequence.audience)
        sequence.lose_kv(num_found, self._clock())
        sequence.queue_position = None

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
