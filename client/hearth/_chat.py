"""One chat without its transport: what was received so far, and what a failure means at this point.

Knows neither gRPC nor asyncio; `ChatStream` and `AsyncChatStream` move the bytes.
"""

from collections.abc import Callable

from hearth._errors import HearthError, ProtocolError
from hearth._patience import Patience
from hearth._responses import decode, parse_answer, parse_delta, parse_queued
from hearth._values import Answer, Delta, Queued, TokenLogprob
from hearth.v1 import chat_pb2


class ChatProgress:
    """Takes a chat's responses one by one, and ends with the answer."""

    def __init__(self, patience: Patience, on_queued: Callable[[Queued], None] | None) -> None:
        self._patience = patience
        self._on_queued = on_queued
        self._has_started = False
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._final: chat_pb2.Final | None = None

    @property
    def text(self) -> str:
        """The answer as far as it was received."""
        return "".join(self._texts)

    def remaining(self) -> float | None:
        """Seconds that the next attempt may take; None if there is no limit."""
        return self._patience.remaining()

    def accept(self, data: bytes) -> Delta | None:
        """Take one response. Returns more of the answer, or None if this one brought none."""
        response = decode(chat_pb2.ChatResponse, data)
        self._has_started = True
        if self._final is not None:
            raise ProtocolError("the daemon sent more after the end of the answer")
        match response.WhichOneof("event"):
            case "queued":
                if self._on_queued is not None:
                    self._on_queued(parse_queued(response.queued))
            case "delta":
                delta = parse_delta(response.delta)
                self._texts.append(delta.text)
                self._logprobs.extend(delta.token_logprobs)
                return delta
            case "final":
                self._final = response.final
            # Any other event comes from a newer daemon, which may not rely on its being understood.
        return None

    def end(self) -> Answer:
        """The stream ended well. Raises ProtocolError if the answer has no end."""
        if self._final is None:
            raise ProtocolError("the daemon ended the stream without the end of the answer")
        return parse_answer(self._final, self.text, tuple(self._logprobs))

    def delay_after(self, error: HearthError) -> float | None:
        """Seconds to wait before the next attempt; None if there is none.

        There is none after the first response: part of the work is done and, maybe, shown.
        """
        return None if self._has_started else self._patience.delay_after(error)
