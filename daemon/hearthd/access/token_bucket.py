"""A rate as a token bucket: so many at once, and then as many in each minute.

Time comes from whoever asks, by a monotonic clock. The level may fall below zero: what is charged afterwards (the
tokens of an answer) is owed, and waited for. Knows no caller. Used by `metering`.
"""

__all__ = ["TokenBucket"]


class TokenBucket:
    """Full at the start. All times are seconds of one monotonic clock."""

    def __init__(self, per_minute: int, now: float) -> None:
        """per_minute: at least 1; what the bucket holds, and what runs into it in a minute."""
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def seconds_until(self, amount: float, now: float) -> float:
        """Return how long it takes until the bucket holds `amount`, which must not exceed `per_minute`; 0: it does."""
        self._fill(now)
        return max(amount - self._level, 0.0) * 60 / self.per_minute

    def take(self, amount: float, now: float) -> None:
        """Take something out, whether or not it is there."""
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        self._level = min(self._level + (now - self._at) * self.per_minute / 60, float(self.per_minute))
        self._at = now
