"""Slots of KV positions."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["RunTerminated", "Runner"]


class RunTerminated(Exception):  # noqa: N818 - not an error: somebody asked for it
    """`Runner.terminate` stopped the forward in the middle. No KV position before its past lengths has changed."""


class Runner(Protocol):
    """What the engine needs of a model: token ids and KV slots in, logits out.

    All methods but `terminate` are called by the inference thread alone.
    """

    @property
    def num_slots(self) -> int:
        """KV slots, each of `context_length` positions."""

    @property
    def context_length(self) -> int:
        """Positions of a slot."""

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits; at least the tokenizer's number of ids."""

    @property
    def preset_tokens(self) -> tuple[int, ...]:
        """Token ids whose KV the bundle carries, maybe none."""

    def load_preset(self, slot: int) -> None:
        """Write the preset tokens' KV to the slot's first positions."""

    def forward(
        self, token_ids: NDArray[np.int64], first_slot: int, past_lengths: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Run S tokens of B sequences; return the logits after each one's last token.

        token_ids: int64 (B, S). Row b belongs to slot first_slot + b; the KV of its tokens is written from position
        past_lengths[b] on, past_lengths: int32 (B,). Returns float32 (B, V), valid until the next call.
        Raises RunTerminated if `terminate` stopped it.
        """

    def swap_slots(self, a: int, b: int, num_tokens: int) -> None:
        """Exchange the first num_tokens positions of two slots."""

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first num_tokens positions of one slot to another."""

    def terminate(self) -> None:
        """Stop the forward that runs now, from any thread; it raises RunTerminated. The next forward works."""
