"""onnxruntime-genai as an engine of the benchmark, through its Generator.

A Generator's rows all have one length and one prompt each, given at once: several streams are measured as such a batch.
Options: `model` (a directory of its model builder). Run by `contest.py` in the environment of
requirements/onnxruntime-genai.txt.
"""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from worker import NotMeasurableError, TokenIds, serve

# After `rewind_to` a Generator wants tokens before it goes on.
_TOKENS_AFTER_REWIND = 8


class OnnxRuntimeGenAI:
    """One model; a Generator for each size of batch, made anew where it cannot be rewound."""

    def load(self, threads: int, streams: int, context: int, options: dict[str, Any]) -> None:  # noqa: ARG002
        """Load the model; its own configuration, but for the threads and an end token that does not come."""
        genai.disable_telemetry_events()
        config = genai.Config(str(options["model"]))
        model = {"decoder": {"session_options": {"intra_op_num_threads": threads}}, "eos_token_id": [self._NO_TOKEN]}
        config.overlay(json.dumps({"model": model}))
        self._model = genai.Model(config)
        self._context = context
        self._generator: Any = None
        self._rows = 0

    # The last row of the vocabulary: a chat that ended early would be measured as a fast one.
    _NO_TOKEN = 49_151

    def about(self) -> dict[str, Any]:
        """Versions and settings."""
        version = importlib.metadata.version("onnxruntime-genai")
        ort = importlib.metadata.version("onnxruntime")
        return {"version": f"onnxruntime-genai {version}, onnxruntime {ort}", "settings": "int8 blocks, float32 KV"}

    def prepare(self, streams: int, length: int) -> int:
        """Rewind; a batch of several rows is made anew."""
        keep = length - _TOKENS_AFTER_REWIND
        if streams == self._rows == 1 and keep > 0 and self._generator.token_count() > keep:
            self._generator.rewind_to(keep)
            return keep
        self._generator = None
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(
            batch_size=streams, max_length=self._context, do_sample=False, past_present_share_buffer=True
        )
        self._generator = genai.Generator(self._model, parameters)
        self._rows = streams
        return 0

    def prefill(self, stream: int, token_ids: TokenIds) -> int:
        """Append a prompt to the only row."""
        if stream:
            raise NotMeasurableError("a Generator takes the prompts of all its rows at once")
        if not self._rows:
            self.prepare(1, 0)
        self._generator.append_tokens(token_ids.astype(np.int32))
        return self.decode([0])[0]

    def prefill_all(self, token_ids: TokenIds) -> list[int]:
        """Append all rows' prompts."""
        self._generator.append_tokens(token_ids.astype(np.int32))
        return self.decode([])

    def decode(self, token_ids: list[int]) -> list[int]:  # noqa: ARG002 -- it keeps them itself
        """Run the tokens that it chose itself, and choose the next ones."""
        self._generator.generate_next_token()
        return [int(token) for token in self._generator.get_next_tokens()]


if __name__ == "__main__":
    serve(OnnxRuntimeGenAI())
