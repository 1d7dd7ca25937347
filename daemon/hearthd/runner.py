"""Token ids and KV in, logits out: the only module of the serving side that imports ONNX Runtime.

Knows the graph contract (`build/decoder/graph.py`), no sequences, no text. Owned by the inference thread: only
`terminate` may be called from another one. The engine is written against `kv_cache.Runner`, which `OnnxRunner` fulfils.
"""

from __future__ import annotations

import mmap
import os
import platform
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hearthd.bundle import Bundle
from hearthd.errors import BundleError
from hearthd.kv_cache import RunTerminated

__all__ = ["DecoderShape", "OnnxRunner"]

# Read by ONNX Runtime when it loads a graph: attention without tiles. The tiled kernel adds up in an order that depends
# on the run's length, also above one token on Arm (onnxruntime 1.31.1, emulated Cortex-A76), and on the size of the
# second cache. This one is also faster: on x86-64 prefill by 7 to 13 %, one stream by 0 to 14 %, eight by 7 %.
_PLAIN_ATTENTION = "ORT_GQA_DISABLE_FLASH_ATTENTION"


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What the runner must know of a graph to allocate its buffers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


class _Binding:
    """Buffers of one batch shape, bound once: a step only writes token ids and lengths into them.

    Binding the some 120 KV tensors anew would cost a twentieth of a decode step. Everything bound is kept here, because
    an OrtValue of the CPU refers to the array's memory and does not copy.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        kv: Sequence[NDArray[np.float32]],
        rows: slice,
        length: int,
        vocab_size: int,
    ) -> None:
        num_rows = rows.stop - rows.start
        self.token_ids = np.zeros((num_rows, length), np.int64)
        self.last_positions = np.zeros(num_rows, np.int32)
        self.longest = np.zeros(1, np.int32)
        self.logits = np.zeros((num_rows, vocab_size), np.float32)
        self.io = session.io_binding()
        self._bound: list[ort.OrtValue] = []
        for name, array in (
            ("input_ids", self.token_ids),
            ("seqlens_k", self.last_positions),
            ("total_sequence_length", self.longest),
        ):
            self.io.bind_ortvalue_input(name, self._value(array))
        self.io.bind_ortvalue_output("logits", self._value(self.logits))
        for index, array in enumerate(kv):
            layer, part = divmod(index, 2)
            name = f"{('key', 'value')[part]}.{layer}"
            # A view of a contiguous run of slots: no copy, and any such run can be a batch.
            value = self._value(array[rows])
            self.io.bind_ortvalue_input(f"past_{name}", value)
            self.io.bind_ortvalue_output(f"present_{name}", value)

    def _value(self, array: NDArray[np.generic]) -> ort.OrtValue:
        value = ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0)
        assert value.data_ptr() == array.ctypes.data, "ONNX Runtime copied a buffer that must be shared"
        self._bound.append(value)
        return value


def _zeros(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return zeros that cost memory only as far as they are written to.

    NumPy's own large arrays ask the kernel for huge pages: the first token of a chat would then take up to 2 MB in each
    of the 60 buffers of a 30-layer model.
    """
    num_items = int(np.prod(shape))
    memory = mmap.mmap(-1, num_items * np.dtype(np.float32).itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)


class OnnxRunner:
    """A decoder graph with `num_slots` static KV buffers of `context_length` positions."""

    def __init__(
        self,
        model_path: Path,
        shape: DecoderShape,
        *,
        num_slots: int,
        context_length: int,
        num_threads: int,
        preset_tokens: tuple[int, ...] = (),
        preset: NDArray[np.float32] | None = None,
    ) -> None:
        """Load the graph. num_threads: at least 1, set explicitly, since ONNX Runtime ignores a CPU mask.

        preset: KV of `preset_tokens`, float32 (layers, 2, kv_heads, tokens, head_dim).
        Raises BundleError if ONNX Runtime refuses the graph.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # Shapes differ from run to run: a remembered pattern would only hold memory.
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        os.environ[_PLAIN_ATTENTION] = "1"
        try:
            self._session = ort.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        # ONNX Runtime raises types of its own, which derive from Exception alone.
        except Exception as error:
            raise BundleError(f"ONNX Runtime cannot load {model_path}: {str(error).splitlines()[0]}") from error
        self.num_slots = num_slots
        self.context_length = context_length
        self.vocab_size = shape.vocab_size
        self.preset_tokens = preset_tokens
        self._preset = preset
        cache = (num_slots, shape.num_kv_heads, context_length, shape.head_dim)
        self._kv = [_zeros(cache) for _ in range(2 * shape.num_layers)]
        self._bindings: dict[tuple[int, int, int], _Binding] = {}
        self._lock = threading.Lock()
        self._running: ort.RunOptions | None = None

    @property
    def min_run(self) -> int:
        """One on Arm; two on x86-64, where a product with one row takes a kernel that adds up in another order.

        All longer runs agree bit for bit (onnxruntime 1.31.1; tests/test_real_exactness.py, `make arm64`). It matters:
        int8 can make half a logit of a last bit.
        """
        return 1 if platform.machine() in ("aarch64", "arm64") else 2

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, num_slots: int, context_length: int, num_threads: int) -> OnnxRunner:
        """Load a bundle's graph; context_length is at most the bundle's."""
        manifest = bundle.manifest
        shape = DecoderShape(manifest.num_layers, manifest.num_kv_heads, manifest.head_dim, manifest.vocab_size)
        return cls(
            bundle.model_path,
            shape,
            num_slots=num_slots,
            context_length=min(context_length, manifest.context_length),
            num_threads=num_threads,
            preset_tokens=manifest.preset_tokens,
            preset=bundle.preset(),
        )

    def forward(
        self, token_ids: NDArray[np.int64], first_slot: int, past_lengths: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Run tokens through the decoder and append their KV.

        token_ids: (B, S); row b goes to slot first_slot + b, at positions past_lengths[b] and on. Returns the logits of
        each row's last token, (B, vocab_size); they are valid until the next run of the same shape. Raises
        RunTerminated if `terminate` stopped it.
        """
        num_rows, length = token_ids.shape
        assert int(past_lengths.max()) + length <= self.context_length, "a run beyond the KV buffer"
        key = (first_slot, num_rows, length)
        binding = self._bindings.get(key)
        if binding is None:
            rows = slice(first_slot, first_slot + num_rows)
            binding = _Binding(self._session, self._kv, rows, length, self.vocab_size)
            # The last chunk of a prompt may have any length; only decode steps and full chunks come again and again.
            if length == 1 or length % 16 == 0:
                self._bindings[key] = binding
        binding.token_ids[:] = token_ids
        np.add(past_lengths, length - 1, out=binding.last_positions)
        binding.longest[0] = past_lengths.max() + length
        run_options = ort.RunOptions()
        with self._lock:
            self._running = run_options
        try:
            self._session.run_with_iobinding(binding.io, run_options)
        except Exception as error:
            if run_options.terminate:
                raise RunTerminated from error
            raise
        finally:
            with self._lock:
                self._running = None
        return binding.logits

    def terminate(self) -> None:
        """Stop the run in progress, if there is one. Any thread."""
        with self._lock:
            if self._running is not None:
                self._running.terminate = True

    def load_preset(self, slot: int) -> None:
        """Write the KV of `preset_tokens` to the slot's first positions."""
        if self._preset is None:
            return
        length = len(self.preset_tokens)
        for index, array in enumerate(self._kv):
            layer, part = divmod(index, 2)
            array[slot, :, :length] = self._preset[layer, part]

    def swap_slots(self, a: int, b: int, num_tokens: int) -> None:
        """Exchange the first num_tokens positions of two slots."""
        for array in self._kv:
            kept = array[a, :, :num_tokens].copy()
            array[a, :, :num_tokens] = array[b, :, :num_tokens]
            array[b, :, :num_tokens] = kept

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first num_tokens positions of a slot to another."""
        for array in self._kv:
            array[target, :, :num_tokens] = array[source, :, :num_tokens]

    def read_slot(self, slot: int, num_tokens: int) -> NDArray[np.float32]:
        """Return a copy of a slot's first positions, float32 (layers, 2, kv_heads, num_tokens, head_dim)."""
        stacked = np.stack([array[slot, :, :num_tokens] for array in self._kv])
        return stacked.reshape(-1, 2, *stacked.shape[1:])
