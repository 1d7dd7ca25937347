"""The memory behind the KV slots: int8 numbers for as long as a sequence lives, float32 while its prompt is read.

The graph's attention over float32 is the fast one for many tokens at once, the one over int8 for a single one
(`build/decoder/attention.py`). Both see the same numbers, so that a slot can be read into float32 buffers at any
moment. There is one set of those: prompts are read one at a time.

Knows no ONNX Runtime and no tokens. Owned by `runner`.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DecoderShape", "KVSlots", "PromptBuffers"]

# Below so many tokens the memory is kept: to give it back and take it again costs more than it is worth.
_WORTH_GIVING_BACK = 16


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What must be known of a graph to allocate its buffers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


class _Memory:
    """Arrays of zeros that cost memory only as far as they are written to.

    NumPy's own large arrays ask the kernel for huge pages: the first token of a chat would then take up to 2 MB in each
    of the 60 buffers of a 30-layer model.
    """

    def __init__(self, num_arrays: int, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        # Whole pages each: ONNX Runtime wants its buffers aligned, and neighbours stay out of each other's pages.
        num_items = int(np.prod(shape))
        size = -(-num_items * np.dtype(dtype).itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        self._mapped = mmap.mmap(-1, num_arrays * size)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._mapped.madvise(mmap.MADV_NOHUGEPAGE)
        self.arrays = tuple(
            np.frombuffer(self._mapped, dtype, num_items, index * size).reshape(shape) for index in range(num_arrays)
        )

    def give_back(self) -> None:
        """Return the memory to the system; the arrays are zeros again."""
        self._mapped.madvise(mmap.MADV_DONTNEED)


class KVSlots:
    """`num_slots` static buffers of `context_length` positions for each layer's keys and values.

    arrays: for layer n, keys at 2 n and values at 2 n + 1, each (num_slots, kv_heads, context_length, head_dim).
    """

    def __init__(self, shape: DecoderShape, *, num_slots: int, context_length: int, dtype: type[np.generic]) -> None:
        size = (num_slots, shape.num_kv_heads, context_length, shape.head_dim)
        self.arrays: tuple[NDArray[Any], ...] = _Memory(2 * shape.num_layers, size, dtype).arrays

    def write(self, slot: int, start: int, kv: Sequence[NDArray[Any]]) -> None:
        """Write positions from `start` on. kv: as `arrays`, each (kv_heads, positions, head_dim)."""
        end = start + kv[0].shape[1]
        for array, values in zip(self.arrays, kv, strict=True):
            array[slot, :, start:end] = values

    def swap(self, a: int, b: int, num_tokens: int) -> None:
        """Exchange the first num_tokens positions of two slots."""
        for array in self.arrays:
            kept = array[a, :, :num_tokens].copy()
            array[a, :, :num_tokens] = array[b, :, :num_tokens]
            array[b, :, :num_tokens] = kept

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first num_tokens positions of a slot to another."""
        for array in self.arrays:
            array[target, :, :num_tokens] = array[source, :, :num_tokens]

    def read(self, slot: int, num_tokens: int) -> NDArray[Any]:
        """Return a copy of a slot's first positions, (layers, 2, kv_heads, num_tokens, head_dim)."""
        stacked = np.stack([array[slot, :, :num_tokens] for array in self.arrays])
        return stacked.reshape(-1, 2, *stacked.shape[1:])


class PromptBuffers:
    """Float32 buffers that hold the first positions of one slot while its prompt is read.

    arrays: as those of `KVSlots`, of a single slot.
    """

    def __init__(self, slots: KVSlots) -> None:
        self._slots = slots
        _, *size = slots.arrays[0].shape
        self._memory = _Memory(len(slots.arrays), (1, *size), np.float32)
        self.arrays: tuple[NDArray[np.float32], ...] = self._memory.arrays
        self._slot: int | None = None
        self._num_tokens = 0
        # Positions whose memory may be in use.
        self._num_touched = 0

    def hold(self, slot: int, num_tokens: int, num_new: int) -> None:
        """Make the buffers hold a slot's first num_tokens positions, before a run that writes num_new more."""
        if slot != self._slot:
            self._slot, self._num_tokens = slot, 0
        if num_tokens > self._num_tokens:
            for array, source in zip(self.arrays, self._slots.arrays, strict=True):
                array[0, :, self._num_tokens : num_tokens] = source[slot, :, self._num_tokens : num_tokens]
        self._num_tokens = num_tokens
        self._num_touched = max(self._num_touched, num_tokens + num_new)

    def extend(self, num_tokens: int) -> None:
        """Note that the run has written positions of the same slot, up to num_tokens, here and there."""
        self._num_tokens = num_tokens

    def forget(self) -> None:
        """Note that slots may have changed."""
        self._slot, self._num_tokens = None, 0

    def release_unless_reading(self, first_slot: int, num_slots: int) -> bool:
        """Give the memory back before these slots are written to, unless the prompt of another one is being read.

        Returns whether any was given back.
        """
        if self._slot is not None and not first_slot <= self._slot < first_slot + num_slots:
            return False
        return self.release()

    def release(self) -> bool:
        """Give the memory back, where it is worth it; returns whether it was."""
        self.forget()
        if self._num_touched < _WORTH_GIVING_BACK:
            return False
        self._memory.give_back()
        self._num_touched = 0
        return True
