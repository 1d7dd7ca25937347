"""What of each slot's tokens stands in other slots as well, and may be used there.

Every pair is looked at, and few are compared: of lists in their order, two share what all neighbours between them do.
That takes as many comparisons as there are slots. Pure: reads the books, changes nothing. Used by `choosing` and
`eviction`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hearthd.kv.slot import Slot, num_shared

__all__ = ["Copies"]


class Copies:
    """What slots have in common, until their books change. Compared when it is asked for, and once."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots

    @cached_property
    def usable(self) -> NDArray[np.int64]:
        """For each slot, how many of its tokens each other one has for it: `eviction.num_usable` of every pair."""
        slots = self._slots
        most = np.minimum(_common(slots), np.array([slot.num_reusable for slot in slots], np.int64))
        numbers: dict[str, int] = {}
        identities = np.array([numbers.setdefault(slot.identity, len(numbers)) for slot in slots], np.int64)
        publics = np.array([slot.num_public for slot in slots], np.int64)
        is_own = identities[:, None] == identities[None, :]
        usable = np.where(is_own, most, np.minimum(most, publics[:, None]))
        np.fill_diagonal(usable, 0)
        return usable

    @cached_property
    def longest(self) -> list[int]:
        """For each slot, how many of its tokens some other one has for it."""
        return [int(num) for num in self.usable.max(axis=1, initial=0)]


def _common(slots: Sequence[Slot]) -> NDArray[np.int64]:
    """Return how many tokens each two slots begin with together."""
    # Machine integers: to bring lists into their order takes ten times as long.
    tokens = [array("i", slot.tokens) for slot in slots]
    order = sorted(range(len(slots)), key=tokens.__getitem__)
    neighbours = np.array([num_shared(tokens[a], tokens[b]) for a, b in pairwise(order)], np.int64)
    in_order = np.diag(np.array([len(tokens[number]) for number in order], np.int64))
    for place in range(len(neighbours)):
        shared = np.minimum.accumulate(neighbours[place:])
        in_order[place, place + 1 :] = in_order[place + 1 :, place] = shared
    places = np.argsort(order)
    return in_order[np.ix_(places, places)]
