"""How many tokens of a prompt one run takes: as many as those beside it can wait for.

Knows no prompt and no runner, only how long the last runs took. Called by `engine`.
"""

from typing import Final

__all__ = ["ChunkSizes"]

# What a run of a prompt may take where no answer waits for it: a cancelled prompt is dropped and the next one is begun
# that soon, and the watchdog is fed.
_SOLO_SECONDS: Final = 1.0
# The runner keeps what belongs to a run's size ready for multiples of this.
_STEP: Final = 16


class ChunkSizes:
    """Chooses from what was measured. Larger runs are faster, as long as nobody waits for them."""

    def __init__(self, beside: int, alone: int) -> None:
        """beside: tokens of a run while answers are written. alone: the most of one while nobody waits for it."""
        self.beside = beside
        self._alone = alone
        # Of the last run; None before the first.
        self._seconds_per_token: float | None = None

    def note(self, num_tokens: int, seconds: float) -> None:
        """Remember how long a run took."""
        self._seconds_per_token = seconds / num_tokens

    def choose(self, *, is_alone: bool) -> int:
        """Return the tokens of the next run. is_alone: nobody decodes beside it."""
        if not is_alone or self._seconds_per_token is None:
            return self.beside
        in_time = int(min(_SOLO_SECONDS / max(self._seconds_per_token, 1e-9), self._alone))
        return max(self.beside, in_time // _STEP * _STEP)
