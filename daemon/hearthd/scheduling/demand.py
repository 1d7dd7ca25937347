"""How much room for KV a request asks for, in tokens, and how much one in the background leaves to others.

Pure. Called by `placing`, which gives the room, and by `waits`, which says when there will be some.
"""

from typing import Final

from hearthd.priority import Priority
from hearthd.sequences.sequence import Sequence

__all__ = ["num_reserved", "num_spare"]

# Room that background work leaves for an urgent request: an ordinary prompt and its answer.
_SPARE_TOKENS: Final = 1024


def num_reserved(sequence: Sequence, context_length: int) -> int:
    """Return the tokens of the prompt and of the longest answer."""
    return min(len(sequence.prompt_ids) + sequence.params.max_tokens, context_length)


def num_spare(sequence: Sequence, context_length: int, *, is_alone: bool) -> int:
    """Return the tokens for which there has to be room besides. is_alone: nobody else has begun."""
    if is_alone or sequence.priority is not Priority.BACKGROUND:
        return 0
    return min(_SPARE_TOKENS, context_length // 2)
