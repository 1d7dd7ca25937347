"""When those who wait will begin, as far as the pace of the last runs and the length of the last answers tell.

An estimate: it goes on as if nobody more urgent came, and every answer had the mean length. Knows no KV. Called by
`engine`.
"""

from hearthd.errors import DeadlineTooShortError
from hearthd.scheduling.pace import Pace
from hearthd.scheduling.scheduler import Scheduler
from hearthd.sequences.sequence import Sequence

__all__ = ["Waits"]


class Waits:
    """Estimates from what the scheduler holds at this moment."""

    def __init__(self, scheduler: Scheduler, pace: Pace) -> None:
        self._scheduler = scheduler
        self._pace = pace

    def until_end(self) -> float | None:
        """Return the seconds until the first of those that run has ended; None without an estimate."""
        left = [self._seconds_left(sequence) for sequence in self._scheduler.running]
        known = [seconds for seconds in left if seconds is not None]
        return min(known) if known else None

    def until_start(self) -> dict[Sequence, float]:
        """Return the seconds until each of those in line begins, or goes on; those without an estimate are missing."""
        ends = [(sequence.priority, self._seconds_left(sequence)) for sequence in self._scheduler.running]
        waits: dict[Sequence, float] = {}
        for sequence in self._scheduler.in_line():
            # Less urgent ones make room. Of the others, so many have to end that a place is free.
            ahead = [seconds for priority, seconds in ends if priority <= sequence.priority]
            num_to_end = len(ahead) - self._scheduler.num_places + 1
            wait: float | None = 0.0
            if num_to_end > 0:
                known = sorted(seconds for seconds in ahead if seconds is not None)
                wait = known[num_to_end - 1] if len(known) == len(ahead) else None
            if wait is not None:
                waits[sequence] = wait
            own = self._seconds_left(sequence)
            ends.append((sequence.priority, None if wait is None or own is None else wait + own))
        return waits

    def check_deadline(self, sequence: Sequence, now: float) -> None:
        """Raise DeadlineTooShortError if a sequence that waits would not begin its answer before its deadline."""
        pace = self._pace.prompt_seconds
        if sequence.deadline is None or pace is None:
            return
        num_unread = len(sequence.prompt_ids) - sequence.num_read
        wait, prefill = self.until_start().get(sequence, 0.0), num_unread * pace
        left = sequence.deadline - now
        if wait + prefill > left:
            raise DeadlineTooShortError(
                f"the answer would begin in about {wait + prefill:.1f} s ({wait:.1f} s in the queue, {prefill:.1f} s "
                f"for {num_unread} tokens of the prompt), and the deadline is in {max(left, 0.0):.1f} s: give more "
                "time, or send a shorter or more urgent request"
            )

    def _seconds_left(self, sequence: Sequence) -> float | None:
        """Of the run itself, from now or from its beginning."""
        prompt, step, length = self._pace.prompt_seconds, self._pace.decode_seconds, self._pace.answer_tokens
        if prompt is None or step is None or length is None:
            return None
        num_unread = len(sequence.prompt_ids) - sequence.num_read
        # One that is longer than the mean may end at any token.
        num_unwritten = max(min(length, sequence.params.max_tokens) - len(sequence.output_ids), 1)
        return num_unread * prompt + num_unwritten * step
