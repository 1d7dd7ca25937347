"""Whose turn it is among requests of one priority: the account's that was served least, then the one that came first.

This is start-time fair queueing (Goyal, Vin and Cheng, 1996) by tokens served: an account that begins to wait starts
level with whoever began last, or with the least served of those that wait if that is less, however long it was away.
With one change: an account that has nothing here any more is forgotten, so it brings no debt either. So the request of
a caller who had none here waits for one request of each other account at most, however many those have sent, and
whatever its own last one has cost.

Knows no KV and no slots. Called by `scheduler`.
"""

from collections import Counter
from typing import Final

from hearthd.sequences.sequence import Sequence

__all__ = ["ANSWER_TOKEN_COST", "FairQueue"]

# In tokens of a prompt. Those are read many in one run; a token of an answer is a run of its own, in company. Measured
# for one answer: 16, for each of four: 5 (README, "Measured").
ANSWER_TOKEN_COST: Final = 8


class FairQueue:
    """The requests of one priority, from their arrival to their end, and what their accounts were served."""

    def __init__(self) -> None:
        self._waiting: list[Sequence] = []
        # Of accounts that have a request here, waiting or running; of no others, so that this does not grow.
        self._served: dict[str, int] = {}
        self._num_present: Counter[str] = Counter()
        # What the account had been served whose request began last.
        self._level = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def arrive(self, sequence: Sequence) -> None:
        """Let a request wait."""
        account = sequence.account
        if all(other.account != account for other in self._waiting):
            # Where several begin at once, the last of them may have been served more than some that wait.
            level = min((self._served[other.account] for other in self._waiting), default=self._level)
            self._served[account] = max(self._served.get(account, 0), min(level, self._level))
        self._num_present[account] += 1
        self._waiting.append(sequence)

    def start(self, sequence: Sequence) -> None:
        """Note that a request waits no more; it is still here."""
        self._waiting.remove(sequence)
        self._level = self._served[sequence.account]

    def depart(self, sequence: Sequence) -> None:
        """Note that a request has ended, waiting or running."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._num_present[sequence.account] -= 1
        if not self._num_present[sequence.account]:
            del self._num_present[sequence.account], self._served[sequence.account]
        if not self._num_present:
            self._level = 0

    def charge(self, sequence: Sequence, cost: int) -> None:
        """Note what a request was given. cost: in tokens of a prompt."""
        self._served[sequence.account] += cost

    def in_order(self) -> list[Sequence]:
        """Return those that wait, the next one first; the places of later ones suppose answers of full length."""
        served = dict(self._served)
        turns = []
        for number, sequence in enumerate(self._waiting):
            turns.append((served[sequence.account], number, sequence))
            served[sequence.account] += len(sequence.prompt_ids) + ANSWER_TOKEN_COST * sequence.params.max_tokens
        turns.sort(key=lambda turn: turn[:2])
        return [sequence for _, _, sequence in turns]
