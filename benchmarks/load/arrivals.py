"""When who asks for what: Poisson arrivals, dealt so that every caller wants the same.

The same seed gives the same list, on every machine. Pure; knows no server. Called by the scenarios.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

INTERACTIVE, NORMAL, BACKGROUND = "interactive", "normal", "background"


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of request: how urgent, how many words are asked, how many tokens the answer may have."""

    priority: str
    prompt_words: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. at: seconds after the begin at which it is due, whatever became of those before it."""

    number: int
    at: float
    caller: str
    kind: Kind


# What a house asks: mostly short and urgent, now and then long and in no hurry.
HOUSE = (
    Kind(INTERACTIVE, 12, 24),
    Kind(INTERACTIVE, 24, 32),
    Kind(INTERACTIVE, 40, 16),
    Kind(NORMAL, 80, 64),
    Kind(NORMAL, 200, 48),
    Kind(BACKGROUND, 600, 96),
)


def open_loop(
    callers: Sequence[str], kinds: Sequence[Kind], *, rate: float, seconds: float, seed: int
) -> list[Arrival]:
    """Return arrivals at `rate` a second on average: gaps are exponential, and nobody waits for an answer.

    Whole decks are dealt, in each of which every caller has every kind once, so that demand is equal and shares can be
    compared: there are as many as come nearest to rate * seconds, and at least one.
    """
    chance = random.Random(seed)
    deck = list(itertools.product(callers, kinds))
    num_decks = max(1, round(rate * seconds / len(deck)))
    dealt: list[tuple[str, Kind]] = []
    for _ in range(num_decks):
        chance.shuffle(deck)
        dealt += deck
    arrivals, at = [], 0.0
    for number, (caller, kind) in enumerate(dealt):
        at += chance.expovariate(rate)
        arrivals.append(Arrival(number, at, caller, kind))
    return arrivals
