"""Whose turn it is: of all inference threads one runs its model at a time, in the order in which they asked.

Two models that ran at once would share the processor's cores and caches, and both take longer than one after the other.
A thread gives the baton back after each step and asks for it again, so that two busy models take turns, step by step.
Who is busy says so: the others then make their steps short, and leave what nobody waits for.

A thread that freezes with the baton holds up the others as well. It must: what waits answers no ping, and so the
watchdog finds out. Held by `worker`; knows no model.
"""

import threading
from collections import deque
from types import TracebackType

__all__ = ["Baton"]


class Baton:
    """A lock that is handed on in the order of asking. Not reentrant."""

    def __init__(self) -> None:
        self._books = threading.Lock()
        self._is_held = False
        # Each locked; unlocking one hands it the baton.
        self._waiting: deque[threading.Lock] = deque()
        self._busy: frozenset[object] = frozenset()

    @property
    def num_waiting(self) -> int:
        """Threads that wait for it now. For any thread to read."""
        return len(self._waiting)

    def note(self, thread: object, *, is_busy: bool) -> None:
        """Note whether somebody waits for what a thread does."""
        if is_busy != (thread in self._busy):
            with self._books:
                self._busy = self._busy ^ {thread}

    def has_others(self, thread: object) -> bool:
        """Whether somebody waits for what another thread does. For any thread to read."""
        return bool(self._busy - {thread})

    def __enter__(self) -> None:
        with self._books:
            if not self._is_held:
                self._is_held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        # Whoever had the baton leaves it held, and unlocks this.
        turn.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._books:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_held = False
