"""The build's own runs of a graph: every position's logits, and every matmul's input.

Serving has `runner.OnnxRunner`, made for speed; this is made for looking. Knows the graph contract, nothing of recipes.
Called by `calibrate` and `quality`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hearthd.build.architecture import DecoderSpec

__all__ = ["CHUNK", "GraphSession"]

# Positions in one run: bounds the memory for logits (64 x 49,152 x 4 bytes = 12.6 MB) and for captured activations.
CHUNK = 64


class GraphSession:
    """A graph written with `all_logits`, run on one document after another."""

    def __init__(
        self,
        model: bytes,
        spec: DecoderSpec,
        *,
        data_directory: Path,
        context_length: int,
        num_threads: int,
        preset: NDArray[np.float32] | None = None,
    ) -> None:
        """Load a graph whose weights stand in `data_directory`.

        preset: KV of a document's first tokens, float32 (layers, 2, kv_heads, tokens, head_dim), instead of a run.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        # Repacked weights are a second copy of them in memory: a reference of 540 MB would take 1.1 GB.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data_directory))
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._captures = [output.name for output in self._session.get_outputs() if output.name.startswith("capture.")]
        cache = (1, spec.num_kv_heads, context_length, spec.padded_head_dim)
        self._kv = [np.zeros(cache, np.float32) for _ in range(2 * spec.num_layers)]
        self._preset = preset

    def run(
        self, token_ids: Sequence[int], *, start: int = 0, chunk: int = CHUNK
    ) -> Iterator[tuple[NDArray[np.float32], Mapping[str, NDArray[np.float32]]]]:
        """Run a document from its position `start`, a chunk at a time.

        Yields logits, float32 (chunk, vocab_size), and the captured inputs by matmul, each float32 (chunk, features).
        With `start` over 0 the preset gives the KV of what comes before.
        """
        if start:
            assert self._preset is not None, "positions before start have no KV"
            for index, array in enumerate(self._kv):
                layer, part = divmod(index, 2)
                array[0, :, :start] = self._preset[layer, part, :, :start]
        return self.continue_from(token_ids, start, chunk=chunk)

    def continue_from(
        self, token_ids: Sequence[int], start: int, *, chunk: int = CHUNK
    ) -> Iterator[tuple[NDArray[np.float32], Mapping[str, NDArray[np.float32]]]]:
        """Run a document from `start` on after whatever is in the buffers before it. Yields what `run` yields."""
        for begin in range(start, len(token_ids), chunk):
            ids = np.asarray(token_ids[begin : begin + chunk], np.int64)[None]
            yield self._run_chunk(ids, begin)

    def keys_and_values(self, num_tokens: int) -> NDArray[np.float32]:
        """Return a copy of the KV of the last document's first tokens, (layers, 2, kv_heads, num_tokens, head_dim)."""
        stacked = np.stack([array[0, :, :num_tokens] for array in self._kv])
        return stacked.reshape(-1, 2, *stacked.shape[1:])

    def _run_chunk(
        self, ids: NDArray[np.int64], past: int
    ) -> tuple[NDArray[np.float32], Mapping[str, NDArray[np.float32]]]:
        total = past + ids.shape[1]
        binding = self._session.io_binding()
        inputs = {
            "input_ids": ids,
            "seqlens_k": np.asarray([total - 1], np.int32),
            "total_sequence_length": np.asarray([total], np.int32),
        }
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        # Outputs come back in binding order: the wanted ones first.
        names = ["logits", *self._captures]
        for name in names:
            binding.bind_output(name, "cpu")
        values = [ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0) for array in self._kv]
        for index, value in enumerate(values):
            layer, part = divmod(index, 2)
            name = f"{('key', 'value')[part]}.{layer}"
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()[: len(names)]
        arrays = [output.numpy()[0] for output in outputs]
        return arrays[0], {
            name.removeprefix("capture."): array for name, array in zip(names[1:], arrays[1:], strict=True)
        }
