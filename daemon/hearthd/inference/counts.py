"""What an inference thread has done since it began. Kept by `worker`; `models.pool` adds them up."""

from dataclasses import dataclass, fields

__all__ = ["Counts"]


@dataclass(slots=True)
class Counts:
    """Since the start.

    Tokens of all chats that got a slot, however they ended: prompts whole, answers as far as they came. One that was
    left while a step ran may have got a token more.
    """

    finished: int = 0
    cancelled: int = 0
    refused: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    prompt_tokens_from_disk: int = 0
    """Of the cached ones."""
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Return the counts of two threads together."""
        return Counts(**{key.name: getattr(self, key.name) + getattr(other, key.name) for key in fields(Counts)})
