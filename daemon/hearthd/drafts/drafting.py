"""The engine's view of drafts: what may follow a sequence that decodes alone, and what became of it.

In a batch the model reads its weights for many rows already: there it steps aside. Knows sequences and how they are
drafted, no runner. Called by `engine`.
"""

from collections.abc import Sequence as Many
from typing import Final

from hearthd.drafts.drafter import Drafter
from hearthd.drafts.run_costs import RunCosts
from hearthd.sequence import Sequence

__all__ = ["Drafting"]

_NO_DRAFT: Final[list[int]] = []


class Drafting:
    """Drafts for the sequences of one runner."""

    def __init__(self, *, context_length: int) -> None:
        self._context_length = context_length
        self._costs = RunCosts()

    def draft(self, batch: Many[Sequence]) -> list[int]:
        """Return the tokens that may follow and are worth a run; none if a plain step is better."""
        if len(batch) != 1:
            return _NO_DRAFT
        (sequence,) = batch
        if sequence.drafter is None:
            sequence.drafter = Drafter(sequence.prompt_ids, self._costs)
        # The run gives one token more than was drafted, and none may be beyond the answer's end.
        num_tokens = len(sequence.output_ids)
        most = min(sequence.params.max_tokens, self._context_length - len(sequence.prompt_ids)) - num_tokens - 1
        return sequence.drafter.draft(sequence.output_ids, most)

    def note(self, batch: Many[Sequence], num_drafted: int, num_taken: int, seconds: float) -> None:
        """Note what a run took, and how many tokens it gave."""
        if len(batch) != 1:
            return
        (sequence,) = batch
        self._costs.note(num_drafted + 1, seconds)
        if num_drafted and sequence.drafter is not None:
            sequence.drafter.note_taken(num_drafted, num_taken)
