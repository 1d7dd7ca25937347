"""The build's own runs of a graph: every position's logits, and every matmul's input.

Serving has `runner.OnnxRunner`, made for speed; this is made for looking. Knows the graph contract, nothing of recipes.
Called by `calibrate` and `quality`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.runtime.plain_attention import choose_plain_attention

__all__ = ["CHUNK", "GraphSession"]

# Positions in one run: bounds the memory for logits (64 x 49,152 x 4 bytes = 12.6 MB) and for captured activations.
CHUNK = 64


class GraphSession:
    """A graph that gives every position's logits, run on one document after another."""

    def __init__(
        self,
        model: bytes,
        spec: DecoderSpec,
        *,
        data_directory: Path,
        context_length: int,
        num_threads: int,
        preset: NDArray[Any] | None = None,
        prepacked: bool = False,
    ) -> None:
        """Load a graph whose weights stand in `data_directory`.

        preset: KV of a document's first tokens, (layers, 2, kv_heads, tokens, head_dim), instead of a run: int8 for a
        graph with an int8 cache, of which the attention for prompts is run.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        # Otherwise its threads wait for the next run at full speed, while NumPy needs the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # A float32 reference of 540 MB would take 1.1 GB.
        options.add_session_config_entry("session.disable_prepacking", "0" if prepacked else "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data_directory))
        choose_plain_attention()
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        cache = (1, spec.num_kv_heads, context_length, spec.padded_head_dim)
        self._kv = [np.zeros(cache, np.float32) for _ in range(2 * spec.num_layers)]
        self._has_int8_cache = any(value.name == "is_prompt" for value in self._session.get_inputs())
        self._preset = preset

    def run(
        self, token_ids: Sequence[int], *, start: int = 0, chunk: int = CHUNK, captures: Sequence[str] = ()
    ) -> Iterator[tuple[NDArray[np.float32], Mapping[str, NDArray[np.float32]]]]:
        """Run a document from its position `start`, a chunk at a time.

        captures: the matmuls whose inputs are wanted, of a graph written with `capture`. Yields logits, float32 (chunk,
        vocab_size), and those inputs by matmul, each float32 (chunk, features). With `start` over 0 the preset gives
        the KV of what comes before.
        """
        self._load_preset(start)
        return self.continue_from(token_ids, start, chunk=chunk, captures=captures)

    def run_once(
        self, token_ids: Sequence[int], *, start: int, inputs: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Run a document from `start` on in one chunk, with the graph's further inputs.

        Returns logits, float32 (len(token_ids) - start, vocab_size).
        """
        self._load_preset(start)
        logits, *_ = self._run(np.asarray(token_ids[start:], np.int64)[None], start, (), inputs)
        return np.asarray(logits[0])

    def _load_preset(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        assert self._preset is not None, "the first positions have no KV"
        for index, array in enumerate(self._kv):
            layer, part = divmod(index, 2)
            array[0, :, :num_tokens] = self._preset[layer, part, :, :num_tokens]

    def continue_from(
        self, token_ids: Sequence[int], start: int, *, chunk: int = CHUNK, captures: Sequence[str] = ()
    ) -> Iterator[tuple[NDArray[np.float32], Mapping[str, NDArray[np.float32]]]]:
        """Run a document from `start` on after whatever is in the buffers before it. Yields what `run` yields."""
        for begin in range(start, len(token_ids), chunk):
            ids = np.asarray(token_ids[begin : begin + chunk], np.int64)[None]
            logits, *captured = (array[0] for array in self._run(ids, begin, captures, {}))
            yield logits, dict(zip(captures, captured, strict=True))

    def kv_peaks(self, num_tokens: int) -> NDArray[np.float32]:
        """Return the largest magnitudes of each channel in the KV of the last document's first tokens.

        (layers, 2, kv_heads, head_dim).
        """
        peaks = np.stack([np.abs(array[0, :, :num_tokens]).max(axis=1) for array in self._kv])
        return peaks.reshape(-1, 2, *peaks.shape[1:])

    def keys_and_values(self, num_tokens: int) -> NDArray[np.float32]:
        """Return a copy of the KV of the last document's first tokens, (layers, 2, kv_heads, num_tokens, head_dim)."""
        stacked = np.stack([array[0, :, :num_tokens] for array in self._kv])
        return stacked.reshape(-1, 2, *stacked.shape[1:])

    def _run(
        self, ids: NDArray[np.int64], past: int, captures: Sequence[str], inputs: Mapping[str, NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """Return logits and captured inputs of a run, all with B as their first axis."""
        total = past + ids.shape[1]
        binding = self._session.io_binding()
        # Kept until the run returns: a binding may refer to an array's memory.
        bound: dict[str, NDArray[Any]] = {
            "input_ids": ids,
            "num_logits": np.asarray([ids.shape[1]], np.int64),
            "seqlens_k": np.full(len(ids), total - 1, np.int32),
            "total_sequence_length": np.asarray([total], np.int32),
            **inputs,
        }
        for name, array in bound.items():
            binding.bind_cpu_input(name, array)
        # Outputs come back in binding order: the wanted ones first.
        names = ["logits", *(f"capture.{name}" for name in captures)]
        for name in names:
            binding.bind_output(name, "cpu")
        unused = np.zeros((1, *self._kv[0].shape[1:2], 0, self._kv[0].shape[3]), np.int8)
        if self._has_int8_cache:
            binding.bind_cpu_input("is_prompt", np.asarray(True))
        values = [ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0) for array in self._kv]
        for index, value in enumerate(values):
            layer, part = divmod(index, 2)
            name = f"{('key', 'value')[part]}.{layer}"
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
            if self._has_int8_cache:
                binding.bind_cpu_input(f"past_{('key', 'value')[part]}_int8.{layer}", unused)
        self._session.run_with_iobinding(binding)
        return [output.numpy() for output in binding.get_outputs()[: len(names)]]
