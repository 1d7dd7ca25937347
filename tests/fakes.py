"""A runner without a model, strict about everything that the real one takes on trust.

It keeps the token id of every position of every slot, refuses any call that would read a position that was not
written, and makes logits out of a slot's WHOLE history of tokens. So one wrong position, one row of another slot, or
one swap too few changes the answer. `expected_tokens` says what the answer is without slots, chunks and batches.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hearthd.kv_cache import RunTerminated
from hearthd.sampling import Sampler, SamplingParams

__all__ = ["FakeRunner", "expected_tokens", "hashed_logits", "scripted"]

Logits = Callable[[Sequence[int]], NDArray[np.float32]]

_GARBAGE = -1


def hashed_logits(vocab_size: int, *, seed: int = 0) -> Logits:
    """Make logits that depend on every token before, and on nothing else."""

    def logits_after(history: Sequence[int]) -> NDArray[np.float32]:
        digest = hashlib.blake2b(np.array(history, np.int64).tobytes(), digest_size=8, key=bytes([seed])).digest()
        return np.random.default_rng(int.from_bytes(digest)).standard_normal(vocab_size, np.float32) * 3

    return logits_after


def scripted(vocab_size: int, num_prompt_tokens: int, answer_ids: Sequence[int]) -> Logits:
    """Make logits that spell one answer after a prompt of so many tokens, then its last token for ever."""

    def logits_after(history: Sequence[int]) -> NDArray[np.float32]:
        place = min(len(history) - num_prompt_tokens, len(answer_ids) - 1)
        logits = np.zeros(vocab_size, np.float32)
        logits[answer_ids[max(place, 0)]] = 10
        return logits

    return logits_after


def expected_tokens(
    logits_after: Logits,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    eos_ids: frozenset[int] = frozenset(),
    context_length: int = 10**6,
) -> list[int]:
    """Generate an answer in the plainest way there is, one sequence alone; stop strings are not looked at."""
    sampler = Sampler(params, prompt_ids)
    history = list(prompt_ids)
    while len(history) - len(prompt_ids) < params.max_tokens and len(history) < context_length:
        history.append(sampler.sample(logits_after(history)))
        if history[-1] in eos_ids:
            break
    return history[len(prompt_ids) :]


class FakeRunner:
    """A `Runner`. Thread rules are the real one's: `terminate`, `allow` and the waits may come from any thread."""

    def __init__(
        self,
        *,
        num_slots: int = 4,
        context_length: int = 256,
        vocab_size: int = 262,
        preset_tokens: tuple[int, ...] = (),
        min_run: int = 1,
        logits_after: Logits | None = None,
        is_gated: bool = False,
    ) -> None:
        """logits_after: from a slot's history; `hashed_logits` if None. is_gated: each forward waits for `allow`."""
        self.num_slots = num_slots
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.preset_tokens = preset_tokens
        self.min_run = min_run
        self.num_rests = 0
        self.logits_after = logits_after or hashed_logits(vocab_size)
        self.fail_next: Exception | None = None
        """Raised by the next forward, which leaves garbage behind."""
        self.slots: list[list[int]] = [[] for _ in range(num_slots)]
        self.calls: list[tuple[int, int, int]] = []
        """(first slot, B, S) of every forward that was begun."""
        self.num_copied = 0
        """Positions that were swapped or copied."""
        self._logits = np.zeros((0, vocab_size), np.float32)
        self._is_gated = is_gated
        self._num_allowed = 0
        self._is_running = False
        self._must_terminate = False
        self._changed = threading.Condition()

    @property
    def num_forwards(self) -> int:
        """Forwards that were begun."""
        return len(self.calls)

    def allow(self, count: int = 1) -> None:
        """Let so many further forwards of a gated runner pass."""
        with self._changed:
            self._num_allowed += count
            self._changed.notify_all()

    def open_gate(self) -> None:
        """Let all forwards pass from now on."""
        with self._changed:
            self._is_gated = False
            self._changed.notify_all()

    def wait_for_forwards(self, count: int, timeout_seconds: float = 30.0) -> None:
        """Return when so many forwards were begun since the start; AssertionError if they are not."""
        with self._changed:
            begun = self._changed.wait_for(lambda: len(self.calls) >= count, timeout_seconds)
        assert begun, f"{len(self.calls)} forwards were begun, {count} were waited for"

    def terminate(self) -> None:
        """Stop the forward that waits at the gate; without one, no effect."""
        with self._changed:
            if self._is_running:
                self._must_terminate = True
                self._changed.notify_all()

    def forward(
        self, token_ids: NDArray[np.int64], first_slot: int, past_lengths: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        assert token_ids.dtype == np.int64
        assert past_lengths.dtype == np.int32
        num_rows, length = token_ids.shape
        assert past_lengths.shape == (num_rows,)
        assert num_rows >= 1
        assert length >= 1
        assert 0 <= first_slot <= self.num_slots - num_rows, "rows outside of the slots"
        histories = []
        for row, past in enumerate(past_lengths.tolist()):
            written = self.slots[first_slot + row]
            assert 0 <= past <= len(written), f"slot {first_slot + row} has {len(written)} positions, {past} were read"
            assert _GARBAGE not in written[:past], f"slot {first_slot + row} is read where its KV is garbage"
            assert past + length <= self.context_length, "a run beyond the slot's end"
            histories.append([*written[:past], *token_ids[row].tolist()])
            # Until the run has ended well, nobody knows what stands behind the past length.
            self.slots[first_slot + row] = [*written[:past], *[_GARBAGE] * length]
        self._pass_gate((first_slot, num_rows, length))
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        for row, history in enumerate(histories):
            self.slots[first_slot + row] = history
        # The real one uses its buffers again, so logits that somebody kept must change.
        self._logits[:] = np.nan
        self._logits = np.stack([self.logits_after(history) for history in histories])
        return self._logits

    def _pass_gate(self, call: tuple[int, int, int]) -> None:
        with self._changed:
            self._is_running = True
            self.calls.append(call)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_gated or self._num_allowed > 0 or self._must_terminate)
            self._is_running = False
            if self._must_terminate:
                self._must_terminate = False
                raise RunTerminated
            if self._is_gated:
                self._num_allowed -= 1

    def rest(self) -> None:
        self.num_rests += 1

    def load_preset(self, slot: int) -> None:
        assert self.preset_tokens
        self.slots[slot] = list(self.preset_tokens)

    def swap_slots(self, a: int, b: int, num_tokens: int) -> None:
        assert a != b
        self.num_copied += 2 * num_tokens
        # What lies beyond stays where it is, and belongs to neither.
        self.slots[a], self.slots[b] = self.slots[b][:num_tokens], self.slots[a][:num_tokens]

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        assert source != target
        assert num_tokens <= len(self.slots[source])
        self.num_copied += num_tokens
        self.slots[target] = self.slots[source][:num_tokens]
