"""How many tokens of a prompt one run takes: as many as those beside it, or those who may come, can wait for.

Larger runs are faster. Knows no runner, only the pace of the last runs. Called by `engine`.
"""

from collections.abc import Iterable, Sized
from typing import Final

from hearthd.priority import Priority
from hearthd.scheduling.pace import Pace
from hearthd.sequences.sequence import Sequence

__all__ = ["DECODE_RUNS_BETWEEN", "ChunkSizes"]

# What a run of a prompt may take where no answer waits for it: an equal's is begun that soon, and the watchdog is fed.
_SOLO_SECONDS: Final = 1.0
# Tokens of a more urgent answer for each run of a prompt beside it: one gap in 25 is a long one. A few tokens of the
# prompt in every gap would make the whole answer three times slower: 16 take as long as two of an answer.
DECODE_RUNS_BETWEEN: Final = 25
# The runner keeps what belongs to a run's size ready for multiples of this. Fewer tokens are hardly faster.
_STEP: Final = 16


class ChunkSizes:
    """Chooses the size of each run."""

    def __init__(self, pace: Pace, *, beside: int, alone: int, max_stall_seconds: float) -> None:
        """beside: the most tokens of a run while answers are written. alone: the same while nobody waits for it.

        max_stall_seconds: what a run may take while answers are written.
        """
        self._pace = pace
        self.beside = beside
        self._alone = alone
        self._max_stall_seconds = max_stall_seconds
        # Decode runs before the last run of a prompt.
        self._num_decode_runs = -DECODE_RUNS_BETWEEN
        self.is_long = False
        """Whether the last choice is more than answers would wait for: a run to be stopped for who is more urgent."""

    def must_wait(self, prompt: Sequence, answers: Iterable[Sequence]) -> bool:
        """Whether a prompt is left alone in this step, for more urgent answers. answers: those beside it."""
        if not any(answer.priority < prompt.priority for answer in answers):
            return False
        return self._pace.num_decode_runs - self._num_decode_runs < DECODE_RUNS_BETWEEN

    def choose(self, prompt: Sequence, answers: Sized, *, has_others: bool = False) -> int:
        """Return the most tokens of the prompt's next run.

        answers: those that wait for it. has_others: so does another model, whose answers are not known here.
        """
        self._num_decode_runs = self._pace.num_decode_runs
        self.is_long = False
        slowest = self._pace.slowest_prompt_seconds
        if slowest is None:
            return self.beside
        is_awaited = bool(answers) or has_others
        most = self.beside if is_awaited else self._alone
        short = _fitting(self._max_stall_seconds, slowest, most)
        # Who is more urgent may come at any moment, and nobody waits for what is done in the background. A prompt whose
        # long run was stopped would be stopped for the next one, too, and never come to its end.
        if is_awaited or prompt.priority is Priority.BACKGROUND or prompt.was_stopped:
            return short
        size = _fitting(_SOLO_SECONDS, slowest, most)
        self.is_long = size > short
        return size


def _fitting(seconds: float, slowest: float, most: int) -> int:
    """Return how many tokens take so long. slowest: seconds of one."""
    in_time = int(min(seconds / max(slowest, 1e-9), most))
    return most if in_time == most else max(in_time // _STEP * _STEP, min(_STEP, most))
