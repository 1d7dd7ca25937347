"""Whose turn it is among requests of one priority: the account's that was served least, then the one that came first.

This is fair queueing by tokens served. An account that begins to wait starts level with one that was here all the time
and had got its share when the last request began (the virtual time of Parekh and Gallager, 1993), however long it was
away: it has no credit. With two changes, for the sake of a house, where most callers send one request at a time:

    no debt     an account that has nothing here any more is forgotten
    one job     whoever had nothing here waits for one request of each other account at most, however many those have
                sent: if one that waits is far behind its share, the newcomer starts so little behind it that the
                first request of that account puts it behind the newcomer

Each of those starts is higher than the last one, if only by what a request costs at least. So nobody who waits, with
whatever debt, is overtaken for ever by others who come and go.

Knows no KV and no slots. Called by `scheduler`.
"""

from collections import Counter
from typing import Final

from hearthd.sequences.sequence import Sequence

__all__ = ["ANSWER_TOKEN_COST", "FairQueue"]

# In tokens of a prompt. Those are read many in one run; a token of an answer is a run of its own, in company. Measured
# for one answer: 16, for each of four: 5 (README, "Measured").
ANSWER_TOKEN_COST: Final = 8
# An answer is taken for one that long, if it may be, even if it turns out shorter.
_MIN_ANSWER_TOKENS: Final = 32


class FairQueue:
    """The requests of one priority, from their arrival to their end, and what their accounts were served."""

    def __init__(self) -> None:
        self._waiting: list[Sequence] = []
        # Of accounts that have a request here, waiting or running; of no others, so that this does not grow.
        self._served: dict[str, int] = {}
        self._num_present: Counter[str] = Counter()
        # Of requests that have begun: what their accounts were charged for in advance.
        self._prepaid: dict[Sequence, int] = {}
        # What an account would have been served that was here all the time, and got its share: now, and when the last
        # request began.
        self._share = 0.0
        self._level = 0.0

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def arrive(self, sequence: Sequence) -> None:
        """Let a request wait."""
        account = sequence.account
        if all(other.account != account for other in self._waiting):
            # Less than what the first request of any of those will bring it to.
            most = min((self._served[other.account] + _least_cost(other) - 1 for other in self._waiting), default=None)
            level = int(self._level) if most is None else min(int(self._level), most)
            self._served[account] = max(self._served.get(account, 0), level)
        self._num_present[account] += 1
        self._waiting.append(sequence)

    def start(self, sequence: Sequence) -> None:
        """Note that a request waits no more; it is still here."""
        self._waiting.remove(sequence)
        self._level = self._share
        cost = _least_cost(sequence)
        self.charge(sequence, cost)
        self._prepaid[sequence] = cost

    def depart(self, sequence: Sequence) -> None:
        """Note that a request has ended, waiting or running."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._prepaid.pop(sequence, None)
        self._num_present[sequence.account] -= 1
        if not self._num_present[sequence.account]:
            del self._num_present[sequence.account], self._served[sequence.account]
        if not self._num_present:
            self._share = self._level = 0.0

    def charge(self, sequence: Sequence, cost: int) -> None:
        """Note what a request was given. cost: in tokens of a prompt."""
        prepaid = self._prepaid.get(sequence, 0)
        if prepaid:
            self._prepaid[sequence] = max(prepaid - cost, 0)
            cost = max(cost - prepaid, 0)
        self._served[sequence.account] += cost
        self._share += cost / len(self._num_present)

    def in_order(self) -> list[Sequence]:
        """Return those that wait, the next one first; the places of later ones suppose answers of full length."""
        served = dict(self._served)
        turns = []
        for number, sequence in enumerate(self._waiting):
            turns.append((served[sequence.account], number, sequence))
            served[sequence.account] += len(sequence.prompt_ids) + ANSWER_TOKEN_COST * sequence.params.max_tokens
        turns.sort(key=lambda turn: turn[:2])
        return [sequence for _, _, sequence in turns]


def _least_cost(sequence: Sequence) -> int:
    """Return what a request costs at least, however short its answer is. The first token comes with the prompt."""
    return ANSWER_TOKEN_COST * min(max(sequence.params.max_tokens - 1, 1), _MIN_ANSWER_TOKENS)
