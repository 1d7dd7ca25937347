"""Token ids and KV in, logits out: the only module of the serving side that imports ONNX Runtime.

Knows the graph contract (`build/decoder/graph.py`), no sequences, no text. Owned by the inference thread: only
`terminate` may be called from another one. The engine is written against `kv_cache.Runner`, which `OnnxRunner` fulfils.
"""

from __future__ import annotations

import platform
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hearthd.bundles.bundle import Bundle
from hearthd.errors import ConfigError
from hearthd.kv.runner_protocol import RunTerminated
from hearthd.runtime.kv_buffers import DecoderShape, KVSlots, PromptBuffers
from hearthd.runtime.run_buffers import Binding
from hearthd.runtime.session import open_session

__all__ = ["DecoderShape", "OnnxRunner"]

# Of a short conversation: what a configuration that gives too little memory is told to make room for.
_LEAST_TOKENS = 1024
# Chunks of prompts come in two sizes again and again: while others decode, and while nobody does.
_PROMPT_BINDINGS = 2
# Steps of a batch come in as many shapes as there are runs of neighbouring slots; few of them at a time.
_STEP_BINDINGS = 16
# Drafts come in a few lengths, of one sequence at a time.
_VERIFY_BINDINGS = 8


class OnnxRunner:
    """A decoder graph with `num_slots` static KV buffers of `context_length` positions.

    The graph says whether they are int8, as those of a bundle, or float32.
    """

    def __init__(
        self,
        model_path: Path,
        shape: DecoderShape,
        *,
        num_slots: int,
        context_length: int,
        num_threads: int,
        preset_tokens: tuple[int, ...] = (),
        preset: NDArray[Any] | None = None,
        kv_bytes: int = 0,
        num_full: int | None = None,
        has_neighbours: bool = False,
    ) -> None:
        """Load the graph. num_threads: at least 1, set explicitly, since ONNX Runtime ignores a CPU mask.

        preset: KV of `preset_tokens` as the slots hold it, (layers, 2, kv_heads, tokens, head_dim).
        kv_bytes: what KV may take at most, which may shorten the context; 0 for what `num_full` full slots (all, if
        None) and the reading of a full prompt need.
        has_neighbours: other models run in turn with this one.
        Raises BundleError if ONNX Runtime refuses the graph, ConfigError if kv_bytes is too little to say anything.
        """
        self._model_path = model_path
        self._has_neighbours = has_neighbours
        self.num_threads = num_threads
        started = time.monotonic()
        session = open_session(model_path, num_threads, has_neighbours=has_neighbours)
        self._session: ort.InferenceSession | None = session
        self.load_seconds = time.monotonic() - started
        self.num_slots = num_slots
        self.vocab_size = shape.vocab_size
        self.preset_tokens = preset_tokens
        self._preset = preset
        inputs = {value.name for value in session.get_inputs()}
        has_int8_cache = "is_prompt" in inputs
        # Graphs of bundles of manifest schema 2 have no such input.
        self._has_num_logits = "num_logits" in inputs
        self._slots = KVSlots(
            shape,
            num_slots=num_slots,
            context_length=context_length,
            dtype=np.int8 if has_int8_cache else np.float32,
        )
        self._prompt = PromptBuffers(self._slots) if has_int8_cache else None
        prompt_factor = self._prompt.factor if self._prompt else 0
        self.kv_budget = self._slots.budget(kv_bytes, num_slots if num_full is None else num_full, prompt_factor)
        if not self.kv_budget.context_length:
            # With the least that holds anything, no question would find room.
            num_tokens = min(_LEAST_TOKENS, context_length)
            least = (1 + prompt_factor) * self.kv_budget.blocks(num_tokens) * self.kv_budget.block_bytes
            raise ConfigError(
                f'engine.kv_bytes is {kv_bytes}; give at least "{-(-least // 2**20)}M", which holds a conversation of '
                f"{num_tokens} tokens with this model, or 0 for what its slots need"
            )
        self.context_length = min(context_length, self.kv_budget.context_length)
        # By first slot, rows and length, the last used at the end.
        self._bindings: dict[tuple[int, int, int], Binding] = {}
        # Of prompts in an int8 cache, by length, the last used at the end: each has KV of its own for so many tokens.
        self._prompt_bindings: dict[int, Binding] = {}
        # By slot and length, the last used at the end.
        self._verify_bindings: dict[tuple[int, int], Binding] = {}
        self._verified = np.zeros((0, self.vocab_size), np.float32)
        self._lock = threading.Lock()
        self._running: ort.RunOptions | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of `kv_budget` whose memory is in use. For any thread to read."""
        return self._slots.num_blocks + (self._prompt.num_blocks if self._prompt else 0)

    @property
    def min_run(self) -> int:
        """Two with an int8 cache: a single token of a sequence takes the kernel that adds up in another order.

        With a float32 cache one on Arm, two on x86-64, for the same reason. All longer runs agree bit for bit
        (onnxruntime 1.31.1; tests/test_real_exactness.py, `make arm64`). It matters: int8 can make half a logit of a
        last bit.
        """
        return 1 if self._prompt is None and platform.machine() in ("aarch64", "arm64") else 2

    @property
    def can_verify(self) -> bool:
        """Whether the graph gives the logits of several positions, and over int8, where runs of any length agree."""
        return self._has_num_logits and self._prompt is not None

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        *,
        num_slots: int,
        context_length: int,
        num_threads: int,
        kv_bytes: int = 0,
        num_full: int | None = None,
        has_neighbours: bool = False,
    ) -> OnnxRunner:
        """Load a bundle's graph; context_length is at most the bundle's. The rest is as of `__init__`."""
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
            kv_bytes=kv_bytes,
            num_full=num_full,
            has_neighbours=has_neighbours,
        )

    def forward(
        self, token_ids: NDArray[np.int64], first_slot: int, past_lengths: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Run tokens through the decoder and append their KV.

        token_ids: (B, S), of which B or S is 1; row b goes to slot first_slot + b, at positions past_lengths[b] and on.
        Returns the logits of each row's last token, (B, vocab_size); they are valid until the next run of the same
        shape. Raises RunTerminated if `terminate` stopped it.
        """
        num_rows, length = token_ids.shape
        past = int(past_lengths.max())
        assert past + length <= self.context_length, "a run beyond the KV buffer"
        binding = self._binding(first_slot, num_rows, length)
        binding.token_ids[:] = token_ids
        np.add(past_lengths, length - 1, out=binding.last_positions)
        binding.longest[0] = past + length
        run_options = ort.RunOptions()
        # What goes wrong is raised; a run that `terminate` stopped would be told as an error as well, in colours.
        run_options.log_severity_level = 4
        if self._prompt is not None and length > 1:
            self._prompt.hold(first_slot, past, length)
        else:
            self._release_prompt(first_slot, num_rows, run_options)
            for row, past_length in enumerate(past_lengths.tolist()):
                self._slots.touch(first_slot + row, past_length + length)
                self._keep(first_slot + row, past_length)
        self._run(binding, run_options)
        if self._prompt is not None and length > 1:
            self._slots.write(first_slot, past, [array[0] for array in binding.new])
            self._prompt.extend(past + length)
        return binding.logits[:, 0] if self._has_num_logits else binding.logits

    def verify(self, token_ids: NDArray[np.int64], slot: int, num_past: int) -> NDArray[np.float32]:
        """Run tokens of one slot as if each were a step of its own, and write their KV from num_past on.

        token_ids: (S,). Returns the logits after each of them, (S, vocab_size), valid until the next `verify`: bit for
        bit what `forward` gives for one after the other, and so is the KV. Only with `can_verify`. Raises RunTerminated
        if `terminate` stopped it.
        """
        assert self.can_verify, "the graph gives the logits of one position"
        assert num_past + len(token_ids) <= self.context_length, "a run beyond the KV buffer"
        binding = self._verify_binding(slot, len(token_ids))
        binding.token_ids[0] = token_ids
        binding.last_positions[0] = num_past + len(token_ids) - 1
        binding.longest[0] = num_past + len(token_ids)
        run_options = ort.RunOptions()
        run_options.log_severity_level = 4
        self._release_prompt(slot, 1, run_options)
        self._slots.touch(slot, num_past + len(token_ids))
        self._keep(slot, num_past)
        self._run(binding, run_options)
        logits: NDArray[np.float32] = binding.logits[0]
        return logits

    def _release_prompt(self, first_slot: int, num_rows: int, run_options: ort.RunOptions) -> None:
        """Before a step of these slots: give back what only the run of a prompt needs, if that is done."""
        if self._prompt is not None and self._prompt.ends_reading(first_slot, num_rows):
            # It is five times what a step needs.
            run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def _binding(self, first_slot: int, num_rows: int, length: int) -> Binding:
        """Return the buffers for runs of this shape."""
        if self._prompt is not None and length > 1:
            assert num_rows == 1, "a batch of prompts"
            return self._prompt_binding(self._prompt, length)
        key = (first_slot, num_rows, length)
        binding = self._bindings.pop(key, None)
        if binding is None:
            binding = self._slot_binding(first_slot, length, self._new_logits(num_rows))
        # The last chunk of a prompt may have any length; only decode steps and full chunks come again and again.
        if length == 1 or length % 16 == 0:
            self._bindings[key] = binding
            while len(self._bindings) > _STEP_BINDINGS:
                del self._bindings[next(iter(self._bindings))]
        return binding

    def _new_logits(self, num_rows: int) -> NDArray[np.float32]:
        """Return a buffer for the logits of each row's last position."""
        shape = (num_rows, 1, self.vocab_size) if self._has_num_logits else (num_rows, self.vocab_size)
        return np.zeros(shape, np.float32)

    def _slot_binding(self, first_slot: int, length: int, logits: NDArray[np.float32]) -> Binding:
        """Return new buffers for runs over the slots' own KV. logits: as those of `Binding`."""
        binding = Binding(self._opened(), length, logits)
        # A view of a contiguous run of slots: no copy, and any such run can be a batch.
        rows = [array[first_slot : first_slot + len(logits)] for array in self._slots.arrays]
        if self._prompt is None:
            binding.bind_kv(rows, rows)
        else:
            empty = [np.zeros_like(self._prompt.arrays[0][:, :, :0])] * len(rows)
            binding.bind_input("is_prompt", np.asarray(False))
            binding.bind_kv(empty, empty)
            binding.bind_kv(rows, rows, "_int8")
        return binding

    def _verify_binding(self, slot: int, length: int) -> Binding:
        """Return the buffers for a draft in a slot. All share one buffer for logits, which may have megabytes."""
        if length > len(self._verified):
            self._verify_bindings.clear()
            self._verified = np.zeros((length, self.vocab_size), np.float32)
        binding = self._verify_bindings.pop((slot, length), None)
        if binding is None:
            binding = self._slot_binding(slot, length, self._verified[None, :length])
        self._verify_bindings[slot, length] = binding
        while len(self._verify_bindings) > _VERIFY_BINDINGS:
            del self._verify_bindings[next(iter(self._verify_bindings))]
        return binding

    def _prompt_binding(self, prompt: PromptBuffers, length: int) -> Binding:
        """Return the buffers for a chunk of a prompt, of whatever slot."""
        binding = self._prompt_bindings.pop(length, None)
        if binding is None:
            binding = Binding(self._opened(), length, self._new_logits(1))
            _, kv_heads, _, head_dim = prompt.arrays[0].shape
            unused = [np.zeros((1, kv_heads, 0, head_dim), np.int8)] * len(prompt.arrays)
            binding.new = tuple(np.zeros((1, kv_heads, length, head_dim), np.int8) for _ in prompt.arrays)
            binding.bind_input("is_prompt", np.asarray(True))
            binding.bind_kv(prompt.arrays, prompt.arrays)
            binding.bind_kv(unused, binding.new, "_int8")
        self._prompt_bindings[length] = binding
        while len(self._prompt_bindings) > _PROMPT_BINDINGS:
            del self._prompt_bindings[next(iter(self._prompt_bindings))]
        return binding

    def _run(self, binding: Binding, run_options: ort.RunOptions) -> None:
        with self._lock:
            self._running = run_options
        try:
            self._opened().run_with_iobinding(binding.io, run_options)
        except Exception as error:
            if run_options.terminate:
                raise RunTerminated from error
            raise
        finally:
            with self._lock:
                self._running = None

    def change_threads(self, num_threads: int) -> None:
        """Compute with so many threads from the next run on. KV stays, and no bit of any answer depends on it.

        Loads the graph again, which takes its time. The old one goes first: a small board has no room for both. If that
        fails, the number stays what it was, and the error is raised. Should the old graph not come back either, each
        run tries it again, and fails as long as that does.
        """
        for bindings in (self._bindings, self._prompt_bindings, self._verify_bindings):
            bindings.clear()
        self._session = None
        try:
            self._session = self._open_session(num_threads)
        except Exception:
            with suppress(Exception):
                self._session = self._open_session(self.num_threads)
            raise
        self.num_threads = num_threads

    def _open_session(self, num_threads: int) -> ort.InferenceSession:
        return open_session(self._model_path, num_threads, has_neighbours=self._has_neighbours)

    def _opened(self) -> ort.InferenceSession:
        """Return the session, which `change_threads` may have lost for want of memory."""
        if self._session is None:
            try:
                self._session = self._open_session(self.num_threads)
            except Exception as error:
                # Not one of the errors that blame a request: who fails again and again is started anew.
                raise RuntimeError("the graph that was given up cannot be loaded again") from error
        return self._session

    def terminate(self) -> None:
        """Stop the run in progress, if there is one. Any thread."""
        with self._lock:
            if self._running is not None:
                self._running.terminate = True

    def rest(self) -> None:
        """Give back memory that only a run needs."""
        if self._prompt is not None:
            self._prompt.rest()

    def load_preset(self, slot: int) -> None:
        """Write the KV of `preset_tokens` to the slot's first positions."""
        if self._preset is not None:
            self._keep(slot, 0)
            self._slots.write(slot, 0, list(self._preset.reshape(-1, *self._preset.shape[2:])))

    def swap_slots(self, a: int, b: int, num_a: int, num_b: int) -> None:
        """Exchange two slots, of which so many positions are in use."""
        self._slots.swap(a, b, num_a, num_b)
        if self._prompt is not None:
            self._prompt.swapped(a, b)

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first num_tokens positions of a slot to another."""
        self._slots.copy(source, target, num_tokens)
        if self._prompt is not None:
            self._prompt.copied(source, target, num_tokens)

    @property
    def kv_version(self) -> str:
        """What the bits of KV depend on beside bundle and processor."""
        return f"onnxruntime {ort.__version__}, {self._slots.arrays[0].dtype}"

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one position's KV."""
        return self._slots.token_bytes

    def read_kv(self, slot: int, start: int, end: int) -> bytes:
        """Return a copy of some positions' KV."""
        return self._slots.read_bytes(slot, start, end)

    def write_kv(self, slot: int, start: int, kv: bytes, num_skipped: int) -> None:
        """Write what `read_kv` gave to positions from `start` on, but for the first num_skipped of them."""
        self._keep(slot, start + num_skipped)
        self._slots.write_bytes(slot, start, kv, num_skipped)

    def give_back(self, slot: int, num_tokens: int) -> None:
        """Give back the memory of a slot behind its first num_tokens positions."""
        self._keep(slot, num_tokens)
        self._slots.give_back(slot, num_tokens)

    def give_back_prompt(self, num_tokens: int) -> None:
        """Give back what the prompt buffers have for more than so many positions."""
        if self._prompt is not None:
            self._prompt.give_back(num_tokens)

    def read_slot(self, slot: int, num_tokens: int) -> NDArray[Any]:
        """Return a copy of a slot's first positions, (layers, 2, kv_heads, num_tokens, head_dim)."""
        return self._slots.read(slot, num_tokens)

    def _keep(self, slot: int, num_tokens: int) -> None:
        """Note that a slot changes behind its first num_tokens positions."""
        if self._prompt is not None:
            self._prompt.keep(slot, num_tokens)
