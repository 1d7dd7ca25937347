"""What is counted as it happens: ends of chats with their times, refused calls, incidents.

An observer of `outcomes`. Made by `observation`.
"""

import logging
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from hearthd.watching.outcomes import ChatEnd, Refusal

__all__ = ["Figures"]

# From a cached beginning on a fast machine to a long prompt on a slow board.
_FIRST_TOKEN_BUCKETS: Final = (0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0)
_QUEUE_BUCKETS: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)
_TOKEN_BUCKETS: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)


class Figures:
    """Counters and histograms. Of the event loop; the registry may be read from anywhere."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._chats = Counter(
            "hearth_chats",
            "Chats that were handed to the engine and have ended.",
            ("model", "role", "outcome"),
            registry=registry,
        )
        self._refused = Counter(
            "hearth_refused_calls", "Calls of any method that were refused.", ("reason",), registry=registry
        )
        self._incidents = Counter(
            "hearth_incidents", "Faults of the daemon; the journal has each with an id.", registry=registry
        )
        # A rate needs the zero before the first one.
        for reason in Refusal:
            self._refused.labels(reason.value)
        self._queue = Histogram(
            "hearth_queue_seconds",
            "From a chat's arrival to its place in the engine.",
            ("model", "priority"),
            buckets=_QUEUE_BUCKETS,
            registry=registry,
        )
        self._prefill = Histogram(
            "hearth_prefill_seconds",
            "From the place to the end of the prompt.",
            ("model",),
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._first_token = Histogram(
            "hearth_time_to_first_token_seconds",
            "From a chat's arrival to the first token of its answer.",
            ("model", "priority"),
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._inter_token = Histogram(
            "hearth_inter_token_seconds",
            "Mean time between two tokens of an answer, once for each answer.",
            ("model", "priority"),
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )

        self._longest_gap = Histogram(
            "hearth_longest_gap_seconds",
            "The longest time between two tokens of an answer, once for each answer.",
            ("model", "priority"),
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )

    def chat_ended(self, end: ChatEnd) -> None:
        """Count a chat, and its times if it finished."""
        self._chats.labels(end.model, end.role, end.why.value).inc()
        finished = end.finished
        if finished is None:
            return
        self._queue.labels(end.model, end.priority).observe(finished.queue_seconds)
        if not finished.completion_tokens:
            return
        self._prefill.labels(end.model).observe(finished.prefill_seconds)
        self._first_token.labels(end.model, end.priority).observe(finished.time_to_first_token_seconds)
        if finished.completion_tokens > 1:
            mean = finished.decode_seconds / (finished.completion_tokens - 1)
            self._inter_token.labels(end.model, end.priority).observe(mean)
            self._longest_gap.labels(end.model, end.priority).observe(finished.longest_gap_seconds)

    def call_refused(self, refusal: Refusal) -> None:
        """Count a refused call."""
        self._refused.labels(refusal.value).inc()

    def incident_handler(self) -> logging.Handler:
        """Return a handler that counts the records of `logs.log_incident`, and reads none."""
        return _Counting(self._incidents)


class _Counting(logging.Handler):
    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - it is one more, whatever it says
        self._counter.inc()
