"""Whether a run of several tokens gives the very bits of as many steps, on this processor: tried once, at load.

ONNX Runtime's kernels choose their way by the processor and by the number of rows. On every one that could be tried
(x86-64 with AVX-512, emulated Cortex-A72 and A76) they agree; where they do not, an answer could depend on its drafts.

Knows only the runner. Called by `generation.drafting`.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hearthd.kv.kv_cache import Runner

__all__ = ["is_exact"]

_SLOT: Final = 0
# Two rows are the fewest that are more than one; of five a kernel that takes four at a time leaves one.
_LENGTHS: Final = (2, 5)


def is_exact(runner: Runner, token_ids: Sequence[int]) -> bool:
    """Run the same tokens in steps and at once, behind a text of `token_ids`, and compare all logits.

    Those of one more step depend on all KV that the run has written. Slot 0 must be free; it is written to.
    """
    drafted = [*token_ids, *token_ids][: max(_LENGTHS)]
    past = len(token_ids)
    runner.forward(np.asarray([token_ids], np.int64), _SLOT, np.zeros(1, np.int32))

    def step(at: int) -> NDArray[np.float32]:
        """(1, V), since the runner uses its buffer again."""
        ids, position = np.asarray([[drafted[at]]], np.int64), np.asarray([past + at], np.int32)
        return runner.forward(ids, _SLOT, position).copy()

    steps = np.concatenate([step(at) for at in range(len(drafted))])
    for length in _LENGTHS:
        at_once = runner.verify(np.asarray(drafted[:length], np.int64), _SLOT, past)
        if not np.array_equal(at_once, steps[:length]):
            return False
        if length < len(drafted) and not np.array_equal(step(length)[0], steps[length]):
            return False
    return True
