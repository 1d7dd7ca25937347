"""Whose turn it is: of all inference threads one runs its model at a time, the one with the most urgent request.

Two models that ran at once would share the processor's cores and caches, and both take longer than one after the other.
So a thread asks for the baton before each step, with the urgency of its most urgent request, and leaves it afterwards:

    next      the most urgent of those that stand in line; of equals, the one that asked first
    kept      for a more urgent one that is between two steps: it asks again in a moment, and nobody begins meanwhile
    passed    after so many turns of others a less urgent one gets its own, as a prompt does beside more urgent answers
    idle      what nobody waits for is done while nobody waits for anything
    in haste  who is more urgent than the one that has it says so: a long run is stopped in the middle

Nobody blocks here: who is not next goes on hearing what it is told, and is woken when its turn comes. So a thread that
waits answers pings, and one that freezes with the baton answers none, by which the watchdog finds out.

Books under a lock, for any thread; knows no model. Called by `inference_thread`.
"""

import threading
from typing import Final, Protocol

from hearthd.priority import Priority
from hearthd.scheduling.chunks import DECODE_RUNS_BETWEEN

__all__ = ["MAX_PASSED", "Baton", "Contender"]

# A step of a less urgent model beside a more urgent one's answers stalls these as a run of a prompt does beside them.
MAX_PASSED: Final = DECODE_RUNS_BETWEEN


class Contender(Protocol):
    """An inference thread. Both are called from other threads, and return at once."""

    def wake(self) -> None:
        """Let it ask again: its turn has come."""

    def make_way(self, priority: Priority) -> None:
        """Let it stop the run of this moment, if somebody so urgent need not wait for its end."""


class Baton:
    """Who has it, and who stands in line for it."""

    def __init__(self, max_passed: int = MAX_PASSED) -> None:
        """max_passed: turns of others after which it is one's own."""
        self._max_passed = max_passed
        self._books = threading.Lock()
        self._holder: Contender | None = None
        # In the order of asking, with the number of turns that others have had since, or were having.
        self._line: dict[Contender, int] = {}
        # Of all for which somebody waits, whether they have it, stand in line or are between two steps. Never changed
        # in place.
        self._urgencies: dict[Contender, Priority] = {}

    def ask(self, thread: Contender, urgency: Priority | None) -> bool:
        """Return whether a thread has the baton. If not, it stands in line now, and will be woken to ask again.

        urgency: of its most urgent request; None if nobody waits for what it would do.
        """
        with self._books:
            self._note(thread, urgency)
            if self._holder is not thread:
                # What nobody waits for can be passed for ever.
                num_passed = self._line.get(thread, int(self._holder is not None))
                self._line[thread] = 0 if urgency is None else num_passed
                self._hand_on(asking=thread)
            holder = self._holder
        if holder is thread:
            return True
        if holder is not None and urgency is not None:
            holder.make_way(urgency)
        return False

    def leave(self, thread: Contender, urgency: Priority | None = None) -> None:
        """Give the baton away, or the place in line. urgency: of what is left to do for the thread's next turns."""
        with self._books:
            self._note(thread, urgency)
            self._line.pop(thread, None)
            if self._holder is thread:
                self._holder = None
            self._hand_on()

    def has_others(self, thread: Contender, priority: Priority) -> bool:
        """Whether anybody who is that urgent, or more, waits for another thread. For any thread to ask."""
        return any(urgency <= priority for other, urgency in self._urgencies.items() if other is not thread)

    # With the lock.

    def _note(self, thread: Contender, urgency: Priority | None) -> None:
        if urgency is self._urgencies.get(thread):
            return
        urgencies = {other: each for other, each in self._urgencies.items() if other is not thread}
        self._urgencies = urgencies if urgency is None else {**urgencies, thread: urgency}

    def _hand_on(self, asking: Contender | None = None) -> None:
        """Give the baton to whose turn it is, if nobody has it."""
        thread = None if self._holder is not None else self._next()
        if thread is None:
            return
        self._holder = thread
        del self._line[thread]
        for other in self._line.keys() & self._urgencies.keys():
            self._line[other] += 1
        if thread is not asking:
            thread.wake()

    def _next(self) -> Contender | None:
        overdue = (thread for thread, num_passed in self._line.items() if num_passed >= self._max_passed)
        if (longest := next(overdue, None)) is not None:
            return longest
        best = min(self._line, key=self._rank, default=None)
        if best is None or any(urgency < self._rank(best) for urgency in self._urgencies.values()):
            return None
        return best

    def _rank(self, thread: Contender) -> int:
        return self._urgencies.get(thread, len(Priority))
