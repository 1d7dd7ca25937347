"""Continuous batching: schedule, run, postprocess, collect."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hearthd.events import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    Queued,
    TokenLogprob,
    TokenProbability,
)
from hearthd.kv_cache import Runner, RunTerminated
from hearthd.sequence import Sequence

if TYPE_CHECKING:
    from hearthd.tokenizer import ChatTokenizer

__all__ = [
    "Delta",
    "Engine",
    "Event",
    "Failed",
    "FinishReason",
    "Finished",
    "Queued",
    "RunTerminated",
    "Runner",
    "Sequence",
    "TokenLogprob",
    "TokenProbability",
]


class Engine:
    """Runs sequences. One thread calls it; it knows no asyncio, no gRPC and no threads."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: "ChatTokenizer",
        *,
        prefill_chunk: int = 64,
        max_answer_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._prefill_chunk = prefill_chunk
        self._max_answer_seconds = max_answer_seconds
        self._clock = clock

    @property
    def num_slots(self) -> int:
        """Sequences that can run at once."""
        return self._runner.num_slots

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._runner.context_length

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        raise NotImplementedError

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        raise NotImplementedError

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        raise NotImplementedError

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises InvalidRequestError if its prompt leaves no room for an answer."""
        raise NotImplementedError

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence and free its slot; it has no further event. Idempotent."""
        raise NotImplementedError

    def step(self) -> list[tuple[Sequence, Event]]:
        """Run at most one prefill chunk and one decode token of every running sequence; return what happened."""
        raise NotImplementedError
