"""How long one call may go on, and when it may be tried again.

Knows neither gRPC nor how to wait: it is asked, and the client waits. Called by `Client`, `AsyncClient` and `_chat`.
"""

import logging
import math
import random
import time
from collections.abc import Callable

from hearth._errors import HearthError, QueueFullError, QuotaExceededError, UnavailableError

_logger = logging.getLogger("hearth")

_FIRST_DELAY = 0.05
_LONGEST_DELAY = 1.0
# Rates are of a minute. A quota of the day is for a person to know of, who may not want to wait until midnight.
_LONGEST_QUOTA_DELAY = 60.0


class Patience:
    """The deadline of one call and its further attempts.

    A daemon that is not there or still loads is tried again for `ready_timeout` seconds from the start, unless it is
    known that waiting does not help; a full queue, or a rate of which this minute is used up, `max_retries` times, each
    after the delay that the daemon asks for. Never beyond `timeout`.
    """

    def __init__(
        self,
        *,
        timeout: float,
        ready_timeout: float,
        max_retries: int,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        on_failure: Callable[[HearthError], None] = lambda _: None,
    ) -> None:
        """`on_failure` hears of each failed attempt."""
        self._clock = clock
        self._jitter = jitter
        self._on_failure = on_failure
        self._start = clock()
        self._timeout = timeout
        self._ready_timeout = ready_timeout
        self._retries_left = max_retries
        self._num_unavailable = 0

    def remaining(self) -> float | None:
        """Seconds that the next attempt may take; None if there is no limit."""
        # Over a century, gRPC's own arithmetic of time is no longer safe.
        left = self._start + self._timeout - self._clock()
        return None if left > 1e9 else max(left, 0.0)

    def delay_after(self, error: HearthError) -> float | None:
        """Seconds to wait before the next attempt; None if there is none and `error` stands."""
        self._on_failure(error)
        elapsed = self._clock() - self._start
        if isinstance(error, QueueFullError | QuotaExceededError):
            delay, limit = self._delay_of_limit(error), math.inf
        elif isinstance(error, UnavailableError):
            delay, limit = self._delay_of_unavailable(error), self._ready_timeout
        else:
            return None
        # An attempt that starts at the deadline could only end as DeadlineError, which says less than `error`.
        if delay is None or elapsed + delay > limit or elapsed + delay >= self._timeout:
            return None
        return delay

    def _delay_of_limit(self, error: QueueFullError | QuotaExceededError) -> float | None:
        if error.retry_after is None or not self._retries_left:
            return None
        if isinstance(error, QuotaExceededError) and error.retry_after > _LONGEST_QUOTA_DELAY:
            return None
        self._retries_left -= 1
        # Up to a tenth later than asked: all whom the daemon sent away at one moment do not come back at one moment.
        delay = error.retry_after * (1 + self._jitter() / 10)
        _logger.info("%s (trying again in %.1f s)", error, delay)
        return delay

    def _delay_of_unavailable(self, error: UnavailableError) -> float | None:
        if not error.is_transient:
            return None
        if self._num_unavailable == 0 and self._ready_timeout > 0:
            _logger.info("%s (waiting up to %g s)", error, self._ready_timeout)
        backoff: float = min(_FIRST_DELAY * 2.0 ** min(self._num_unavailable, 10), _LONGEST_DELAY)
        self._num_unavailable += 1
        return max(error.retry_after or 0.0, backoff * (0.5 + self._jitter() / 2))
