"""How much KV a process may hold, counted in blocks of positions that are whole pages of every buffer.

Pure arithmetic: knows no memory, no tokens and no slots. Made by `runner`, which has the buffers; `kv_cache` keeps
within it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

__all__ = ["KVBudget", "block_tokens"]

# Smaller ones would only make longer books.
_MIN_BLOCK: Final = 64


def block_tokens(row_bytes: int, page_bytes: int) -> int:
    """Return the positions of a block: 64, or the first multiple of 64 that is whole pages. row_bytes: of a head's."""
    return math.lcm(_MIN_BLOCK, page_bytes // math.gcd(page_bytes, row_bytes))


@dataclass(frozen=True, slots=True)
class KVBudget:
    """What slots and prompt buffers may take together."""

    block_tokens: int
    """Positions of a block."""
    num_blocks: int
    prompt_factor: int
    """Blocks that the prompt buffers take for each block of the prompt that is read; 0 where there are none."""

    def blocks(self, num_tokens: int) -> int:
        """Return the blocks of a slot that holds so many tokens."""
        return -(-num_tokens // self.block_tokens)

    def prompt_blocks(self, num_tokens: int) -> int:
        """Return the blocks of the prompt buffers while a prompt of so many tokens is read."""
        return self.prompt_factor * self.blocks(num_tokens)

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer that fit when nothing else is there; all may be the prompt's."""
        return self.num_blocks // (1 + self.prompt_factor) * self.block_tokens
