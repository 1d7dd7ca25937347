"""Reading prompts: one run of the model takes a chunk of one prompt, the most urgent one's that is ready.

Knows no order of service. Called by `engine`.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hearthd.generation.batch import Batch
from hearthd.generation.collector import Collector
from hearthd.kv.kv_cache import KVCache, Runner, RunTerminated
from hearthd.priority import Priority
from hearthd.scheduling.chunks import ChunkSizes
from hearthd.scheduling.pace import Pace
from hearthd.scheduling.scheduler import Scheduler
from hearthd.sequences.sequence import Sequence, SequenceState

__all__ = ["PromptStep"]

# Where only the disk is waited for, somebody who comes or goes is heard that soon.
_DISK_SECONDS: Final = 0.02


class PromptStep:
    """The parts of the engine that such a run needs."""

    def __init__(
        self,
        runner: Runner,
        cache: KVCache,
        scheduler: Scheduler,
        batch: Batch,
        collector: Collector,
        pace: Pace,
        chunks: ChunkSizes,
        clock: Callable[[], float],
        has_others: Callable[[Priority], bool],
    ) -> None:
        """has_others: whether anybody that urgent, or more, waits for another model."""
        self._runner = runner
        self._cache = cache
        self._scheduler = scheduler
        self._batch = batch
        self._collector = collector
        self._pace = pace
        self._chunks = chunks
        self._clock = clock
        self._has_others = has_others
        self.reading: Sequence | None = None
        """Whose prompt is being run at this moment. For any thread to read."""

    def run(self) -> None:
        """Run the next chunk, if there is one to run. Raises RunTerminated; nothing has happened then."""
        sequence = self._next_prompt()
        if sequence is None or self._chunks.must_wait(sequence, self._batch):
            return
        done = self._cache.num_tokens(sequence.slot)
        left = len(sequence.prompt_ids) - done
        most = self._chunks.choose(sequence, self._batch, has_others=self._has_others(sequence.priority))
        # A rest that is too small for a run of its own goes along.
        size = left if left - most < self._runner.min_run else most
        chunk = sequence.prompt_ids[done : done + size]
        self.reading = sequence
        try:
            started = self._clock()
            logits = self._runner.forward(np.array([chunk], np.int64), sequence.slot, np.array([done], np.int32))
            self._pace.note_prompt_run(len(chunk), self._clock() - started)
        except RunTerminated:
            sequence.was_stopped |= self._chunks.is_long
            raise
        except Exception as error:  # noqa: BLE001 - of this sequence alone; the others go on
            self._cache.forget(sequence.slot)
            self._collector.fail(sequence, error)
            return
        finally:
            self.reading = None
        self._cache.extend(sequence.slot, chunk)
        sequence.num_read = done + len(chunk)
        if sequence.num_read == len(sequence.prompt_ids):
            self._begin_answer(sequence, logits[0], self._clock())

    def _begin_answer(self, sequence: Sequence, logits: NDArray[np.float32], now: float) -> None:
        """Choose an answer's first token, or go on with one that has it. logits: float32 (V,)."""
        sequence.state = SequenceState.DECODING
        self._batch.join(sequence)
        if sequence.output_ids:
            sequence.resume(now)
        else:
            sequence.prefilled = now
            self._collector.take_token(sequence, logits, now)

    def stops_for(self, priority: Priority) -> bool:
        """Whether a long run of a less urgent prompt goes on at this moment. For any thread to ask."""
        reading = self.reading
        return reading is not None and self._chunks.is_long and priority < reading.priority

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
        if num_fetched and not sequence.was_put_back:
            sequence.num_from_disk = num_fetched - sequence.num_cached
            sequence.num_cached = num_fetched
        return num_fetched is not None
