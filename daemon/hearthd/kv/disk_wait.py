"""How long a thread waits for the disk: one that hangs cannot say so itself.

Begun and ended by the thread that waits, or before it starts; read by any. Knows no files. Used by `loading` and
`prefix_store`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

__all__ = ["DiskWait"]


class DiskWait:
    """The time that one thread spends on a disk."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # One value, as other threads read it: seconds before the wait that lasts, and when that began.
        self._spent: tuple[float, float | None] = (0.0, None)

    @property
    def lasting(self) -> float:
        """Seconds that the thread has now been waiting; 0 if it is not."""
        _, since = self._spent
        return 0.0 if since is None else self._clock() - since

    @property
    def total(self) -> float:
        """Seconds of all waits, that which lasts among them."""
        before, since = self._spent
        return before if since is None else before + self._clock() - since

    def begin(self) -> None:
        """Note that the thread turns to the disk; if it has already, that a wait ends and another begins."""
        self._spent = (self.total, self._clock())

    def end(self) -> None:
        """Note that the thread has what it wanted."""
        self._spent = (self.total, None)

    def reading(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Hand on what comes from the disk."""
        self.begin()
        for chunk in chunks:
            self.end()
            yield chunk
            self.begin()
        self.end()

    def writing(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Hand on what goes to the disk, which takes each before it asks for the next."""
        self.end()
        for chunk in chunks:
            self.begin()
            yield chunk
            self.end()
        self.begin()
