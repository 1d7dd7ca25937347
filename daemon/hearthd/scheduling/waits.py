"""When those who wait will begin, as far as the pace of the last runs and the length of the last answers tell.

An estimate of when there is a place, and room for the KV: it goes on as if nobody more urgent came, and every answer
were as long as those of late. Nobody is refused because answers that run may last: for that, each that is longer than
all of late ends at once. Knows how much KV there may be, and none of it. Called by `engine` and `placing`.
"""

import heapq
from dataclasses import dataclass

from hearthd.errors import DeadlineTooShortError
from hearthd.kv.budget import KVBudget
from hearthd.priority import Priority
from hearthd.scheduling.demand import num_reserved, num_spare
from hearthd.scheduling.pace import Pace
from hearthd.scheduling.scheduler import Scheduler
from hearthd.sequences.sequence import Sequence, SequenceState

__all__ = ["Waits"]


class Waits:
    """Estimates from what the scheduler holds at this moment."""

    def __init__(self, scheduler: Scheduler, pace: Pace, budget: KVBudget, context_length: int) -> None:
        self._scheduler = scheduler
        self._pace = pace
        self._budget = budget
        self._context_length = context_length

    def until_end(self) -> float | None:
        """Return the seconds until the first of those that run has ended; None without an estimate."""
        left = [self._seconds_left(sequence) for sequence in self._scheduler.running]
        known = [seconds for seconds in left if seconds is not None]
        return min(known) if known else None

    def until_start(self, *, at_best: bool = False) -> dict[Sequence, float]:
        """Return the seconds until each of those in line begins, or goes on; those without an estimate are missing.

        at_best: if answers end at once that are longer than all of late.
        """
        forecast = _Forecast(self._scheduler.num_places, self._budget)
        line = self._scheduler.in_line()
        waits: dict[Sequence, float] = {}
        for priority in Priority:
            # Only now: to whoever is more urgent they give way, with their memory.
            for sequence in self._scheduler.paused:
                if sequence.priority is priority:
                    forecast.hold(self._stay(sequence, at_best))
            for sequence in self._scheduler.running:
                if sequence.priority is priority:
                    forecast.hold(self._stay(sequence, at_best))
                    forecast.start(self._stay(sequence, at_best), 0.0)
            for sequence in line:
                if sequence.priority is priority:
                    stay, is_paused = self._stay(sequence, at_best), sequence.state is SequenceState.PAUSED
                    spare = num_spare(sequence, self._context_length, is_alone=not forecast.num_held)
                    if not forecast.reach(None if is_paused else stay, self._budget.blocks(spare)):
                        return waits
                    waits[sequence] = forecast.now
                    if not is_paused:
                        forecast.hold(stay)
                    forecast.start(stay, forecast.now)
        return waits

    def check_deadline(self, sequence: Sequence, now: float) -> None:
        """Raise DeadlineTooShortError if a sequence that waits would not begin its answer before its deadline.

        Its prompt is judged by the fastest run of late; where there was none and nobody is before it, it is tried: else
        an idle machine that was slow once would never be found to be fast again.
        """
        if sequence.deadline is None:
            return
        wait, pace = self.until_start(at_best=True).get(sequence, 0.0), self._pace.fastest_prompt_seconds
        if pace is None and wait > 0:
            pace = self._pace.prompt_seconds
        if pace is None:
            return
        num_unread = len(sequence.prompt_ids) - sequence.num_read
        prefill = num_unread * pace
        left = sequence.deadline - now
        if wait + prefill > left:
            raise DeadlineTooShortError(
                f"the answer would begin in about {wait + prefill:.1f} s ({wait:.1f} s in the queue, {prefill:.1f} s "
                f"for {num_unread} tokens of the prompt), and the deadline is in {max(left, 0.0):.1f} s: give more "
                "time, or send a shorter or more urgent request"
            )

    def _seconds_left(self, sequence: Sequence, at_best: bool = False) -> float | None:
        """Of the run itself, from now or from its beginning."""
        num_written = len(sequence.output_ids)
        prompt, step, left = self._pace.prompt_seconds, self._pace.decode_seconds, self._pace.tokens_left(num_written)
        if prompt is None or step is None or left is None:
            return None
        if at_best and self._pace.is_longest(num_written):
            left = 1.0
        num_unread = len(sequence.prompt_ids) - sequence.num_read
        num_unwritten = max(min(left, sequence.params.max_tokens - num_written), 1)
        return num_unread * prompt + (sequence.num_lost + num_unwritten) * step

    def _stay(self, sequence: Sequence, at_best: bool) -> "_Stay":
        pace = self._pace.prompt_seconds
        num_prompt, num_unread = len(sequence.prompt_ids), len(sequence.prompt_ids) - sequence.num_read
        return _Stay(
            num_blocks=self._budget.blocks(num_reserved(sequence, self._context_length)),
            num_reading=num_prompt if num_unread else 0,
            seconds_unread=None if pace is None else num_unread * pace,
            seconds_left=self._seconds_left(sequence, at_best),
        )


@dataclass(frozen=True, slots=True)
class _Stay:
    """What a sequence takes, and how long."""

    num_blocks: int
    num_reading: int
    """Tokens of its prompt, while that is being read."""
    seconds_unread: float | None
    seconds_left: float | None


class _Forecast:
    """What is taken at a moment that lies ahead: places, and memory. Goes on in time, and never back."""

    def __init__(self, num_places: int, budget: KVBudget) -> None:
        self._num_places = num_places
        self._budget = budget
        # The end of a prompt's reading or of a sequence: when, in which order they were noted, whose, whether it ends.
        self._events: list[tuple[float, int, _Stay, bool]] = []
        self._num_events = 0
        self._num_running = 0
        self._num_blocks = 0
        self._reading: list[int] = []
        self.now = 0.0
        self.num_held = 0
        """Sequences that have memory."""

    def hold(self, stay: _Stay) -> None:
        """Note who has memory."""
        self.num_held += 1
        self._num_blocks += stay.num_blocks
        if stay.num_reading:
            self._reading.append(stay.num_reading)

    def start(self, stay: _Stay, at: float) -> None:
        """Note who has a place since some time, or from then on. What nobody knows the end of does not end here."""
        self._num_running += 1
        if stay.num_reading and stay.seconds_unread is not None:
            self._note(at + stay.seconds_unread, stay, is_end=False)
        if stay.seconds_left is not None:
            self._note(at + stay.seconds_left, stay, is_end=True)

    def reach(self, stay: _Stay | None, num_spare: int) -> bool:
        """Go on to when there is a place, and memory for a stay if it has none yet. Returns False if nobody knows when.

        num_spare: blocks that have to be left.
        """
        while (self._events and self._events[0][0] <= self.now) or not self._has_room(stay, num_spare):
            if not self._events:
                return False
            at, _, ending, is_end = heapq.heappop(self._events)
            self.now = max(self.now, at)
            if is_end:
                self.num_held -= 1
                self._num_running -= 1
                self._num_blocks -= ending.num_blocks
            else:
                self._reading.remove(ending.num_reading)
        return True

    def _note(self, at: float, stay: _Stay, *, is_end: bool) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at, self._num_events, stay, is_end))

    def _has_room(self, stay: _Stay | None, num_spare: int) -> bool:
        if self._num_running >= self._num_places:
            return False
        if stay is None:
            return True
        num_prompt_blocks = self._budget.prompt_blocks(max([stay.num_reading, *self._reading]))
        return self._num_blocks + stay.num_blocks + num_spare + num_prompt_blocks <= self._budget.num_blocks
