"""The audit log: who asked what kind of thing, when, how it ended, what it cost and which rule fired. Never a text.

One line for each call, refused ones included; of the calls of health only the refused ones. What a line holds comes
from the daemon alone: names of tokens, roles and rules, the name of a method that exists, counts. Of callers who have
no right to call, at most one line a second is written, with the number of those that it stands for: a scan must not
push everything else out of a log of bounded size.

`grpc_servers` puts an `AuditInterceptor` before everything else that a call meets; `services` fills `current_record`,
and `statuses` tells a `RefusalRecorder` why a call was refused: a status alone does not tell a rate from a quota.
"""

import asyncio
import contextvars
import datetime
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from hearthd.access.caller import current_caller
from hearthd.audit.audit_log import AuditLog
from hearthd.configuration.roles import HEALTH, METHODS
from hearthd.logs import log_incident
from hearthd.pairing.gate import PAIR_METHOD
from hearthd.watching.outcomes import ChatEnd, Refusal

__all__ = ["AuditInterceptor", "CallRecord", "RefusalRecorder", "current_record"]

_KNOWN_METHODS: Final = frozenset({method for methods in METHODS.values() for method in methods} | {PAIR_METHOD[1:]})
_SECONDS_BETWEEN_REFUSED: Final = 1.0
# What a context's code may be: grpc.aio gives the number, or the enum's member, or 0 before there is one.
_CODES: Final = {key: code.name for code in grpc.StatusCode for key in (code, code.value[0])}


@dataclass(slots=True)
class CallRecord:
    """What a call's handler has to tell about it."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    refusal: str | None = None
    """One of the words of `outcomes.Refusal`."""
    rules: set[str] = field(default_factory=set)
    """Names of the rules that have applied."""


_record: Final[contextvars.ContextVar[CallRecord]] = contextvars.ContextVar("record")


def current_record() -> CallRecord:
    """Return the record of the call that this task serves; where none is kept, one that nobody reads."""
    return _record.get(CallRecord())


class RefusalRecorder:
    """Puts down in the record of the call why it is refused. An `outcomes.Observer`."""

    def call_refused(self, refusal: Refusal) -> None:
        """Take note of a call that was refused, in the task that serves it."""
        current_record().refusal = refusal.value

    def chat_ended(self, end: ChatEnd) -> None:
        """Nothing: the service fills the record."""


class AuditInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Writes a line when a call has ended."""

    def __init__(self, log: AuditLog, *, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: monotonic."""
        self._log = log
        self._clock = clock
        self._last_refused = -_SECONDS_BETWEEN_REFUSED
        self._num_refused = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Return a handler that does what the next one does, and tells of it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method.removeprefix("/")
        # `auth` makes a stream both ways of every method; pairing is answered before it.
        behavior = handler.stream_stream or handler.unary_unary
        make = grpc.stream_stream_rpc_method_handler if handler.stream_stream else grpc.unary_unary_rpc_method_handler

        async def recorded(request: Any, context: grpc.aio.ServicerContext) -> Any:
            record, started, outcome = CallRecord(), self._clock(), "OK"
            _record.set(record)
            try:
                response = await behavior(request, context)
                # Of a refusal, too: `statuses` has told gRPC, which raises it when all handlers have returned.
                outcome = _CODES.get(context.code() or 0, "INTERNAL")
                return response
            except asyncio.CancelledError:
                left = context.time_remaining()
                outcome = "CANCELLED" if left is None or left > 0 else "DEADLINE_EXCEEDED"
                raise
            except BaseException:
                outcome = _CODES.get(context.code(), "INTERNAL")
                raise
            finally:
                try:
                    self._write(method, outcome, self._clock() - started, record)
                except Exception as error:  # noqa: BLE001 - here is nobody else between an exception and the caller
                    log_incident("a call could not be written down", error)

        return make(
            recorded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _write(self, method: str, outcome: str, seconds: float, record: CallRecord) -> None:
        if outcome == "OK" and method in METHODS[HEALTH]:
            return
        line: dict[str, object] = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            # What is no method's name is the caller's text.
            "method": method if method in _KNOWN_METHODS else "unknown",
            "outcome": outcome,
        }
        try:
            caller = current_caller()
        except LookupError:  # nobody that is known: to be paired, or refused
            if outcome != "OK":
                self._num_refused += 1
                now = self._clock()
                if now - self._last_refused < _SECONDS_BETWEEN_REFUSED:
                    return
                line["calls"], self._num_refused, self._last_refused = self._num_refused, 0, now
        else:
            line |= {"caller": caller.name, "role": caller.role}
        line["seconds"] = round(seconds, 3)
        for name in ("refusal", "finish_reason", "prompt_tokens", "completion_tokens"):
            if (value := getattr(record, name)) is not None:
                line[name] = value
        if record.rules:
            line["rules"] = sorted(record.rules)
        self._log.write(line)
