"""One caller of a daemon, over gRPC as any other: a connection and a token of its own, and the time of all that comes.

Speaks hearth.v1 directly, not through the client package: that one tries again by itself, and what is measured here is
each attempt. Called by the scenarios.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import grpc

from hearth import (
    AuthenticationError,
    ConnectError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    PermissionDeniedError,
    QueueFullError,
    QuotaExceededError,
    UnavailableError,
)
from hearth._translate import translate
from hearth.v1 import chat_pb2, chat_pb2_grpc
from load.arrivals import BACKGROUND, INTERACTIVE, NORMAL
from load.outcome import End, Outcome

# In this order: some are special cases of others.
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (QueueFullError, "queue full"),
    (QuotaExceededError, "quota used up"),
    (DeadlineError, "deadline"),
    (ConnectError, "no connection"),
    (UnavailableError, "not serving"),
    (PermissionDeniedError, "not permitted"),
    (AuthenticationError, "not known"),
    (InvalidRequestError, "invalid"),
    (InternalError, "fault of the daemon"),
)
PRIORITIES = {
    "": chat_pb2.PRIORITY_UNSPECIFIED,
    INTERACTIVE: chat_pb2.PRIORITY_INTERACTIVE,
    NORMAL: chat_pb2.PRIORITY_NORMAL,
    BACKGROUND: chat_pb2.PRIORITY_BACKGROUND,
}
# Said instead of an answer, and on purpose.
_REFUSALS = ("queue full", "quota used up", "deadline", "not serving", "not permitted", "invalid")


def request(
    content: str,
    *,
    system: str = "",
    priority: str = "",
    max_tokens: int,
    turns: Sequence[tuple[str, str]] = (),
    with_tokens: bool = False,
) -> chat_pb2.ChatRequest:
    """Return a greedy request.

    turns: earlier questions with their answers. with_tokens: ask for the tokens and their log probabilities.
    """
    messages = [chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM, content=system)] if system else []
    for asked, answered in turns:
        messages.append(chat_pb2.Message(role=chat_pb2.ROLE_USER, content=asked))
        messages.append(chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT, content=answered))
    messages.append(chat_pb2.Message(role=chat_pb2.ROLE_USER, content=content))
    sampling = chat_pb2.SamplingOptions(temperature=0.0, max_tokens=max_tokens)
    if with_tokens:
        sampling.top_logprobs = 0
    return chat_pb2.ChatRequest(messages=messages, sampling=sampling, priority=PRIORITIES[priority])


class Chat:
    """A request on its way. `finish` must be awaited once; `cancel` may be called meanwhile."""

    def __init__(self, call: Any, outcome: Outcome, address: str) -> None:
        """Made by `Caller.start`."""
        self._call = call
        self._address = address
        self._is_cancelled = False
        self.outcome = outcome
        self.has_answered = asyncio.Event()
        """Set by the first piece of the answer, and at the end if none came."""

    def cancel(self) -> None:
        """Give the request up, as a caller that hangs up does."""
        self._is_cancelled = True
        self._call.cancel()

    async def finish(self) -> Outcome:
        """Read to the end, whatever it is."""
        try:
            async for response in self._call:
                self._take(response)
        except grpc.RpcError as error:
            self._fail(error)
        except asyncio.CancelledError:
            # grpc.aio raises it for a call that was cancelled here; any other is this task's own end.
            if not self._is_cancelled:
                raise
            self.outcome.end, self.outcome.reason = End.CANCELLED, ""
        self.outcome.ended = time.monotonic()
        self.has_answered.set()
        return self.outcome

    def _take(self, response: chat_pb2.ChatResponse) -> None:
        now, outcome = time.monotonic(), self.outcome
        match response.WhichOneof("event"):
            case "queued":
                outcome.positions.append(response.queued.position)
            case "delta":
                outcome.deltas.append(now)
                outcome.text += response.delta.text
                outcome.tokens += [
                    (each.chosen.token_id, each.chosen.logprob) for each in response.delta.token_logprobs
                ]
                self.has_answered.set()
            case "final":
                usage = response.final.usage
                outcome.prompt_tokens, outcome.cached_tokens = usage.prompt_tokens, usage.cached_prompt_tokens
                outcome.completion_tokens = usage.completion_tokens
                outcome.queue_seconds = response.final.timings.queue_ms / 1000
                is_late = response.final.finish_reason == chat_pb2.FINISH_REASON_TIME_LIMIT
                outcome.end = End.FAILED if is_late else End.ANSWERED
                outcome.reason = "time limit" if is_late else ""

    def _fail(self, error: grpc.RpcError) -> None:
        failure = translate(error, self._address)
        reason = next((text for kind, text in _REASONS if isinstance(failure, kind)), type(failure).__name__)
        is_refused = reason in _REFUSALS and not self.outcome.deltas
        self.outcome.end = End.REFUSED if is_refused else End.FAILED
        self.outcome.reason = reason
        self.outcome.retry_after = getattr(failure, "retry_after", None)


class Caller:
    """Somebody with a token, or with none where none is needed. Belongs to the event loop that first uses it."""

    def __init__(self, name: str, address: str, token: str = "") -> None:
        self.name = name
        self._address = address
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        # Otherwise grpc would let callers of one process share a connection.
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub = chat_pb2_grpc.ChatServiceStub(self.channel)  # type: ignore[no-untyped-call]

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What calls of other services need to be let in."""
        return self._metadata

    def start(self, asked: chat_pb2.ChatRequest, *, scheduled: float | None = None, seconds: float = 600.0) -> Chat:
        """Send a request.

        scheduled: when it was due, now if None. seconds: its deadline.
        """
        now = time.monotonic()
        outcome = Outcome(self.name, now if scheduled is None else scheduled, sent=now)
        return Chat(self._stub.Chat(asked, timeout=seconds, metadata=self._metadata), outcome, self._address)

    async def ask(
        self, asked: chat_pb2.ChatRequest, *, scheduled: float | None = None, seconds: float = 600.0
    ) -> Outcome:
        """Send a request and read its answer to the end."""
        return await self.start(asked, scheduled=scheduled, seconds=seconds).finish()

    async def close(self) -> None:
        """End the connection."""
        await self.channel.close()
