"""How fast this machine is with this model, and how long answers are: means of what was measured last.

Runs of a prompt of long ago say little of now: a board that was hot, or whose card stood still, is not for ever. Where
there are such of the last minute, no older ones count; and by older ones alone nobody is refused, who would be the next
measurement.

Knows no sequences. Written to by `engine`; `chunks` and `waits` read it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

__all__ = ["Pace"]

_NUM_RUNS: Final = 8
_NUM_ANSWERS: Final = 32
# Shorter runs say little of what a token costs: the weights are read in each of them.
_MIN_TOKENS: Final = 16
# What was measured before that may not hold any more.
_RECENT_SECONDS: Final = 60.0


class Pace:
    """The last runs, as seconds of a token. All are None before there were such."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # When they ended, their tokens, and their seconds.
        self._prompt_runs: deque[tuple[float, int, float]] = deque(maxlen=_NUM_RUNS)
        self._decode_runs: deque[float] = deque(maxlen=_NUM_RUNS)
        self.num_decode_runs = 0
        """Since the start."""
        self._answers: deque[int] = deque(maxlen=_NUM_ANSWERS)

    def note_prompt_run(self, num_tokens: int, seconds: float) -> None:
        """Remember how long a run over a prompt's tokens took."""
        if num_tokens >= _MIN_TOKENS or not self._prompt_runs:
            self._prompt_runs.append((self._clock(), num_tokens, seconds))

    def note_decode_run(self, seconds: float) -> None:
        """Remember how long a run took that gave each answer a token."""
        self._decode_runs.append(seconds)
        self.num_decode_runs += 1

    def note_answer(self, num_tokens: int) -> None:
        """Remember how long an answer was."""
        self._answers.append(num_tokens)

    @property
    def prompt_seconds(self) -> float | None:
        """Of a prompt's token."""
        runs = self._recent() or self._prompt_runs
        num_tokens = sum(number for _, number, _ in runs)
        return sum(seconds for _, _, seconds in runs) / num_tokens if num_tokens else None

    @property
    def slowest_prompt_seconds(self) -> float | None:
        """Of a prompt's token, in the slowest of those runs."""
        return max(_of_a_token(self._recent() or self._prompt_runs), default=None)

    @property
    def fastest_prompt_seconds(self) -> float | None:
        """Of a prompt's token, in the fastest run of the last minute; None if there was none."""
        return min(_of_a_token(self._recent()), default=None)

    @property
    def decode_seconds(self) -> float | None:
        """Of an answer's token, whatever the number of answers beside it."""
        return sum(self._decode_runs) / len(self._decode_runs) if self._decode_runs else None

    def is_longest(self, num_written: int) -> bool:
        """Whether no answer of late was longer."""
        return all(number <= num_written for number in self._answers)

    def tokens_left(self, num_written: int) -> float | None:
        """Return what answers that had so many tokens still had before them, on an average.

        One that is longer than all of late is taken for half done, as lasts what has lasted.
        """
        if not self._answers:
            return None
        left = [number - num_written for number in self._answers if number > num_written]
        return sum(left) / len(left) if left else float(max(num_written, 1))

    def _recent(self) -> list[tuple[float, int, float]]:
        since = self._clock() - _RECENT_SECONDS
        return [run for run in self._prompt_runs if run[0] >= since]


def _of_a_token(runs: Iterable[tuple[float, int, float]]) -> list[float]:
    return [seconds / number for _, number, seconds in runs]
