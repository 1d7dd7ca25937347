"""What is thrown away when KV needs room: the least valuable ends of idle slots.

A slot loses its end first: what is left of it still begins the same conversations, as a system prompt that several of
them share. What stands in another slot as well (`copies`) costs nothing. Pure: reads the books, changes nothing. Called
by `kv_cache`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hearthd.kv.budget import KVBudget
from hearthd.kv.copies import Copies
from hearthd.kv.slot import Slot, num_shared

__all__ = ["Eviction", "loss_of", "num_usable", "plan_eviction"]


@dataclass(slots=True)
class Eviction:
    """What to cut, and what that would cost."""

    lengths: dict[int, int] = field(default_factory=dict)
    """Slot to the positions that it keeps."""
    loss: float = 0.0


def plan_eviction(
    slots: Sequence[Slot], copies: Copies, num_blocks: int, budget: KVBudget, now: int, kept: Mapping[int, int]
) -> Eviction | None:
    """Choose what frees so many blocks; None if nothing does.

    copies: of these slots. kept: slot to the positions that must stay there.
    """
    plan = Eviction()
    if num_blocks <= 0:
        return plan
    left = {number: slot.num_kept for number, slot in enumerate(slots) if not slot.is_held}
    # A copy counts as far as it stays.
    staying = np.array([left.get(number, len(slot.tokens)) for number, slot in enumerate(slots)], np.int64)
    while num_blocks > 0:
        copied = np.minimum(copies.usable, staying).max(axis=1)
        ends = []
        for number, length in left.items():
            low = kept.get(number, 0)
            if budget.blocks(length) > budget.blocks(low):
                ends.append(_End.of(slots[number], number, length, low, int(copied[number]), budget, now))
        if not ends:
            return None
        end = min(ends, key=lambda each: (each.loss / each.num_blocks, -each.num_blocks))
        size = min(num_blocks, end.num_blocks)
        before = left[end.slot]
        left[end.slot] = max((budget.blocks(before) - size) * budget.block_tokens, end.start)
        plan.lengths[end.slot] = staying[end.slot] = left[end.slot]
        plan.loss += end.loss * size / end.num_blocks
        num_blocks -= size
    return plan


def loss_of(slots: Sequence[Slot], copies: Copies, number: int, start: int, now: int) -> float:
    """Return what it costs to lose a slot's tokens from `start` on."""
    return slots[number].worth(max(start, copies.longest[number]), now)


def num_usable(slot: Slot, prompt_ids: Sequence[int], identity: str, num_public: int) -> int:
    """Return how many tokens of a prompt have KV in a slot that may be used for it.

    num_public: of the prompt's tokens, those that the owner shares with its caller.
    """
    most = min(slot.num_reusable, len(prompt_ids))
    if slot.identity != identity:
        most = min(most, num_public)
    return min(num_shared(slot.tokens, prompt_ids), most) if most else 0


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
