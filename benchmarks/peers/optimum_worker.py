"""The decoder that optimum exports, quantised by onnxruntime's quantize_dynamic, as an engine of the benchmark.

A graph that concatenates past and present in every step. Run through ONNX Runtime directly, its outputs handed back as
inputs without a copy, so that optimum's own Python costs nothing here. Options: `model` (an ONNX file). Run by
`contest.py` in the environment of requirements/optimum.txt.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import onnxruntime as ort
from worker import NotMeasurableError, TokenIds, serve


class OptimumGraph:
    """One session, and the KV of one batch, whose rows all have one length."""

    def load(self, threads: int, streams: int, context: int, options: dict[str, Any]) -> None:  # noqa: ARG002
        """Load the graph with ONNX Runtime's default optimisations."""
        session_options = ort.SessionOptions()
        session_options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(options["model"]), session_options, providers=["CPUExecutionProvider"])
        self._past_inputs = [value for value in self._session.get_inputs() if value.name.startswith("past_key_values")]
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._past: list[Any] = []
        self._rows = 0
        self._length = 0

    def about(self) -> dict[str, Any]:
        """Versions and settings."""
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("optimum-onnx", "onnxruntime")]
        return {"version": ", ".join(versions), "settings": "quantize_dynamic, per channel; float32 KV, concatenated"}

    def prepare(self, streams: int, length: int) -> int:
        """Cut the KV off, by a copy."""
        kept = min(length, self._length) if streams == self._rows else 0
        if not kept:
            _, heads, _, size = self._past_inputs[0].shape
            empty = np.zeros((streams, heads, 0, size), np.float32)
            self._past = [ort.OrtValue.ortvalue_from_numpy(empty) for _ in self._past_inputs]
        elif kept < self._length:
            cut = (np.ascontiguousarray(value.numpy()[:, :, :kept]) for value in self._past)
            self._past = [ort.OrtValue.ortvalue_from_numpy(array) for array in cut]
        self._rows = streams
        self._length = kept
        return kept

    def prefill(self, stream: int, token_ids: TokenIds) -> int:
        """Run a prompt as the only row, in one run."""
        if stream:
            raise NotMeasurableError("rows of different lengths would need padding")
        if not self._rows:
            self.prepare(1, 0)
        return self._run(token_ids[None, :])[0]

    def prefill_all(self, token_ids: TokenIds) -> list[int]:
        """Run all rows' prompts in one run."""
        return self._run(token_ids)

    def decode(self, token_ids: list[int]) -> list[int]:
        """One token of each row."""
        return self._run(np.asarray(token_ids, np.int64)[:, None])

    def _run(self, token_ids: TokenIds) -> list[int]:
        rows, length = token_ids.shape
        positions = np.broadcast_to(np.arange(self._length, self._length + length), (rows, length))
        inputs = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(token_ids)),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(np.ones((rows, self._length + length), np.int64)),
            "position_ids": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(positions)),
        }
        inputs |= {value.name: past for value, past in zip(self._past_inputs, self._past, strict=True)}
        logits, *self._past = self._session.run_with_ort_values(self._outputs, inputs)
        self._length += length
        return [int(token) for token in logits.numpy()[:, -1].argmax(axis=1)]


if __name__ == "__main__":
    serve(OptimumGraph())
