"""llama.cpp as an engine of the benchmark: the C interface as its own server uses it, without the Python classes.

One context, one batch for all sequences, flash attention, 512 tokens at once: its default, and here faster than 64 or
128. Options: `model`, `kv` ("f16" or "q8_0"), `repack` (whether weights are copied into the order that AMX or Arm
kernels want, which is its default). Run by `contest.py` in the environment of requirements/llama-cpp.txt.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from worker import NotMeasurableError, TokenIds, serve

_KV_TYPES = {"f16": 1, "q8_0": 8}  # ggml_type
_BATCH_SIZE = 512
_LOG = llama_cpp.llama_log_callback(lambda *_: None)


class LlamaCpp:
    """One llama_context."""

    def load(self, threads: int, streams: int, context: int, options: dict[str, Any]) -> None:
        """Load the model as a mapped file; what is repacked is copied."""
        llama_cpp.llama_log_set(_LOG, None)
        llama_cpp.llama_backend_init()
        model_parameters = llama_cpp.llama_model_default_params()
        model_parameters.use_extra_bufts = bool(options["repack"])
        self._model = llama_cpp.llama_model_load_from_file(str(options["model"]).encode(), model_parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {options['model']}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context * streams
        parameters.n_seq_max = streams
        parameters.n_batch = parameters.n_ubatch = _BATCH_SIZE
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.type_k = parameters.type_v = _KV_TYPES[options["kv"]]
        # A part of the cache for each sequence: the server's default, and faster where no prefix is shared.
        parameters.kv_unified = False
        parameters.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_BATCH_SIZE, 0, 1)
        self._lengths = [0] * streams
        self._options = options

    def about(self) -> dict[str, Any]:
        """Versions and settings."""
        return {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "settings": f"flash attention, KV {self._options['kv']}, n_ubatch {_BATCH_SIZE}"
            + (", repacked" if self._options["repack"] else ""),
            "features": llama_cpp.llama_print_system_info().decode().strip(" |\n"),
        }

    def prepare(self, streams: int, length: int) -> int:
        """Cut the sequences off."""
        kept = min(length, *self._lengths[:streams])
        for stream in range(streams):
            if not llama_cpp.llama_memory_seq_rm(self._memory, stream, kept, -1):
                raise NotMeasurableError("llama.cpp cannot cut a sequence off")
            self._lengths[stream] = kept
        return kept

    def prefill(self, stream: int, token_ids: TokenIds) -> int:
        """Run a prompt in batches."""
        for start in range(0, len(token_ids), _BATCH_SIZE):
            part = token_ids[start : start + _BATCH_SIZE]
            last = start + len(part) == len(token_ids)
            for index, token in enumerate(part):
                self._put(index, int(token), stream, logits=last and index == len(part) - 1)
            self._run(len(part))
        return self._likeliest(len(part) - 1)

    def prefill_all(self, token_ids: TokenIds) -> None:
        """One by one."""

    def decode(self, token_ids: list[int]) -> list[int]:
        """One token of each sequence, in one batch."""
        for stream, token in enumerate(token_ids):
            self._put(stream, token, stream, logits=True)
        self._run(len(token_ids))
        return [self._likeliest(stream) for stream in range(len(token_ids))]

    def _put(self, index: int, token: int, stream: int, *, logits: bool) -> None:
        batch = self._batch
        batch.token[index] = token
        batch.pos[index] = self._lengths[stream]
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = stream
        batch.logits[index] = logits
        self._lengths[stream] += 1

    def _run(self, num_tokens: int) -> None:
        self._batch.n_tokens = num_tokens
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def _likeliest(self, index: int) -> int:
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self._vocab_size)).contents
        return int(np.frombuffer(address, np.float32).argmax())


if __name__ == "__main__":
    serve(LlamaCpp())
