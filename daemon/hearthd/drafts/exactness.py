"""Whether a run of several tokens gives the very bits of as many steps, on this processor: tried once, at load.

ONNX Runtime's kernels choose their way by the processor and by the number of rows. On every one that could be tried
(x86-64 with AVX-512, emulated Cortex-A72 and A76) they agree; where they do not, an answer could depend on its drafts.

Knows only the runner. Called by `generation.drafting`.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hearthd.drafts.run_costs import LENGTHS
from hearthd.kv.runner_protocol import Runner

__all__ = ["is_exact"]

_SLOT: Final = 0


def is_exact(runner: Runner, token_ids: Sequence[int]) -> bool:
    """Run the same tokens in steps and at once, behind a text of `token_ids`, and compare all logits and KV.

    At once in every length that drafts have, and no other. Slot 0 must be free; it is written to.
    """
    most = LENGTHS[-1]
    text = list(token_ids)[: max(runner.context_length - most, 1)]
    past = len(text)
    # What is drafted need not be likely.
    drafted = np.asarray((text * most)[:most], np.int64)
    runner.forward(np.asarray([text], np.int64), _SLOT, np.zeros(1, np.int32))

    def step(at: int) -> NDArray[np.float32]:
        """(1, V), since the runner uses its buffer again."""
        return runner.forward(drafted[None, at : at + 1], _SLOT, np.asarray([past + at], np.int32)).copy()

    steps = np.concatenate([step(at) for at in range(most)])
    kv_of_steps = {length: runner.read_kv(_SLOT, past, past + length) for length in LENGTHS}
    for length in LENGTHS:
        # What steps have written must not pass for the run's.
        runner.write_kv(_SLOT, past, bytes(length * runner.kv_token_bytes), 0)
        at_once = runner.verify(drafted[:length], _SLOT, past)
        if not np.array_equal(at_once, steps[:length]):
            return False
        if runner.read_kv(_SLOT, past, past + length) != kv_of_steps[length]:
            return False
    return True
