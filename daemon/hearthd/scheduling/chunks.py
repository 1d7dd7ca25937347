"""How many tokens of a prompt one run takes: as many as those beside it, or those who may come, can wait for.

Larger runs are faster. Knows no runner, only the pace of the last runs. Called by `engine`.
"""

from collections.abc import Iterable, Sized
from typing import Final

from hearthd.priority import Priority
from hearthd.scheduling.pace import Pace
from hearthd.sequences.sequence import Sequence

__all__ = ["ChunkSizes"]

# What a run of a prompt may take where no answer waits for it: a cancelled prompt is dropped and the next one is begun
# that soon, and the watchdog is fed.
_SOLO_SECONDS: Final = 1.0
# Tokens of a more urgent answer for each run of a prompt beside it: one gap in 25 is a long one. A few tokens of the
# prompt in every gap would make the whole answer three times slower: 16 take as long as two of an answer.
_DECODE_RUNS_BETWEEN: Final = 25
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
        self._num_decode_runs = -_DECODE_RUNS_BETWEEN

    def must_wait(self, prompt: Sequence, answers: Iterable[Sequence]) -> bool:
        """Whether a prompt is left alone in this step, for more urgent answers. answers: those beside it."""
        if not any(answer.priority < prompt.priority for answer in answers):
            return False
        return self._pace.num_decode_runs - self._num_decode_runs < _DECODE_RUNS_BETWEEN

    def choose(self, prompt: Sequence, answers: Sized, *, has_others: bool = False) -> int:
        """Return the most tokens of the prompt's next run.

        answers: those that wait for it. has_others: so does another model, whose answers are not known here.
        """
        self._num_decode_runs = self._pace.num_decode_runs
        slowest = self._pace.slowest_prompt_seconds
        if slowest is None:
            return self.beside
        is_awaited = bool(answers) or has_others
        most = self.beside if is_awaited else self._alone
        in_time = int(min(self._seconds(prompt, is_awaited=is_awaited) / max(slowest, 1e-9), most))
        return most if in_time == most else max(in_time // _STEP * _STEP, min(_STEP, most))

    def _seconds(self, prompt: Sequence, *, is_awaited: bool) -> float:
        # Who is more urgent may come at any moment, and nobody waits for what is done in the background.
        is_patient = not is_awaited and prompt.priority is not Priority.BACKGROUND
        return _SOLO_SECONDS if is_patient else self._max_stall_seconds
