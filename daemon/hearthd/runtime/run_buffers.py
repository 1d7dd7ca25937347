"""What one shape of run reads and writes, bound to a session once. Made by `runner`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

__all__ = ["Binding"]


class Binding:
    """Buffers of one batch shape, bound once: a run only writes token ids and lengths into them.

    Binding the some 240 KV tensors anew would cost a tenth of a decode step. Everything bound is kept here, because an
    OrtValue of the CPU refers to the array's memory and does not copy.
    """

    def __init__(self, session: ort.InferenceSession, length: int, logits: NDArray[np.float32]) -> None:
        """logits: (B, N, vocab_size) for the last N positions, or (B, vocab_size) if the graph gives the last only."""
        num_rows = len(logits)
        self.token_ids = np.zeros((num_rows, length), np.int64)
        self.last_positions = np.zeros(num_rows, np.int32)
        self.longest = np.zeros(1, np.int32)
        self.logits = logits
        self.new: tuple[NDArray[np.int8], ...] = ()
        """What the run gives of an int8 cache that it does not write to, each (1, kv_heads, length, head_dim)."""
        self.io = session.io_binding()
        self._bound: list[ort.OrtValue] = []
        self.bind_input("input_ids", self.token_ids)
        self.bind_input("seqlens_k", self.last_positions)
        self.bind_input("total_sequence_length", self.longest)
        if logits.ndim == 3:
            self.bind_input("num_logits", np.asarray(logits.shape[1:2], np.int64))
        self.io.bind_ortvalue_output("logits", self._value(self.logits))

    def bind_input(self, name: str, array: NDArray[np.generic]) -> None:
        """Read an input from an array, as it is at each run."""
        self.io.bind_ortvalue_input(name, self._value(array))

    def bind_kv(self, past: Iterable[NDArray[Any]], present: Iterable[NDArray[Any]], suffix: str = "") -> None:
        """Bind keys and values, layer by layer, as they are before and after the run."""
        for index, (before, after) in enumerate(zip(past, present, strict=True)):
            layer, part = divmod(index, 2)
            name = f"{('key', 'value')[part]}{suffix}.{layer}"
            value = self._value(before)
            self.io.bind_ortvalue_input(f"past_{name}", value)
            self.io.bind_ortvalue_output(f"present_{name}", value if after is before else self._value(after))

    def _value(self, array: NDArray[np.generic]) -> ort.OrtValue:
        value = ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0)
        is_shared = not array.size or value.data_ptr() == array.ctypes.data
        assert is_shared, "ONNX Runtime copied a buffer that must be shared"
        self._bound.append(value)
        return value
