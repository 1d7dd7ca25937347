"""Which token ids the KV of each slot holds, for whom, and what of it a new prompt can reuse.

A slot that no sequence holds keeps its tokens, so that the next turn of a conversation finds them; but none whose KV
differs in a bit from what a prefill would write, so that a cache changes no answer. Those that an answer wrote are
remembered as unread: the engine reads them while nobody waits. Reuse is bound to an identity: by the time that a
prompt takes, a caller could otherwise learn what others have asked.

There are more slots than can be full at once. Who takes one reserves blocks of the budget for all that prompt and
answer may come to; idle tokens give way to that (`kv/eviction.py`). docs/prefix-cache.md is the whole story.

Knows no scheduling; moves KV only through `Runner`, the engine's view of a model. Called by `engine`.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hearthd.kv.choosing import Source, choose_slot, longest_beginning
from hearthd.kv.copies import Copies
from hearthd.kv.eviction import Eviction, plan_eviction
from hearthd.kv.reservations import Reservations
from hearthd.kv.runner_protocol import Runner, RunTerminated
from hearthd.kv.shared import EVERYBODY_ELSE, SharedPrompts
from hearthd.kv.slot import Slot
from hearthd.kv.stored_prefixes import PUBLIC, StoredPrefixes

__all__ = ["KVCache", "Place", "RunTerminated", "Runner"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sequence's KV goes, and what is there already."""

    slot: int
    num_past: int
    """Positions that hold the prompt's first tokens; less than the prompt has."""
    num_cached: int
    """Those of them that an earlier sequence computed; the others came with the bundle."""


class KVCache:
    """The books of all slots. A slot is held by one sequence, or idle."""

    def __init__(self, runner: Runner, stored: StoredPrefixes | None = None) -> None:
        """stored: the prefixes on disk, if there is to be such a thing."""
        self._runner = runner
        self._stored = stored
        self._slots = [Slot() for _ in range(runner.num_slots)]
        self._reservations = Reservations(runner.kv_budget, self._slots)
        # Counts acquisitions and releases: the time by which uses grow old.
        self._clock = 0
        # Beginnings of prompts that the owner shares.
        self._shared = SharedPrompts()
        # Those of them that are still to be brought in, and the slot that is held for the first.
        self._to_warm: list[list[int]] = []
        self._warming: Slot | None = None
        self.num_hits = 0
        """Prompts whose beginning was in memory."""
        # What was tried out before has left nothing of use.
        for number in range(runner.num_slots):
            runner.give_back(number, 0)

    @property
    def has_idle_slot(self) -> bool:
        """Whether any slot is idle; whether the memory suffices, `acquire` finds out."""
        return any(not slot.is_held or slot is self._warming for slot in self._slots)

    @property
    def num_blocks(self) -> int:
        """Blocks of the budget that are in use or reserved."""
        return self._reservations.num_blocks

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Memory that is in use, and the most that may be. For any thread to read."""
        budget = self._reservations.budget
        return self._runner.num_blocks * budget.block_bytes, budget.num_blocks * budget.block_bytes

    def num_tokens(self, slot: int) -> int:
        """Positions of a slot that hold a token's KV."""
        return len(self._slots[slot].tokens)

    def num_found(self, prompt_ids: Sequence[int], identity: str, audience: str = EVERYBODY_ELSE) -> int:
        """Return how many of a prompt's first tokens `acquire` and `fetch` would not leave to be run, now."""
        prompt = list(prompt_ids)
        num_public = self._num_public(prompt, identity, audience)
        source = self._find(prompt, identity, num_public)
        found = source.num_tokens if source else self._num_preset(prompt)
        if self._stored is None:
            return found
        return max(found, self._stored.num_found(prompt, identity, num_public, self._reusable(prompt)))

    def acquire(
        self,
        prompt_ids: Sequence[int],
        identity: str,
        num_tokens: int,
        num_first: int = 0,
        audience: str = EVERYBODY_ELSE,
        *,
        is_new: bool = True,
    ) -> Place | None:
        """Take an idle slot, with as much of the prompt's KV in it as can be had without computing.

        num_tokens: prompt and answer at most; memory for them is set aside. num_first: the prompt's tokens up to the
        end of its first message, where that is worth remembering. audience: what is shared with it can be had, besides
        the identity's own. is_new: whether the prompt comes now, and is not that of a sequence which lost its KV: this
        is no further hit, and was not sent twice.

        More may come from the disk: see `fetch`. At least `Runner.min_run` tokens of the prompt are left to run, if it
        has as many. None if no slot or not enough memory is left beside those that are held. What the runner's
        context_length allows always fits when nothing is held.
        """
        prompt = list(prompt_ids)
        num_public = self._num_public(prompt, identity, audience)
        source = self._find(prompt, identity, num_public)
        num_preset = self._num_preset(prompt)
        num_reserved = max(num_tokens, len(prompt))
        choice = choose_slot(self._slots, self._reservations, source, prompt, num_reserved, self._clock)
        if choice is None and self._warming is not None:
            self._put_off_warming()
            choice = choose_slot(self._slots, self._reservations, source, prompt, num_reserved, self._clock)
        if choice is None:
            return None
        self._clock += 1
        self._carry_out(choice.eviction, self._reservations.prompt_blocks_with(len(prompt)))
        target = self._slots[choice.target]
        if source is not None:
            self._slots[source.slot].use(source.num_tokens, self._clock)
            if choice.target != source.slot:
                self.forget(choice.target)
                self._runner.copy_slot(source.slot, choice.target, source.num_tokens)
                target.parts = self._slots[source.slot].beginning(source.num_tokens)
            target.cut(source.num_tokens)
        else:
            self.forget(choice.target)
            if num_preset:
                self._runner.load_preset(choice.target)
        num_past = source.num_tokens if source else num_preset
        self._runner.give_back(choice.target, num_reserved)
        target.tokens = prompt[:num_past]
        target.num_reusable = num_past
        target.unread = []
        target.identity = identity
        target.audience = audience
        target.num_public = num_public
        target.num_first = num_first or num_public
        target.is_held = True
        target.num_reserved = num_reserved
        target.prompt_length = len(prompt)
        if self._stored is not None:
            try:
                self._stored.look_for(target, prompt, self._reusable(prompt), is_new=is_new)
            except Exception:
                # Nobody else knows of the slot yet.
                self.release(choice.target)
                raise
        self.num_hits += is_new and source is not None
        return Place(choice.target, num_past, source.num_tokens if source else 0)

    def has_room_for(
        self, num_tokens: int, prompt_length: int, *, num_spare: int = 0, without: Collection[int] = ()
    ) -> bool:
        """Whether `acquire` would find a slot and memory; cheap, and right at once.

        num_spare: tokens for which there has to be room besides. without: slots that would be released before.
        """
        released = [self._slots[number] for number in without]
        if self._warming is not None:
            released.append(self._warming)
        return self._reservations.has_room_for(num_tokens, prompt_length, num_spare=num_spare, without=released)

    def fetch(self, slot: int, wait_seconds: float) -> int | None:
        """Take what has come from the disk for a slot's prompt, before that is run; wait so long if there is nothing.

        Returns None as long as more is to come; then the tokens that came from there.
        """
        return 0 if self._stored is None else self._stored.fetch(self._slots[slot], slot, wait_seconds)

    def share(self, shared: SharedPrompts) -> None:
        """Share beginnings of prompts, and read them while nobody asks; those of before no more."""
        if shared == self._shared:
            return
        self._put_off_warming()
        self._shared = shared
        self._to_warm = [prompt for prompt in shared.all() if self._can_keep(prompt)]
        for slot in self._slots:
            slot.num_public = self._num_public([*slot.tokens, *slot.unread], slot.identity, slot.audience)

    def warm_some(self, wait_seconds: float) -> None:
        """Take what the disk has of a shared prompt; what it has not is to be read, as an answer of before."""
        prompt, slot = self._to_warm[0], self._warming
        if slot is None:
            place = self.acquire(prompt, PUBLIC, len(prompt))
            if place is None:
                del self._to_warm[0]
                self._tell_no_room(prompt)
                return
            slot = self._warming = self._slots[place.slot]
            if self._stored is not None:
                # All of it: here no logits are wanted of its last tokens.
                self._stored.look_for(slot, prompt, len(prompt))
        number = self._slots.index(slot)
        if self.fetch(number, wait_seconds) is not None:
            self._warming = None
            del self._to_warm[0]
            slot.tokens = prompt.copy()
            self.release(number)

    def _can_keep(self, prompt: list[int]) -> bool:
        fits = len(prompt) < self._runner.context_length
        if not fits:
            self._tell_no_room(prompt)
        return fits

    def _tell_no_room(self, prompt: list[int]) -> None:
        _logger.warning(
            "a shared prompt of %d tokens is not kept: with a question it must fit %d tokens; raise engine.kv_bytes or "
            "engine.context_length, or shorten it",
            len(prompt),
            self._runner.context_length,
        )

    def _put_off_warming(self) -> None:
        """Let the slot go that is held for a shared prompt: somebody needs it, or its memory."""
        if self._warming is not None:
            number, self._warming = self._slots.index(self._warming), None
            self.release(number)

    def _num_public(self, prompt: list[int], identity: str, audience: str) -> int:
        """How many of a prompt's tokens the owner shares with its caller."""
        return self._shared.num_shared(prompt, None if identity == PUBLIC else audience)

    def _num_preset(self, prompt: list[int]) -> int:
        """How many of a prompt's tokens come with the bundle."""
        preset = self._runner.preset_tokens
        return min(len(preset), self._reusable(prompt)) if tuple(prompt[: len(preset)]) == preset else 0

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
        self._clock += 1
        released = self._slots[slot]
        if self._stored is not None:
            self._stored.drop(released)
        released.unread = released.tokens[released.num_reusable :]
        del released.tokens[released.num_reusable :]
        released.is_held = False
        # Drafts that were wrong, a step that was stopped, and what the disk began to bring have filled more.
        self._runner.give_back(slot, released.num_kept)
        released.settle(self._clock)
        self._consider(released)

    def forget(self, slot: int) -> None:
        """Note that a slot holds nothing of use: a run over it failed."""
        self._slots[slot].cut(0)
        self._runner.give_back(slot, 0)

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

    def make_room_to_read(self, slot: int, num_new: int) -> bool:
        """Set memory aside for a run over so many unread tokens of an idle slot; False if there is none."""
        idle = self._slots[slot]
        num_tokens = len(idle.tokens) + num_new
        shortage = self._reservations.shortage_for_reading(num_tokens)
        copies, budget = Copies(self._slots), self._reservations.budget
        eviction = plan_eviction(self._slots, copies, shortage, budget, self._clock, {slot: idle.num_kept})
        if eviction is None:
            idle.unread = []
            return False
        self._carry_out(eviction, self._reservations.prompt_blocks_with(num_tokens))
        return True

    def note_read(self, slot: int, num_tokens: int) -> None:
        """Note that the next unread tokens of an idle slot were run."""
        idle = self._slots[slot]
        idle.tokens.extend(idle.unread[:num_tokens])
        idle.num_reusable = len(idle.tokens)
        del idle.unread[:num_tokens]
        self._consider(idle)

    @property
    def has_warming(self) -> bool:
        """Whether `warm_some` has anything to do."""
        return bool(self._to_warm)

    @property
    def has_saving(self) -> bool:
        """Whether `save_some` would do anything."""
        return self._stored is not None and self._stored.has_work

    def save_some(self) -> None:
        """Hand a chunk of a prefix over that is to be stored."""
        if self._stored is not None:
            self._stored.save_some(self._slots)

    def close(self, seconds: float) -> None:
        """Store what is still to be stored, within so long."""
        if self._stored is not None:
            self._stored.finish(self._slots, seconds)

    def _consider(self, slot: Slot) -> None:
        if self._stored is not None:
            self._stored.consider(slot)

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots, with all that is known of them."""
        self._runner.swap_slots(a, b, self._slots[a].num_written, self._slots[b].num_written)
        self._slots[a], self._slots[b] = self._slots[b], self._slots[a]

    def _find(self, prompt: list[int], identity: str, num_public: int) -> Source | None:
        """Find a prompt's beginning in memory, if that is more than what comes with the bundle."""
        found = longest_beginning(self._slots, prompt, identity, num_public, self._reusable(prompt))
        return found if found and found.num_tokens > self._num_preset(prompt) else None

    def _carry_out(self, eviction: Eviction, prompt_blocks: int) -> None:
        """Give memory back, so that the books hold."""
        for number, length in eviction.lengths.items():
            self._slots[number].cut(length)
            self._runner.give_back(number, len(self._slots[number].tokens))
        reservations, budget = self._reservations, self._reservations.budget
        if prompt_blocks < reservations.prompt_blocks:
            self._runner.give_back_prompt(prompt_blocks // budget.prompt_factor * budget.block_tokens)
        reservations.prompt_blocks = prompt_blocks
