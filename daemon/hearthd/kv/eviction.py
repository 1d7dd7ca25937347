"""What is thrown away when KV needs room: the least valuable ends of idle slots.

A slot loses its end first: what is left of it still begins the same conversations, as a system prompt that several of
them share. What stands in another slot as well costs nothing. Pure: reads the books, changes nothing. Called by
`kv_cache`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hearthd.kv.budget import KVBudget
from hearthd.kv.slot import Slot, num_shared

__all__ = ["Eviction", "loss_of", "num_usable", "plan_eviction"]


@dataclass(slots=True)
class Eviction:
    """What to cut, and what that would cost."""

    lengths: dict[int, int] = field(default_factory=dict)
    """Slot to the positions that it keeps."""
    loss: float = 0.0


def plan_eviction(
    slots: Sequence[Slot], num_blocks: int, budget: KVBudget, now: int, kept: Mapping[int, int]
) -> Eviction | None:
    """Choose what frees so many blocks; None if nothing does.

    kept: slot to the positions that must stay there.
    """
    plan = Eviction()
    if num_blocks <= 0:
        return plan
    left = {number: slot.num_kept for number, slot in enumerate(slots) if not slot.is_held}
    usable = {number: _usable_elsewhere(slots, number) for number in left}
    while num_blocks > 0:
        ends = []
        for number, length in left.items():
            low = kept.get(number, 0)
            if budget.blocks(length) > budget.blocks(low):
                copied = max((min(num, left.get(other, num)) for other, num in usable[number]), default=0)
                ends.append(_End.of(slots[number], number, length, low, copied, budget, now))
        if not ends:
            return None
        end = min(ends, key=lambda each: (each.loss / each.num_blocks, -each.num_blocks))
        size = min(num_blocks, end.num_blocks)
        before = left[end.slot]
        left[end.slot] = max((budget.blocks(before) - size) * budget.block_tokens, end.start)
        plan.lengths[end.slot] = left[end.slot]
        plan.loss += end.loss * size / end.num_blocks
        num_blocks -= size
    return plan


def loss_of(slots: Sequence[Slot], number: int, start: int, now: int) -> float:
    """Return what it costs to lose a slot's tokens from `start` on."""
    copied = max((num for _, num in _usable_elsewhere(slots, number)), default=0)
    return slots[number].worth(max(start, copied), now)


def num_usable(slot: Slot, prompt_ids: Sequence[int], identity: str, num_public: int) -> int:
    """Return how many tokens of a prompt have KV in a slot that may be used for it.

    num_public: of the prompt's tokens, those that the owner shares with its caller.
    """
    most = min(slot.num_reusable, len(prompt_ids))
    if slot.identity != identity:
        most = min(most, num_public)
    return min(num_shared(slot.tokens, prompt_ids), most) if most else 0


def _usable_elsewhere(slots: Sequence[Slot], number: int) -> list[tuple[int, int]]:
    """Return other slots with how many of this slot's tokens each of them has as well."""
    slot = slots[number]
    found = [
        (other, num_usable(each, slot.tokens, slot.identity, slot.num_public))
        for other, each in enumerate(slots)
        if other != number
    ]
    return [(other, num) for other, num in found if num]


@dataclass(frozen=True, slots=True)
class _End:
    """The end of an idle slot, as far back as it is worth the same all along."""

    slot: int
    start: int
    num_blocks: int
    """That losing it frees, at least 1."""
    loss: float

    @classmethod
    def of(cls, slot: Slot, number: int, length: int, low: int, copied: int, budget: KVBudget, now: int) -> _End:
        """length: what the slot has. low: what it must keep. copied: what others have as well."""
        bounds = [bound for bound in (*(part.end for part in slot.parts), copied, low) if bound < length]
        start = max(bounds, default=0)
        if budget.blocks(start) == budget.blocks(length):
            start = max((budget.blocks(length) - 1) * budget.block_tokens, low)
        loss = slot.worth(max(start, copied), now) - slot.worth(max(length, copied), now)
        return cls(number, start, budget.blocks(length) - budget.blocks(start), loss)
