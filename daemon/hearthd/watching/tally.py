"""What `hearth status` shows of the past: refused calls since the start, and how fast the last answers came.

An observer of `outcomes`. Knows no gRPC. Made by `observation`, read by `services.status`.
"""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hearthd.watching.outcomes import ChatEnd, Refusal

__all__ = ["Speeds", "Tally"]

_MAX_ANSWERS: Final = 64
_MAX_AGE_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of the answers that are remembered. All 0 if there are none."""

    num_answers: int = 0
    median_time_to_first_token: float = 0.0
    """Seconds, from arrival."""
    worst_time_to_first_token: float = 0.0
    median_tokens_per_second: float = 0.0
    """Of one answer from its first token to its last; answers of a single token are left out."""


@dataclass(frozen=True, slots=True)
class _Answer:
    ended: float
    time_to_first_token: float
    tokens_per_second: float | None


class Tally:
    """Counts refusals, and remembers the answers of the last minutes. Of the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._answers: deque[_Answer] = deque(maxlen=_MAX_ANSWERS)
        self.refused: Counter[Refusal] = Counter()
        """Since the start."""

    def chat_ended(self, end: ChatEnd) -> None:
        """Remember an answer that has a token."""
        finished = end.finished
        if finished is None or not finished.completion_tokens:
            return
        num_decoded = finished.completion_tokens - 1
        rate = num_decoded / finished.decode_seconds if num_decoded and finished.decode_seconds > 0 else None
        self._answers.append(_Answer(self._clock(), finished.time_to_first_token_seconds, rate))

    def call_refused(self, refusal: Refusal) -> None:
        """Count it."""
        self.refused[refusal] += 1

    def speeds(self) -> Speeds:
        """Sum up."""
        oldest = self._clock() - _MAX_AGE_SECONDS
        while self._answers and self._answers[0].ended < oldest:
            self._answers.popleft()
        if not self._answers:
            return Speeds()
        first = [answer.time_to_first_token for answer in self._answers]
        rates = [answer.tokens_per_second for answer in self._answers if answer.tokens_per_second is not None]
        return Speeds(
            len(self._answers), statistics.median(first), max(first), statistics.median(rates) if rates else 0.0
        )
