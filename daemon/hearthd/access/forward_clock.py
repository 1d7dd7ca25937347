"""The date as far as rights depend on it: it never goes back while the daemon runs.

Most boards have no clock battery, and whoever can set the clock back must not bring an expired token back to life. So
what counts is the latest date that was seen, and the time that has passed since by the monotonic clock. A clock that
is set forward is followed at once: tokens then end early, and stay ended, when it is set right again, until the daemon
is started again. Knows no token and no quota. Used by `tokens` and `daily_usage`.
"""

import time
from collections.abc import Callable

__all__ = ["ForwardClock"]


def _seconds_since_boot() -> float:
    # Unlike CLOCK_MONOTONIC it counts the time that a machine was suspended.
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class ForwardClock:
    """Seconds since 1970, never less than it said before."""

    def __init__(
        self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = _seconds_since_boot
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._latest = wall()
        self._at = monotonic()

    def now(self) -> float:
        """Return the date: the wall clock's, or what has passed since it was last ahead."""
        at = self._monotonic()
        self._latest = max(self._wall(), self._latest + at - self._at)
        self._at = at
        return self._latest
