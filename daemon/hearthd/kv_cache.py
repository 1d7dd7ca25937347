"""Which token ids the KV of each slot holds, for whom, and what of it a new prompt can reuse.

A slot that no sequence holds keeps its tokens, so that the next turn of a conversation finds them; but none whose KV
differs in a bit from what a prefill would write, so that a cache changes no answer. Those that an answer wrote are
remembered as unread: the engine reads them while nobody waits. Reuse is bound to an identity: by
the time that a prompt takes, a caller could otherwise learn what others have asked.

Knows no scheduling; moves KV only through `Runner`, the engine's view of a model. Called by `engine`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["KVCache", "Place", "RunTerminated", "Runner"]


class RunTerminated(Exception):  # noqa: N818 - not an error: somebody asked for it
    """`Runner.terminate` stopped the forward in the middle. No KV position before its past lengths has changed."""


class Runner(Protocol):
    """What the engine needs of a model: token ids and KV slots in, logits out.

    All methods but `terminate` are called by the inference thread alone.
    """

    @property
    def num_slots(self) -> int:
        """KV slots, each of `context_length` positions."""

    @property
    def context_length(self) -> int:
        """Positions of a slot."""

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits; at least the tokenizer's number of ids."""

    @property
    def min_run(self) -> int:
        """Tokens that belong into one run at least, for KV and logits that do not depend on where a text was cut.

        If it is over 1, decoding writes other bits than prefill would: such KV serves its own answer alone.
        """

    @property
    def preset_tokens(self) -> tuple[int, ...]:
        """Token ids whose KV the bundle carries, maybe none."""

    def load_preset(self, slot: int) -> None:
        """Write the preset tokens' KV to the slot's first positions."""

    def forward(
        self, token_ids: NDArray[np.int64], first_slot: int, past_lengths: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Run S tokens of B sequences; return the logits after each one's last token.

        token_ids: int64 (B, S). Row b belongs to slot first_slot + b; the KV of its tokens is written from position
        past_lengths[b] on, past_lengths: int32 (B,). Returns float32 (B, V), valid until the next call.
        Raises RunTerminated if `terminate` stopped it.
        """

    def rest(self) -> None:
        """Give back memory that only a run needs: there will be none for a while, perhaps."""

    def swap_slots(self, a: int, b: int, num_tokens: int) -> None:
        """Exchange the first num_tokens positions of two slots."""

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first num_tokens positions of one slot to another."""

    def terminate(self) -> None:
        """Stop the forward that runs now, from any thread; it raises RunTerminated. The next forward works."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sequence's KV goes, and what is there already."""

    slot: int
    num_past: int
    """Positions that hold the prompt's first tokens; less than the prompt has."""
    num_cached: int
    """Those of them that an earlier sequence computed; the others came with the bundle."""


@dataclass(slots=True)
class _Slot:
    tokens: list[int] = field(default_factory=list)
    num_reusable: int = 0
    """The first of them, whose KV is what a prefill of the same tokens writes, bit for bit."""
    unread: list[int] = field(default_factory=list)
    """Of an idle slot: the tokens of an answer that came behind those, without KV that can be reused."""
    identity: str = ""
    is_held: bool = False
    last_used: int = 0


class KVCache:
    """The books of all slots. A slot is held by one sequence, or idle."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._slots = [_Slot() for _ in range(runner.num_slots)]
        self._num_releases = 0

    @property
    def has_idle_slot(self) -> bool:
        """Whether `acquire` can give one."""
        return any(not slot.is_held for slot in self._slots)

    def num_tokens(self, slot: int) -> int:
        """Positions of a slot that hold a token's KV."""
        return len(self._slots[slot].tokens)

    def acquire(self, prompt_ids: Sequence[int], identity: str) -> Place:
        """Take an idle slot, with as much of the prompt's KV in it as can be had without computing.

        At least `Runner.min_run` tokens of the prompt are left to run, if it has as many. There must be an idle slot.
        """
        source, num_shared = self._longest_shared(prompt_ids, identity)
        target = self._least_valuable()
        preset = self._runner.preset_tokens
        num_preset = min(len(preset), self._reusable(prompt_ids)) if tuple(prompt_ids[: len(preset)]) == preset else 0
        num_cached = 0
        if num_shared > num_preset:
            num_past = num_cached = num_shared
            num_lost = self.num_tokens(source) - num_shared
            if not self._slots[source].is_held and num_lost <= self.num_tokens(target):
                target = source  # going on there throws away less than copying over another slot would
            else:
                self.forget(target)
                self._runner.copy_slot(source, target, num_shared)
        else:
            num_past = num_preset
            self.forget(target)
            if num_preset:
                self._runner.load_preset(target)
        slot = self._slots[target]
        slot.tokens = list(prompt_ids[:num_past])
        slot.num_reusable = num_past
        slot.unread = []
        slot.identity = identity
        slot.is_held = True
        return Place(target, num_past, num_cached)

    def _reusable(self, prompt_ids: Sequence[int]) -> int:
        """How many of a prompt's tokens need not be run."""
        return max(len(prompt_ids) - self._runner.min_run, 0)

    def extend(self, slot: int, token_ids: Sequence[int]) -> None:
        """Note that one run wrote the KV of further tokens behind those that are there."""
        held = self._slots[slot]
        if held.num_reusable == len(held.tokens) and len(token_ids) >= self._runner.min_run:
            held.num_reusable += len(token_ids)
        held.tokens.extend(token_ids)

    def release(self, slot: int) -> None:
        """Let a slot go idle. It keeps its reusable tokens for prompts of the same identity."""
        self._num_releases += 1
        released = self._slots[slot]
        released.unread = released.tokens[released.num_reusable :]
        del released.tokens[released.num_reusable :]
        released.is_held = False
        released.last_used = self._num_releases

    def forget(self, slot: int) -> None:
        """Note that a slot holds nothing of use: a run over it failed."""
        self._slots[slot].tokens = []
        self._slots[slot].num_reusable = 0
        self._slots[slot].unread = []

    def next_unread(self, most: int) -> tuple[int, list[int]] | None:
        """Return the idle slot that was used last of those with unread tokens, and the next of them, `most` or so."""
        min_run = self._runner.min_run
        found = [number for number, slot in enumerate(self._slots) if not slot.is_held and len(slot.unread) >= min_run]
        if not found:
            return None
        number = max(found, key=lambda number: self._slots[number].last_used)
        unread, size = self._slots[number].unread, max(most, min_run)
        # A rest that is too small for a run of its own goes along.
        return number, unread[: len(unread) if len(unread) - size < min_run else size]

    def note_read(self, slot: int, num_tokens: int) -> None:
        """Note that the next unread tokens of an idle slot were run."""
        idle = self._slots[slot]
        idle.tokens.extend(idle.unread[:num_tokens])
        idle.num_reusable = len(idle.tokens)
        del idle.unread[:num_tokens]

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots, with all that is known of them."""
        num_a, num_b = self.num_tokens(a), self.num_tokens(b)
        if num_a and num_b:
            self._runner.swap_slots(a, b, max(num_a, num_b))
        elif num_a:
            self._runner.copy_slot(a, b, num_a)
        elif num_b:
            self._runner.copy_slot(b, a, num_b)
        self._slots[a], self._slots[b] = self._slots[b], self._slots[a]

    def _longest_shared(self, prompt_ids: Sequence[int], identity: str) -> tuple[int, int]:
        """Find the slot that shares most tokens with a prompt's beginning; also one that runs, which can be copied."""
        best, most = 0, 0
        for number, slot in enumerate(self._slots):
            if slot.identity == identity:
                num_shared = min(_num_shared(slot.tokens, prompt_ids), slot.num_reusable)
                # Equal ones: rather one that can be taken as it is.
                if num_shared > most or (num_shared == most and self._slots[best].is_held):
                    best, most = number, num_shared
        return best, min(most, self._reusable(prompt_ids))

    def _least_valuable(self) -> int:
        """Choose the idle slot that is empty, or else was used least recently."""
        idle = [number for number, slot in enumerate(self._slots) if not slot.is_held]
        return min(idle, key=lambda number: (bool(self._slots[number].tokens), self._slots[number].last_used))


def _num_shared(a: Sequence[int], b: Sequence[int]) -> int:
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))
