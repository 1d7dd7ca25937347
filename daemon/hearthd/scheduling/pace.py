"""How fast this machine is with this model, and how long answers are: means of what was measured last.

Knows no sequences. Written to by `engine`; `chunks` and `waits` read it.
"""

from collections import deque
from typing import Final

__all__ = ["Pace"]

_NUM_RUNS: Final = 8
_NUM_ANSWERS: Final = 32
# Shorter runs say little of what a token costs: the weights are read in each of them.
_MIN_TOKENS: Final = 16


class Pace:
    """The last runs, as seconds of a token. All are None before there were such."""

    def __init__(self) -> None:
        self._prompt_runs: deque[tuple[int, float]] = deque(maxlen=_NUM_RUNS)
        self._decode_runs: deque[float] = deque(maxlen=_NUM_RUNS)
        self.num_decode_runs = 0
        """Since the start."""
        self._answers: deque[int] = deque(maxlen=_NUM_ANSWERS)

    def note_prompt_run(self, num_tokens: int, seconds: float) -> None:
        """Remember how long a run over a prompt's tokens took."""
        if num_tokens >= _MIN_TOKENS or not self._prompt_runs:
            self._prompt_runs.append((num_tokens, seconds))

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
        num_tokens = sum(number for number, _ in self._prompt_runs)
        return sum(seconds for _, seconds in self._prompt_runs) / num_tokens if num_tokens else None

    @property
    def slowest_prompt_seconds(self) -> float | None:
        """Of a prompt's token, in the slowest of those runs."""
        return max((seconds / number for number, seconds in self._prompt_runs), default=None)

    @property
    def decode_seconds(self) -> float | None:
        """Of an answer's token, whatever the number of answers beside it."""
        return sum(self._decode_runs) / len(self._decode_runs) if self._decode_runs else None

    @property
    def answer_tokens(self) -> float | None:
        """Tokens of an answer."""
        return sum(self._answers) / len(self._answers) if self._answers else None
