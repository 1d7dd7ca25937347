"""The memory behind the KV slots: int8 numbers for as long as a sequence lives, float32 while its prompt is read.

Address space is for every position of every slot; memory only for those that were written to, block by block
(`kv/budget.py`), until it is given back.

The graph's attention over float32 is the fast one for many tokens at once, the one over int8 for a single one
(`build/decoder/attention.py`). Both see the same numbers, so that a slot can be read into float32 buffers at any
moment. There is one set of those: prompts are read one at a time.

Knows no ONNX Runtime and no tokens. Owned by `runner`.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hearthd.errors import ShortOfMemoryError
from hearthd.kv.budget import KVBudget, block_tokens
from hearthd.runtime.free_memory import return_free_memory
from hearthd.thread_name import name_this_thread

__all__ = ["DecoderShape", "KVSlots", "PromptBuffers"]

# Who asks something is likely to ask once more within this time; then the buffers stand there still.
_REST_SECONDS = 10.0
# asm-generic/mman-common.h; Python's `mmap` has no name for it.
_MAP_NORESERVE = 0x4000


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
        """shape: (slots, heads, positions, head_dim); a head's positions are whole pages."""
        num_items = int(np.prod(shape))
        self._array_bytes = num_items * np.dtype(dtype).itemsize
        self._row_bytes = shape[-1] * np.dtype(dtype).itemsize
        assert shape[-2] * self._row_bytes % mmap.PAGESIZE == 0, "neighbours in one page"
        # Private: what is given back of a shared mapping goes out of this process's sight, and stays in memory.
        # Without a reserve: most of the slots never fill.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._mapped = mmap.mmap(-1, num_arrays * self._array_bytes, flags)
        except OSError as error:
            raise ShortOfMemoryError(
                f"the system gives no address space of {num_arrays * self._array_bytes >> 20} MB for KV "
                f"({error.strerror}); lower engine.slots or engine.context_length"
            ) from error
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._mapped.madvise(mmap.MADV_NOHUGEPAGE)
        self.arrays = tuple(
            np.frombuffer(self._mapped, dtype, num_items, index * self._array_bytes).reshape(shape)
            for index in range(num_arrays)
        )

    def give_back(self, index: int, slot: int, start: int, end: int) -> None:
        """Return the memory of positions of a slot in one array to the system; they are zeros again.

        start, end: whole pages.
        """
        _, num_heads, num_positions, _ = self.arrays[index].shape
        head_bytes = num_positions * self._row_bytes
        offset = index * self._array_bytes + slot * num_heads * head_bytes
        if start == 0:
            # The heads stand behind each other, and what of them is not in use is not there.
            self._mapped.madvise(mmap.MADV_DONTNEED, offset, num_heads * head_bytes)
            return
        for head in range(num_heads):
            first = offset + head * head_bytes + start * self._row_bytes
            self._mapped.madvise(mmap.MADV_DONTNEED, first, (end - start) * self._row_bytes)


class KVSlots:
    """`num_slots` static buffers of `context_length` positions for each layer's keys and values.

    arrays: for layer n, keys at 2 n and values at 2 n + 1, each (num_slots, kv_heads, positions, head_dim), where
    positions are those of whole blocks, `context_length` at least.
    """

    def __init__(self, shape: DecoderShape, *, num_slots: int, context_length: int, dtype: type[np.generic]) -> None:
        self._row_bytes = shape.head_dim * np.dtype(dtype).itemsize
        self._num_rows = 2 * shape.num_layers * shape.num_kv_heads
        self.block_tokens = block_tokens(self._row_bytes, mmap.PAGESIZE)
        self._context_length = context_length
        size = (num_slots, shape.num_kv_heads, self._whole(context_length), shape.head_dim)
        self._memory = _Memory(2 * shape.num_layers, size, dtype)
        self.arrays: tuple[NDArray[Any], ...] = self._memory.arrays
        # Positions of each slot, whole blocks, whose memory may be in use.
        self._touched = [0] * num_slots

    def budget(self, kv_bytes: int, num_full: int, prompt_factor: int) -> KVBudget:
        """Return what so many bytes hold; if 0, what `num_full` full slots and a full prompt buffer need."""
        return KVBudget.of(
            row_bytes=self._row_bytes,
            num_rows=self._num_rows,
            context_length=self._context_length,
            num_full=num_full,
            prompt_factor=prompt_factor,
            kv_bytes=kv_bytes,
        )

    def touch(self, slot: int, end: int) -> None:
        """Note that positions before `end` are being written to."""
        self._touched[slot] = max(self._touched[slot], self._whole(end))

    def give_back(self, slot: int, num_tokens: int) -> None:
        """Return the memory behind the blocks of the first num_tokens positions to the system."""
        start, end = self._whole(num_tokens), self._touched[slot]
        if start < end:
            for index in range(len(self.arrays)):
                self._memory.give_back(index, slot, start, end)
            self._touched[slot] = start

    def write(self, slot: int, start: int, kv: Sequence[NDArray[Any]]) -> None:
        """Write positions from `start` on. kv: as `arrays`, each (kv_heads, positions, head_dim)."""
        end = start + kv[0].shape[1]
        self.touch(slot, end)
        for array, values in zip(self.arrays, kv, strict=True):
            array[slot, :, start:end] = values

    def swap(self, a: int, b: int, num_a: int, num_b: int) -> None:
        """Exchange the first num_a positions of one slot and the first num_b of another; there is no more in them.

        Memory that one of them no longer needs goes back array by array: the two together never have more than before,
        but for one array.
        """
        (longer, num_longer), (shorter, num_shorter) = sorted(((a, num_a), (b, num_b)), key=lambda each: -each[1])
        self.give_back(longer, num_longer)
        self.give_back(shorter, num_shorter)
        start, end = self._touched[shorter], self._touched[longer]
        for index, array in enumerate(self.arrays):
            kept = array[shorter, :, :num_shorter].copy()
            array[shorter, :, :num_longer] = array[longer, :, :num_longer]
            array[longer, :, :num_shorter] = kept
            if start < end:
                self._memory.give_back(index, longer, start, end)
        self._touched[shorter], self._touched[longer] = end, start

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first num_tokens positions of a slot to another."""
        self.touch(target, num_tokens)
        for array in self.arrays:
            array[target, :, :num_tokens] = array[source, :, :num_tokens]

    @property
    def num_blocks(self) -> int:
        """Blocks whose memory may be in use, of all slots."""
        return sum(self._touched) // self.block_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of one position's KV."""
        return self._num_rows * self._row_bytes

    def read_bytes(self, slot: int, start: int, end: int) -> bytes:
        """Return a copy of some positions: (arrays, kv_heads, positions, head_dim)."""
        return np.stack([array[slot, :, start:end] for array in self.arrays]).tobytes()

    def write_bytes(self, slot: int, start: int, kv: bytes, num_skipped: int) -> None:
        """Write what `read_bytes` gave, but for its first num_skipped positions."""
        _, num_heads, _, head_dim = self.arrays[0].shape
        values = np.frombuffer(kv, self.arrays[0].dtype).reshape(len(self.arrays), num_heads, -1, head_dim)
        self.write(slot, start + num_skipped, list(values[:, :, num_skipped:]))

    def read(self, slot: int, num_tokens: int) -> NDArray[Any]:
        """Return a copy of a slot's first positions, (layers, 2, kv_heads, num_tokens, head_dim)."""
        stacked = np.stack([array[slot, :, :num_tokens] for array in self.arrays])
        return stacked.reshape(-1, 2, *stacked.shape[1:])

    def _whole(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens) * self.block_tokens


class PromptBuffers:
    """Float32 buffers that hold the first positions of one slot while its prompt is read, and until another one is.

    arrays: as those of `KVSlots`, of a single slot. The next prompt often begins as the last one did: what is there
    still needs no memory, and no numbers, anew. The memory goes back after some rest, in a thread of its own; whatever
    looks at the buffers holds the lock, and a run begins with `hold`, after which no rest ends.
    """

    def __init__(self, slots: KVSlots, *, rest_seconds: float = _REST_SECONDS) -> None:
        self._slots = slots
        _, *size = slots.arrays[0].shape
        self._memory = _Memory(len(slots.arrays), (1, *size), np.float32)
        self.arrays: tuple[NDArray[np.float32], ...] = self._memory.arrays
        self._rest_seconds = rest_seconds
        self._lock = threading.RLock()
        self._slot: int | None = None
        self._num_tokens = 0
        # Positions whose memory may be in use.
        self._num_touched = 0
        self._num_holds = 0
        self._is_reading = False
        self._timer: threading.Timer | None = None

    @property
    def factor(self) -> int:
        """How many times as much memory a position takes here as in its slot."""
        return self.arrays[0].itemsize // self._slots.arrays[0].itemsize

    @property
    def num_blocks(self) -> int:
        """Blocks of the budget whose memory may be in use."""
        return self.factor * -(-self._num_touched // self._slots.block_tokens)

    def hold(self, slot: int, num_tokens: int, num_new: int) -> None:
        """Make the buffers hold a slot's first num_tokens positions, before a run that writes num_new more."""
        with self._lock:
            self._num_holds += 1
            self._is_reading = True
            if slot != self._slot:
                self._slot, self._num_tokens = slot, 0
            self._num_touched = max(self._num_touched, num_tokens + num_new)
            if num_tokens > self._num_tokens:
                for array, source in zip(self.arrays, self._slots.arrays, strict=True):
                    array[0, :, self._num_tokens : num_tokens] = source[slot, :, self._num_tokens : num_tokens]
            self._num_tokens = num_tokens

    def extend(self, num_tokens: int) -> None:
        """Note that the run has written positions of the same slot, up to num_tokens, here and there."""
        with self._lock:
            self._num_tokens = num_tokens

    def ends_reading(self, first_slot: int, num_slots: int) -> bool:
        """Note a step of these slots. Whether the last prompt that was read is theirs, and this is the first step."""
        with self._lock:
            is_over = self._is_reading and (self._slot is None or first_slot <= self._slot < first_slot + num_slots)
            self._is_reading = self._is_reading and not is_over
            return is_over

    def keep(self, slot: int, num_tokens: int) -> None:
        """Note that a slot may have changed behind its first num_tokens positions."""
        with self._lock:
            if slot == self._slot:
                self._num_tokens = min(self._num_tokens, num_tokens)

    def copied(self, source: int, target: int, num_tokens: int) -> None:
        """Note that the first positions of a slot stand in another one too, which is the next to be read."""
        with self._lock:
            if source == self._slot:
                self._slot, self._num_tokens = target, min(self._num_tokens, num_tokens)
            else:
                self.keep(target, 0)

    def swapped(self, a: int, b: int) -> None:
        """Note that two slots were exchanged."""
        with self._lock:
            if self._slot in (a, b):
                self._slot = b if self._slot == a else a

    def give_back(self, num_tokens: int) -> None:
        """Keep the memory of so many positions at most."""
        with self._lock:
            size = self._slots.block_tokens
            start, end = (-(-number // size) * size for number in (num_tokens, self._num_touched))
            if start < end:
                self._num_tokens = min(self._num_tokens, start)
                for index in range(len(self.arrays)):
                    self._memory.give_back(index, 0, start, end)
                self._num_touched = start

    def rest(self) -> None:
        """Give all memory back, unless a prompt is read soon."""
        if self._timer is not None:
            self._timer.cancel()
        if self._num_touched:
            # Not `self`: a model that was unloaded must be able to go.
            self._timer = _RestTimer(self._rest_seconds, _end_rest, (weakref.ref(self), self._num_holds))
            self._timer.daemon = True
            try:
                self._timer.start()
            except RuntimeError:  # no thread, since there is no memory for one: this is the time to give some back
                self._timer = None
                self.give_back(0)

    def end_rest(self, num_holds: int) -> None:
        """Give all memory back if no prompt was read since `hold` had been called so often. In any thread."""
        with self._lock:
            if self._num_holds != num_holds:
                return
            self.give_back(0)
        # What the runs of prompts took, and ONNX Runtime has given up since.
        return_free_memory()


class _RestTimer(threading.Timer):
    """A thread that the inference thread begins, whose name it must not keep."""

    def run(self) -> None:
        name_this_thread("kv-rest")
        super().run()


def _end_rest(buffers: weakref.ref[PromptBuffers], num_holds: int) -> None:
    found = buffers()
    if found is not None:
        found.end_rest(num_holds)
