"""How much of the KV budget is in use or reserved, and whether there is room for more.

Counts blocks: those of slots, and those of the prompt buffers, which all prompts that are read share. Reads the slots'
books; changes nothing of them, and no memory. Made by `kv_cache`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hearthd.kv.budget import KVBudget
from hearthd.kv.slot import Slot

__all__ = ["Reservations"]


class Reservations:
    """The books of the budget."""

    def __init__(self, budget: KVBudget, slots: Sequence[Slot]) -> None:
        """slots: all of them, whose books may change."""
        self.budget = budget
        self._slots = slots
        self.prompt_blocks = 0
        """Blocks that the prompt buffers may have in use."""

    @property
    def num_blocks(self) -> int:
        """Blocks that are in use or reserved."""
        return sum(self.budget.blocks(slot.num_positions) for slot in self._slots) + self.prompt_blocks

    def prompt_blocks_with(self, prompt_length: int) -> int:
        """Return the blocks that prompts need which are being read, a new one of this length among them."""
        longest = max((slot.prompt_length for slot in self._slots if slot.is_reading), default=0)
        return self.budget.prompt_blocks(max(longest, prompt_length))

    def shortage_for_slot(self, number: int, num_reserved: int, prompt_length: int) -> int:
        """Return how many blocks are missing for a prompt in a slot, whose own content goes; negative: are to spare."""
        before = self.budget.blocks(self._slots[number].num_positions) + self.prompt_blocks
        after = self.budget.blocks(num_reserved) + self.prompt_blocks_with(prompt_length)
        return self.num_blocks - before + after - self.budget.num_blocks

    def shortage_for_reading(self, num_tokens: int) -> int:
        """Return how many blocks are missing to read an answer again, up to so many tokens of its slot."""
        return self.num_blocks - self.prompt_blocks + self.prompt_blocks_with(num_tokens) - self.budget.num_blocks

    def has_room_for(
        self, num_tokens: int, prompt_length: int, *, num_spare: int = 0, without: Collection[Slot] = ()
    ) -> bool:
        """Whether there would be a slot and memory if all that is idle went.

        num_spare: tokens for which there has to be room besides. without: slots that would be released before.
        """
        held = [slot for slot in self._slots if slot.is_held and slot not in without]
        blocks = self.budget.blocks
        longest = max((slot.prompt_length for slot in held if slot.is_reading), default=0)
        num_blocks = sum(blocks(slot.num_positions) for slot in held) + blocks(max(num_tokens, prompt_length))
        num_blocks += blocks(num_spare) + self.budget.prompt_blocks(max(longest, prompt_length))
        return len(held) < len(self._slots) and num_blocks <= self.budget.num_blocks
