"""Beginnings of prompts that the owner shares, and who may find them: those who are told them.

Whoever's prompt begins with one of somebody else's is not told that it is there, or instructions that are for guests
alone could be guessed by anybody who may send them. Knows no slots. Made by `inference.shared_prompts`; asked by
`kv_cache`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

__all__ = ["EVERYBODY_ELSE", "SharedPrompts"]

EVERYBODY_ELSE: Final = ""
"""The audience of all that have none of their own."""


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Token ids, by audience: callers whom the owner tells the same, as those of a role."""

    by_audience: Mapping[str, Sequence[list[int]]] = field(default_factory=dict)

    @classmethod
    def for_everybody(cls, prompts: Iterable[Sequence[int]]) -> Self:
        """Share prompts with all callers."""
        return cls({EVERYBODY_ELSE: [list(prompt) for prompt in prompts]})

    def all(self) -> list[list[int]]:
        """Return what is shared with anybody, each prompt once."""
        found = {tuple(prompt): prompt for prompts in self.by_audience.values() for prompt in prompts}
        return list(found.values())

    def num_shared(self, prompt: list[int], audience: str | None) -> int:
        """Return how many tokens a prompt begins with that are shared with an audience; None: with any.

        All of one or nothing: the length of a match would tell a guesser its text token by token.
        """
        if audience is None:
            prompts: Iterable[list[int]] = self.all()
        else:
            prompts = self.by_audience.get(audience, self.by_audience.get(EVERYBODY_ELSE, ()))
        return max((len(shared) for shared in prompts if prompt[: len(shared)] == shared), default=0)
