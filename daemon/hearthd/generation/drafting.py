"""The engine's view of drafts: what may follow a sequence that decodes alone, and what became of it.

In a batch the model reads its weights for many rows already: there it steps aside. Knows sequences and how they are
drafted; the runner it asks only once, whether drafts change nothing. Called by `decode_step`, `model`.
"""

import logging
from collections.abc import Sequence as Many
from typing import Final

from hearthd.drafts.drafter import Drafter
from hearthd.drafts.exactness import is_exact
from hearthd.drafts.run_costs import RunCosts
from hearthd.kv.kv_cache import Runner
from hearthd.sequences.sequence import Sequence

__all__ = ["Drafting", "drafting_for"]

_logger = logging.getLogger(__name__)

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


def drafting_for(runner: Runner, token_ids: Many[int]) -> Drafting | None:
    """Return drafts for a runner, None if it cannot verify them or would give other bits with them: the log says which.

    The rest is as of `is_exact`.
    """
    if not runner.can_verify:
        _logger.info("no drafts: this hearthd's models have them, this one was built by an older hearthd")
        return None
    if not is_exact(runner, token_ids):
        _logger.warning("no drafts: on this processor they would change answers; nothing else is affected")
        return None
    return Drafting(context_length=runner.context_length)
