"""The engine's view of a model: token ids and KV slots in, logits out.

Called by `engine` and `kv_cache`; `runner` fulfils it with ONNX Runtime, tests with a fake.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hearthd.kv.budget import KVBudget

__all__ = ["RunTerminated", "Runner"]


class RunTerminated(Exception):  # noqa: N818 - not an error: somebody asked for it
    """`Runner.terminate` stopped the forward in the middle. No KV position before its past lengths has changed."""


class Runner(Protocol):
    """What the engine needs of a model: token ids and KV slots in, logits out.

    All but `terminate` and `num_blocks` is called by the inference thread alone.
    """

    @property
    def num_slots(self) -> int:
        """KV slots, each of `context_length` positions; they need not all fit the memory at once."""

    @property
    def kv_budget(self) -> KVBudget:
        """What the slots, and the reading of a prompt, may take of memory."""

    @property
    def num_blocks(self) -> int:
        """Blocks of `kv_budget` whose memory is in use. For any thread to read."""

    @property
    def context_length(self) -> int:
        """Positions of a slot."""

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits; at least the tokenizer's number of ids."""

    @property
    def min_run(self) -> int:
        """Tokens that belong into one run at least, for KV and logits that do not depend on where a text was cut.

        If it is over 1, decoding writes other bits than prefill would: such KV serves its own answer alone.
        """

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

    @property
    def can_verify(self) -> bool:
        """Whether `verify` can be called."""

    def verify(self, token_ids: NDArray[np.int64], slot: int, num_past: int) -> NDArray[np.float32]:
        """Run S tokens of one slot as S steps would; return the logits after each of them.

        token_ids: int64 (S,); their KV is written from position num_past on. Returns float32 (S, V), valid until the
        next call; logits and KV are those of S calls of `forward`, bit for bit. Raises RunTerminated if `terminate`
        stopped it.
        """

    def rest(self) -> None:
        """Give back memory that only a run needs: there will be none for a while, perhaps."""

    def swap_slots(self, a: int, b: int, num_a: int, num_b: int) -> None:
        """Exchange two slots, of which so many positions are in use."""

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first num_tokens positions of one slot to another."""

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one position's KV."""

    def read_kv(self, slot: int, start: int, end: int) -> bytes:
        """Return a copy of some positions' KV."""

    def write_kv(self, slot: int, start: int, kv: bytes, num_skipped: int) -> None:
        """Write what `read_kv` gave to positions from `start` on, but for the first num_skipped of them."""

    def give_back(self, slot: int, num_tokens: int) -> None:
        """Give back the memory of a slot behind its first num_tokens positions."""

    def give_back_prompt(self, num_tokens: int) -> None:
        """Give back what is there for the reading of prompts of more than so many tokens."""

    @property
    def num_threads(self) -> int:
        """Threads that a run computes with."""

    @property
    def load_seconds(self) -> float:
        """What loading the graph has taken, and `change_threads` would take again."""

    def change_threads(self, num_threads: int) -> None:
        """Compute with so many threads from the next run on. KV stays, and logits are the same, bit for bit."""

    def terminate(self) -> None:
        """Stop the forward that runs now, from any thread; it raises RunTerminated. The next forward works."""
