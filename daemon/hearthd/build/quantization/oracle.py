"""An exported graph as the reference of a comparison: what the exporter wrote, run as it is by ONNX Runtime.

The other reference, `quality.Reference`, is Hearth's own float32 graph of the same weights: it tells what int8 costs.
This one shares no code with the bundle, so it also tells whether Hearth understood the architecture. Knows the inputs
and outputs that optimum gives a decoder with past, no bundles. Called by `builder` for `hearthd model verify
--reference`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hearthd.build.checkpoints.onnx_checkpoint import refuse_quantized
from hearthd.build.checkpoints.onnx_file import OnnxFile
from hearthd.build.quantization.session import CHUNK
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from hearthd.build.decoder.architecture import DecoderSpec

__all__ = ["Oracle", "OracleSession"]

_PAST: Final = re.compile(r"past_key_values\.\d{1,4}\.(key|value)")
_TEXT_INPUTS: Final = frozenset({"input_ids", "attention_mask", "position_ids"})
_REMEDY: Final = "export it with --task text-generation-with-past --dtype fp32"


class OracleSession:
    """An exported decoder, run on one document after another, a chunk at a time."""

    def __init__(self, graph: Path, spec: DecoderSpec, *, num_threads: int) -> None:
        """Load the graph. Raises BuildError for one that is damaged, quantised, or no decoder of this shape."""
        self._graph = graph
        # Before ONNX Runtime opens anything: it is held to the directory, and told by name what it is.
        file = OnnxFile(graph)
        try:
            refuse_quantized(graph, file)
        finally:
            file.close()
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_mem_pattern = False
        # Repacked weights are a second copy of them in memory.
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions have no base but Exception
            raise self._error(f"cannot be loaded: {' '.join(str(error).split())[:200]}") from error
        self._inputs = {each.name: each for each in self._session.get_inputs()}
        self._past = self._past_names(spec)
        self._check_types()
        outputs = {each.name for each in self._session.get_outputs()}
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._past)]
        missing = sorted(set(self._outputs) - outputs)
        if missing:
            raise self._error(f"has no output {missing[0]!r}; {_REMEDY}")
        self._vocab_size = spec.vocab_size
        self._empty = np.zeros((1, spec.num_kv_heads, 0, spec.head_dim), np.float32)
        self._kv: list[NDArray[np.float32]] = []

    def continue_from(
        self, token_ids: Sequence[int], start: int, *, chunk: int = CHUNK
    ) -> Iterator[tuple[NDArray[np.float32], Mapping[str, NDArray[np.float32]]]]:
        """Run a document from `start` on, after what was run before it; from 0 on, after nothing.

        Yields logits, float32 (chunk, vocab_size), and an empty mapping: nothing is captured.
        """
        if start == 0:
            self._kv = [self._empty] * len(self._past)
        assert all(array.shape[2] == start for array in self._kv), "positions before start have no KV"
        for begin in range(start, len(token_ids), chunk):
            yield self._run_chunk(token_ids[begin : begin + chunk], begin), {}

    def keys_and_values(self) -> NDArray[np.float32]:
        """Return a copy of the KV of all that was run, (layers, 2, kv_heads, tokens, head_dim)."""
        stacked = np.stack([array[0] for array in self._kv])
        return stacked.reshape(-1, 2, *stacked.shape[1:])

    def _run_chunk(self, token_ids: Sequence[int], past: int) -> NDArray[np.float32]:
        total = past + len(token_ids)
        feed = {
            "input_ids": np.asarray([token_ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
        }
        values = {name: array for name, array in feed.items() if name in self._inputs}
        logits, *self._kv = self._session.run(self._outputs, values | dict(zip(self._past, self._kv, strict=True)))
        if logits.shape != (1, len(token_ids), self._vocab_size):
            raise self._error(
                f"gives logits of shape {logits.shape} for {len(token_ids)} tokens; "
                f"(1, {len(token_ids)}, {self._vocab_size}) is needed"
            )
        return np.asarray(logits[0], np.float32)

    def _past_names(self, spec: DecoderSpec) -> list[str]:
        """Return the names of the KV inputs, key and value of each layer in turn."""
        names = [f"past_key_values.{layer}.{part}" for layer in range(spec.num_layers) for part in ("key", "value")]
        found = {name for name in self._inputs if _PAST.fullmatch(name)}
        if not found:
            raise self._error(f"takes no past keys and values; {_REMEDY}")
        if found != set(names):
            raise self._error(
                f"has {len(found) // 2} layers with past keys and values, config.json says {spec.num_layers}; "
                "the two are not of one export"
            )
        shape = (spec.num_kv_heads, spec.head_dim)
        for name in names:
            dimensions = self._inputs[name].shape
            heads_and_size = tuple(dimensions[1::2])
            known = all(isinstance(each, int) for each in heads_and_size)
            if len(dimensions) != 4 or (known and heads_and_size != shape):
                raise self._error(
                    f"takes {name} of shape {dimensions}, config.json says {shape[0]} KV heads of {shape[1]} features; "
                    "the two are not of one export"
                )
        return names

    def _check_types(self) -> None:
        unknown = sorted(self._inputs.keys() - _TEXT_INPUTS - set(self._past))
        if unknown or "input_ids" not in self._inputs:
            raise self._error(f"takes {', '.join(map(ascii, unknown[:3])) or 'no input_ids'}; {_REMEDY}")
        for name, each in self._inputs.items():
            expected = "tensor(float)" if name in self._past else "tensor(int64)"
            if each.type != expected:
                raise self._error(f"takes {name} as {each.type}, not {expected}; {_REMEDY}")

    def _error(self, message: str) -> BuildError:
        return BuildError(f"{self._graph}: {message}")


class Oracle:
    """The float32 graph of an export, with what `quality.compare` asks of a reference."""

    def __init__(self, graph: Path, spec: DecoderSpec, *, num_threads: int) -> None:
        """Load the graph."""
        self.session = OracleSession(graph, spec, num_threads=num_threads)

    def keys_and_values(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the KV of a conversation's first tokens, float32 (layers, 2, kv_heads, tokens, head_dim)."""
        for _ in self.session.continue_from(token_ids, 0):
            pass
        return self.session.keys_and_values()
