"""Which slot a prompt goes to: where its beginning stands already, or where least is lost.

Pure: reads the books, changes nothing. Called by `kv_cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hearthd.kv.copies import Copies
from hearthd.kv.eviction import Eviction, loss_of, num_usable, plan_eviction
from hearthd.kv.reservations import Reservations
from hearthd.kv.slot import Slot, num_shared

__all__ = ["Choice", "Source", "choose_slot", "longest_beginning"]

# To copy the KV of so many tokens takes as long as to read one (11.5 kB each, default model).
_COPIES_FOR_A_TOKEN: Final = 200


@dataclass(frozen=True, slots=True)
class Source:
    """A slot with a prompt's beginning."""

    slot: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A slot for a prompt, and what must be thrown away for it."""

    target: int
    eviction: Eviction
    loss: float


def longest_beginning(
    slots: Sequence[Slot], prompt: list[int], identity: str, num_public: int, most: int
) -> Source | None:
    """Find the slot that shares most tokens with a prompt's beginning, `most` at most; also one that is held.

    num_public: of the prompt's tokens, those that the owner shares with its caller.
    """
    best, num_best = None, 0
    for number, slot in enumerate(slots):
        found = num_usable(slot, prompt, identity, num_public)
        # Equal ones: rather one that can be taken as it is.
        if found > num_best or (best is not None and found == num_best and slots[best].is_held):
            best, num_best = number, found
    num_best = min(num_best, most)
    return None if best is None or not num_best else Source(best, num_best)


def choose_slot(
    slots: Sequence[Slot],
    reservations: Reservations,
    source: Source | None,
    prompt: list[int],
    num_reserved: int,
    now: int,
) -> Choice | None:
    """Choose the slot that costs least of what is cached; None if there is none, or memory does not suffice.

    source: what of the prompt is cached. num_reserved: positions that it is to have.
    """
    # Once for all that is weighed here: running answers wait for it.
    copies = Copies(slots)

    def choice(target: int, lost: float, kept: dict[int, int]) -> Choice | None:
        shortage = reservations.shortage_for_slot(target, num_reserved, len(prompt))
        # What stands in the target is counted with it.
        kept = {**kept, target: slots[target].num_kept}
        eviction = plan_eviction(slots, copies, shortage, reservations.budget, now, kept)
        return None if eviction is None else Choice(target, eviction, lost + eviction.loss)

    choices, kept, num_copied = [], dict[int, int](), 0
    if source is not None:
        kept, num_copied = {source.slot: source.num_tokens}, source.num_tokens
        slot = slots[source.slot]
        if not slot.is_held:
            # Going on there loses what comes behind, but for what the prompt has as well.
            lost = loss_of(slots, copies, source.slot, num_shared([*slot.tokens, *slot.unread], prompt), now)
            choices.append(choice(source.slot, lost, kept))
    losses = {
        number: loss_of(slots, copies, number, 0, now)
        for number, slot in enumerate(slots)
        if not slot.is_held and (source is None or number != source.slot)
    }
    if losses:
        target = min(losses, key=lambda number: (losses[number], slots[number].num_kept))
        choices.append(choice(target, losses[target] + num_copied / _COPIES_FOR_A_TOKEN, kept))
    possible = [each for each in choices if each is not None]
    return min(possible, key=lambda each: each.loss, default=None)
