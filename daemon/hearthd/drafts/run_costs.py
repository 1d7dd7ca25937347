"""What a run of several tokens costs, in steps of one: measured on this machine, as it is at the moment.

Knows no tokens. Called by `drafter`, and by `engine` and `exactness` with what they have measured.
"""

from collections import deque
from statistics import median
from typing import Final

__all__ = ["LENGTHS", "RunCosts"]

# Tokens of a run, the step's own one among them: few, since each has buffers of its own. With 12 a run took 8 MB more
# of memory (default model), and brought 6 % at the very best.
LENGTHS: Final = (2, 3, 4, 6, 8)
# The middle of the last runs: what a busy machine adds to some of them does not count.
_NUM_REMEMBERED: Final = 7
# Unmeasured, a token more costs so much of a step.
_PER_TOKEN: Final = 0.1
# Runs after which a measurement is too old to be compared with.
_STEP_AGE: Final = 64
_AGE: Final = 1024


class RunCosts:
    """Seconds of the last runs, by length."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._noted_at: dict[int, int] = {}
        self._num_runs = 0

    @property
    def is_step_known(self) -> bool:
        """Whether a step was measured lately: without, no draft can be judged."""
        return 1 in self._noted_at and self._num_runs - self._noted_at[1] < _STEP_AGE

    def note(self, length: int, seconds: float) -> None:
        """Note what a run took."""
        if self._num_runs - self._noted_at.get(length, 0) > _AGE:
            self._seconds.pop(length, None)
        self._seconds.setdefault(length, deque(maxlen=_NUM_REMEMBERED)).append(seconds)
        self._num_runs += 1
        self._noted_at[length] = self._num_runs

    def in_steps(self, length: int) -> float:
        """Return what a run of so many tokens costs, 1 for a step."""
        is_old = self._num_runs - self._noted_at.get(length, -_AGE) >= _AGE
        step = median(self._seconds.get(1, (0.0,)))
        if is_old or not step:
            return 1 + _PER_TOKEN * (length - 1)
        return max(median(self._seconds[length]) / step, 1.0)
