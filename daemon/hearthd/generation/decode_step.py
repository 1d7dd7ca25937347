"""Writing answers: one run of the model gives each sequence of a batch its next token, a single one perhaps several.

Knows no order of service. Called by `engine`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hearthd.drafts.run_costs import LENGTHS
from hearthd.generation.collector import Collector
from hearthd.generation.drafting import Drafting
from hearthd.kv.kv_cache import KVCache, Runner, RunTerminated
from hearthd.scheduling.pace import Pace
from hearthd.scheduling.scheduler import Scheduler
from hearthd.sequences.sequence import Sequence, SequenceState

__all__ = ["DecodeStep"]


class DecodeStep:
    """The parts of the engine that such a run needs."""

    def __init__(
        self,
        runner: Runner,
        cache: KVCache,
        scheduler: Scheduler,
        collector: Collector,
        pace: Pace,
        drafting: Drafting | None,
        clock: Callable[[], float],
    ) -> None:
        """drafting: guesses further tokens where that is faster; only with `Runner.can_verify`."""
        self._runner = runner
        self._cache = cache
        self._scheduler = scheduler
        self._collector = collector
        self._pace = pace
        self._drafting = drafting
        self._clock = clock

    def run(self, batch: list[Sequence]) -> None:
        """Run the last token of the sequences that decoded before this step, in one batch, in the order of their slots.

        If that is a single one, what may follow can go along. Of one whose KV went to a more urgent one the tokens are
        run again that it had written, as they were at first: so their KV is the same, bit for bit.
        Raises RunTerminated; nothing has happened then.
        """
        if not batch:
            return
        is_behind = batch[0].num_lost > 0
        draft = self._draft(batch)
        lengths = [self._cache.num_tokens(sequence.slot) for sequence in batch]
        started = self._clock()
        try:
            if draft:
                token_ids = np.array([batch[0].next_id, *draft], np.int64)
                logits = self._runner.verify(token_ids, batch[0].slot, lengths[0])
            else:
                last_ids = np.array([[sequence.next_id] for sequence in batch], np.int64)
                logits = self._runner.forward(last_ids, batch[0].slot, np.array(lengths, np.int32))
        except RunTerminated:
            raise
        except Exception as error:  # noqa: BLE001 - of these sequences; the engine goes on
            for sequence in batch:
                self._cache.forget(sequence.slot)
            for sequence in batch:
                self._collector.fail(sequence, error)
            return
        now = self._clock()
        self._pace.note_decode_run(now - started)
        if draft:
            num_taken = self._take_drafted(batch[0], draft, logits, now)
        else:
            num_taken = 1
            self._take(batch, logits, now)
        if self._drafting is not None and not is_behind:
            self._drafting.note(batch, len(draft), num_taken, now - started)

    def _draft(self, batch: list[Sequence]) -> list[int]:
        """Return what goes along with the next token of a single sequence: what follows, or may follow."""
        if self._drafting is None or len(batch) != 1:
            return []
        (sequence,) = batch
        if sequence.num_lost:
            # No other lengths than drafts have: those were tried.
            length = max((length for length in LENGTHS if length <= sequence.num_lost), default=1)
            first = len(sequence.output_ids) - sequence.num_lost
            return sequence.output_ids[first : first + length - 1]
        return self._drafting.draft(batch)

    def _take(self, batch: list[Sequence], logits: NDArray[np.float32], now: float) -> None:
        """Choose each one's next token. logits: (B, V)."""
        are_last = [self._note_run(sequence, now) for sequence in batch]
        for sequence, row, is_last in zip(batch, logits, are_last, strict=True):
            if is_last:
                self._collector.take_token(sequence, row, now)

    def _take_drafted(self, sequence: Sequence, draft: list[int], logits: NDArray[np.float32], now: float) -> int:
        """Choose token after token as in as many steps, as long as each is the one that was run. logits: (S, V).

        The KV of what comes behind that stays where it is, and counts as not there. Returns the number of tokens.
        """
        if sequence.num_lost:
            for _ in logits:
                self._note_run(sequence, now)
            return len(logits)
        num_before = sequence.num_accepted
        sequence.num_drafted += len(draft)
        for row, drafted in zip(logits, [*draft, None], strict=True):
            self._note_run(sequence, now)
            self._collector.take_token(sequence, row, now)
            if sequence.state is not SequenceState.DECODING or sequence.output_ids[-1] != drafted:
                break
            sequence.num_accepted += 1
        return sequence.num_accepted - num_before + 1

    def _note_run(self, sequence: Sequence, now: float) -> bool:
        """Note that the KV of a sequence's next token is written: always one at a time, whatever a run had.

        Returns whether that was its last token, and another one is to be chosen.
        """
        self._cache.extend(sequence.slot, [sequence.next_id])
        if sequence.num_lost:
            sequence.note_run_again(now)
            return False
        self._scheduler.note_written(sequence, 1)
        return True
