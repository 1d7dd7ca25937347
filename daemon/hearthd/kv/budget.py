"""How much KV a process may hold, counted in blocks of positions that are whole pages of every buffer.

Pure arithmetic: knows no memory, no tokens and no slots. Made by `runner`, which has the buffers; `kv_cache` keeps
within it.
"""

from __future__ import annotations

import math
import mmap
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
    block_bytes: int = 0
    """Of one block: its positions in all buffers."""

    @classmethod
    def of(
        cls, *, row_bytes: int, num_rows: int, context_length: int, num_full: int, prompt_factor: int, kv_bytes: int
    ) -> KVBudget:
        """Return what so many bytes hold; if 0, what `num_full` full slots and the reading of a full prompt need.

        row_bytes: of one position of one head. num_rows: of a position, for all heads of all layers' keys and values.
        """
        size = block_tokens(row_bytes, mmap.PAGESIZE)
        block_bytes = size * row_bytes * num_rows
        num_blocks = kv_bytes // block_bytes if kv_bytes else (num_full + prompt_factor) * -(-context_length // size)
        return cls(size, num_blocks, prompt_factor, block_bytes)

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
