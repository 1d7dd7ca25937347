"""A runner without a model, strict about everything that the real one takes on trust.

It keeps the token id of every position of every slot, refuses any call that would read a position that was not written
or fill more memory than the budget has, and makes logits out of a slot's WHOLE history of tokens. So one wrong
position, one row of another slot, or one swap too few changes the answer. `expected_tokens` says what the answer is
without slots, chunks and batches.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hearthd.kv.budget import KVBudget
from hearthd.kv.kv_cache import RunTerminated
from hearthd.sequences.sampling import Sampler, SamplingParams

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
        kv_budget: KVBudget | None = None,
    ) -> None:
        """logits_after: from a slot's history; `hashed_logits` if None. is_gated: each forward waits for `allow`.

        kv_budget: None for as much as all slots need, and the reading of a prompt.
        """
        self.num_slots = num_slots
        self.kv_budget = kv_budget or KVBudget(4, (num_slots + 4) * -(-context_length // 4), 4)
        self.context_length = min(context_length, self.kv_budget.context_length)
        self.vocab_size = vocab_size
        self.preset_tokens = preset_tokens
        self.min_run = min_run
        self.num_rests = 0
        self.num_threads = 4
        self.load_seconds = 0.5
        self.thread_changes: list[int] = []
        self.logits_after = logits_after or hashed_logits(vocab_size)
        self.fail_next: Exception | None = None
        """Raised by the next forward, which leaves garbage behind."""
        self.slots: list[list[int]] = [[] for _ in range(num_slots)]
        self.calls: list[tuple[int, int, int]] = []
        """(first slot, B, S) of every forward that was begun."""
        self.most_blocks = 0
        """That were in use at any moment."""
        self._touched = [0] * num_slots
        self._prompt_touched = 0
        self.num_copied = 0
        """Positions that were swapped or copied."""
        self.can_verify = True
        self.verified: list[int] = []
        """Tokens of every run to verify; each of them is a forward in the other books."""
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
            self._touch(first_slot + row, past + length)
            if length > 1:
                self._prompt_touched = max(self._prompt_touched, past + length)
            # Until the run has ended well, nobody knows what stands behind the past length.
            self.slots[first_slot + row] = [*written[:past], *[_GARBAGE] * length]
        self._count_blocks()
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

    def verify(self, token_ids: NDArray[np.int64], slot: int, num_past: int) -> NDArray[np.float32]:
        assert self.can_verify
        self.verified.append(len(token_ids))
        positions = np.arange(num_past, num_past + len(token_ids), dtype=np.int32)
        rows = [
            self.forward(np.asarray([[token_id]]), slot, positions[at : at + 1])[0].copy()
            for at, token_id in enumerate(token_ids.tolist())
        ]
        self._logits = np.stack(rows)
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

    def change_threads(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self.thread_changes.append(num_threads)

    def rest(self) -> None:
        self.num_rests += 1

    def load_preset(self, slot: int) -> None:
        assert self.preset_tokens
        self.slots[slot] = list(self.preset_tokens)
        self._touch(slot, len(self.preset_tokens))

    def swap_slots(self, a: int, b: int, num_a: int, num_b: int) -> None:
        assert a != b
        self.num_copied += num_a + num_b
        self.give_back(a, num_a)
        self.give_back(b, num_b)
        self.slots[a], self.slots[b] = self.slots[b][:num_b], self.slots[a][:num_a]
        self._touched[a], self._touched[b] = self._touched[b], self._touched[a]

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        assert source != target
        assert num_tokens <= len(self.slots[source])
        self.num_copied += num_tokens
        self.slots[target] = self.slots[source][:num_tokens]
        self._touch(target, num_tokens)
        self._count_blocks()

    kv_token_bytes = 8

    def read_kv(self, slot: int, start: int, end: int) -> bytes:
        assert _GARBAGE not in self.slots[slot][:end]
        assert end <= len(self.slots[slot])
        return np.array(self.slots[slot][start:end], np.int64).tobytes()

    def write_kv(self, slot: int, start: int, kv: bytes, num_skipped: int) -> None:
        tokens = np.frombuffer(kv, np.int64).tolist()[num_skipped:]
        start += num_skipped
        assert start <= len(self.slots[slot])
        self.slots[slot] = [*self.slots[slot][:start], *tokens]
        self._touch(slot, start + len(tokens))
        self._count_blocks()

    def give_back(self, slot: int, num_tokens: int) -> None:
        if self.kv_budget.blocks(num_tokens) < self.kv_budget.blocks(self._touched[slot]):
            self._touched[slot] = self.kv_budget.blocks(num_tokens) * self.kv_budget.block_tokens
            # The rest of the last block is still there.
            self.slots[slot] = self.slots[slot][: self._touched[slot]]

    def give_back_prompt(self, num_tokens: int) -> None:
        self._prompt_touched = min(self._prompt_touched, num_tokens)

    @property
    def num_blocks(self) -> int:
        """Blocks that are in use."""
        budget = self.kv_budget
        return sum(map(budget.blocks, self._touched)) + budget.prompt_blocks(self._prompt_touched)

    def _touch(self, slot: int, end: int) -> None:
        self._touched[slot] = max(self._touched[slot], end)

    def _count_blocks(self) -> None:
        self.most_blocks = max(self.most_blocks, self.num_blocks)
        assert self.num_blocks <= self.kv_budget.num_blocks, "more KV than the budget has"
