"""How many tokens of a prompt one run takes: as many as those beside it, or those who may come, can wait for.

Larger runs are faster. Knows no runner, only the pace of the last runs. Called by `engine`.
"""

from collections.abc import Collection
from typing import Final

from hearthd.scheduling.pace import Pace
from hearthd.scheduling.priority import Priority
from hearthd.sequence import Sequence

__all__ = ["ChunkSizes"]

# What a run of a prompt may take where no answer waits for it: a cancelled prompt is dropped and the next one is begun
# that soon, and the watchdog is fed.
_SOLO_SECONDS: Final = 1.0
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

    def choose(self, prompt: Sequence, answers: Collection[Sequence]) -> int:
        """Return the most tokens of the prompt's next run. answers: those that wait for it."""
        slowest = self._pace.slowest_prompt_seconds
        if slowest is None:
            return self.beside
        most = self.beside if answers else self._alone
        in_time = int(min(self._seconds(prompt, answers) / max(slowest, 1e-9), most))
        return most if in_time == most else max(in_time // _STEP * _STEP, min(_STEP, most))

    def _seconds(self, prompt: Sequence, answers: Collection[Sequence]) -> float:
        if not answers:
            # Who is more urgent may come at any moment, and nobody waits for what is done in the background.
            return self._max_stall_seconds if prompt.priority is Priority.BACKGROUND else _SOLO_SECONDS
        if any(answer.priority < prompt.priority for answer in answers):
            # More urgent answers come at half their speed at least.
            return min(self._max_stall_seconds, self._pace.decode_seconds or 0.0)
        return self._max_stall_seconds
