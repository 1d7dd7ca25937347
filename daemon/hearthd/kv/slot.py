"""The books of one KV slot: which tokens stand in it, for whom, and how often each part of them was of use.

Knows no memory and no other slot. Made by `kv_cache`; `eviction` weighs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Part", "Slot", "num_shared"]

# Beginnings of different lengths that are told apart; a conversation has one for each turn.
_MAX_PARTS: Final = 6
# Old fame must fade: without a bound a prompt that a thousand callers shared last month would stay for months.
_MAX_USES: Final = 16
# A token that stands further back takes longer to read again: by half after so many (the default model, 512 and 2,048).
_HALF_DEARER_AFTER: Final = 2048


@dataclass(slots=True)
class Part:
    """Some neighbouring tokens of a slot that came into use together."""

    end: int
    uses: int
    """Prompts that had these tokens and all before them."""
    last_used: int
    """By the clock of `kv_cache`, which counts its calls."""


@dataclass(slots=True, eq=False)
class Slot:
    """One slot. Compared by identity: it stays the same where its KV moves."""

    tokens: list[int] = field(default_factory=list)
    num_reusable: int = 0
    """The first of them, whose KV is what a prefill of the same tokens writes, bit for bit."""
    unread: list[int] = field(default_factory=list)
    """Of an idle slot: tokens that come behind those, without KV that can be reused."""
    identity: str = ""
    audience: str = ""
    """Whose shared prompts whoever had it last could have."""
    num_public: int = 0
    """The first of its tokens, which the owner shares with that audience."""
    num_first: int = 0
    """Of its tokens, those up to the end of the first message, where that is worth remembering."""
    num_loaded: int = 0
    """While the disk fills it: the first positions, which are written and are no tokens until all have come."""
    num_cuts: int = 0
    """How often tokens were taken off its end."""
    is_held: bool = False
    num_reserved: int = 0
    """Positions that whoever holds it may fill."""
    prompt_length: int = 0
    """Of whoever holds it."""
    parts: list[Part] = field(default_factory=list)
    """In their order; of an idle slot they cover all that it keeps."""

    @property
    def num_kept(self) -> int:
        """Positions that an idle slot fills, or will when its answer has been read."""
        return len(self.tokens) + len(self.unread)

    @property
    def num_written(self) -> int:
        """Positions that go along when it moves."""
        return max(len(self.tokens), self.num_loaded)

    @property
    def num_positions(self) -> int:
        """Positions that are to be counted as filled."""
        return max(self.num_reserved, len(self.tokens)) if self.is_held else self.num_kept

    @property
    def last_used(self) -> int:
        """When the last prompt had any of it."""
        return max((part.last_used for part in self.parts), default=0)

    @property
    def is_reading(self) -> bool:
        """Whether its prompt is not read to the end."""
        return self.is_held and len(self.tokens) < self.prompt_length

    def use(self, num_tokens: int, now: int) -> None:
        """Note that a further prompt begins with the first num_tokens tokens."""
        if num_tokens <= 0:
            return
        covered = self.parts[-1].end if self.parts else 0
        if covered < num_tokens:
            self.parts.append(Part(num_tokens, 1, now))
        self._cut_parts_at(num_tokens)
        for part in self.parts:
            if part.end <= num_tokens:
                part.uses = min(part.uses + 1, _MAX_USES)
                part.last_used = now

    def settle(self, now: int) -> None:
        """Note that all tokens were of use to the prompt that leaves the slot now."""
        covered = self.parts[-1].end if self.parts else 0
        if self.num_kept > covered:
            self.parts.append(Part(self.num_kept, 1, now))
        for part in self.parts:
            part.last_used = now
        while len(self.parts) > _MAX_PARTS:
            # Those that differ least in use become one.
            nearest = min(
                range(len(self.parts) - 1), key=lambda place: self.parts[place].uses - self.parts[place + 1].uses
            )
            del self.parts[nearest]

    def cut(self, num_tokens: int) -> None:
        """Forget the tokens behind the first num_tokens, and what was to be read behind them."""
        if num_tokens >= self.num_kept:
            return
        self.num_cuts += 1
        self.unread = self.unread[: max(num_tokens - len(self.tokens), 0)]
        if num_tokens < len(self.tokens):
            del self.tokens[num_tokens:]
            self.num_reusable = min(self.num_reusable, num_tokens)
        self._cut_parts_at(num_tokens)
        self.parts = [part for part in self.parts if part.end <= num_tokens]

    def beginning(self, num_tokens: int) -> list[Part]:
        """Return the parts of the first num_tokens tokens, for a slot that they are copied to."""
        self._cut_parts_at(num_tokens)
        return [Part(part.end, part.uses, part.last_used) for part in self.parts if part.end <= num_tokens]

    def worth(self, start: int, now: int) -> float:
        """Return what it costs to lose the tokens from `start` on, those that are to be read with them."""
        worth, begin, each = 0.0, 0, 1.0
        for part in self.parts:
            each = _worth_of_token(part, now)
            worth += max(part.end - max(begin, start), 0) * each
            begin = part.end
        return worth + max(self.num_kept - max(begin, start), 0) * each

    def _cut_parts_at(self, num_tokens: int) -> None:
        begin = 0
        for place, part in enumerate(self.parts):
            if begin < num_tokens < part.end:
                self.parts.insert(place, Part(num_tokens, part.uses, part.last_used))
                return
            begin = part.end


def _worth_of_token(part: Part, now: int) -> float:
    """Return uses times cost over the time since the last use.

    After "Hyperbolic Caching" (Blankstein, Sen, Freedman; USENIX ATC 2017), with the last use for the first.
    """
    return part.uses * (1 + part.end / 2 / _HALF_DEARER_AFTER) / (now - part.last_used + 1)


def num_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two lists begin with together."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    # Slices are compared at the speed of C: a third of a millisecond instead of ten for the books of a full cache.
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
