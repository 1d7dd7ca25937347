"""Which sequence holds which slot, and those that decode side by side: a batch is a run of neighbouring slots.

Moves KV only through `KVCache`. Knows no order of service. Called by `engine`.
"""

from collections.abc import Iterator

from hearthd.kv.kv_cache import KVCache
from hearthd.sequences.sequence import Sequence

__all__ = ["Batch"]


class Batch:
    """The sequences that one forward runs, in the order of their slots; and who holds the other slots."""

    def __init__(self, cache: KVCache, num_slots: int) -> None:
        self._cache = cache
        self._num_slots = num_slots
        self._rows: list[Sequence] = []
        self._holders: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._rows)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._rows

    def hold(self, sequence: Sequence) -> None:
        """Note whose a slot is that `KVCache.acquire` has given."""
        self._holders[sequence.slot] = sequence

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's slot back, wherever it stands."""
        if sequence in self._rows:
            self.leave(sequence)
        del self._holders[sequence.slot]
        self._cache.release(sequence.slot)

    def join(self, sequence: Sequence) -> None:
        """Put a sequence beside those that decode. Where it stands already, if it can: moving KV takes time."""
        if self._rows:
            first = self._rows[0].slot
            beside = [slot for slot in (first + len(self._rows), first - 1) if 0 <= slot < self._num_slots]
            if sequence.slot not in beside:
                self._exchange(sequence, min(beside, key=self._cache.num_tokens))
        is_before = bool(self._rows) and sequence.slot < self._rows[0].slot
        self._rows.insert(0 if is_before else len(self._rows), sequence)

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out, with its slot. Into a place between others the last one moves, so no hole is left."""
        place = self._rows.index(sequence)
        if 0 < place < len(self._rows) - 1:
            last = self._rows.pop()
            self._rows[place] = last
            self._exchange(sequence, last.slot)
        else:
            del self._rows[place]

    def _exchange(self, sequence: Sequence, target: int) -> None:
        """Give a sequence the slot `target`, and its own to whoever holds that one."""
        if sequence.slot == target:
            return
        self._cache.swap(sequence.slot, target)
        other = self._holders.pop(target, None)
        del self._holders[sequence.slot]
        if other is not None:
            other.slot = sequence.slot
            self._holders[other.slot] = other
        sequence.slot = target
        self._holders[target] = sequence
