"""Errors become gRPC statuses here, and nowhere else.

`ErrorBoundary` stands around every method. Whatever a handler raises on purpose (`errors`) goes out as the status that
the protos promise, with its details; whatever else it raises goes out as INTERNAL with an incident's id, and the
journal has type and place under the same id. gRPC itself would send the exception's text to the caller.

`grpc_servers` puts the boundary in front of each gRPC server, before everything else that may refuse a call.
"""

import asyncio
import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2

from hearthd.errors import (
    MAX_PROBLEMS,
    DeadlineTooShortError,
    EngineCrashedError,
    InvalidRequestError,
    ModelNotFoundError,
    NotPermittedError,
    NotServingError,
    PolicyRefusedError,
    QueueFullError,
    QuotaExceededError,
    SlowReaderError,
    UnauthenticatedError,
    UnknownMethodError,
    UnknownServiceError,
)
from hearthd.logs import log_incident
from hearthd.watching.outcomes import Observer, tell_refusal

__all__ = ["ErrorBoundary", "RpcStatus", "status_of"]

# A pushback below zero: do not come again by yourself (gRFC A6).
_NEVER_MS: Final = -1


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """What a failed call answers."""

    code: grpc.StatusCode
    message: str
    details: tuple[ProtoMessage, ...] = ()
    retry_after_ms: int | None = None

    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the metadata that carries what does not fit code and message."""
        trailers: list[tuple[str, str | bytes]] = []
        if self.details:
            status = status_pb2.Status(code=self.code.value[0], message=self.message)
            for detail in self.details:
                status.details.append(any_pb2.Any())
                status.details[-1].Pack(detail)
            trailers.append(("grpc-status-details-bin", status.SerializeToString()))
        if self.retry_after_ms is not None:
            # gRPC's own retry policy obeys this and does not read RetryInfo (gRFC A6).
            trailers.append(("grpc-retry-pushback-ms", str(self.retry_after_ms)))
        return tuple(trailers)


def status_of(error: Exception) -> RpcStatus:
    """Return the status for an error; log it if it is a fault of the daemon."""
    match error:
        case InvalidRequestError():
            violations = error.problems[:MAX_PROBLEMS]
            detail = error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=each.field, description=each.message)
                    for each in violations
                ]
            )
            return RpcStatus(grpc.StatusCode.INVALID_ARGUMENT, "; ".join(map(str, violations)), (detail,))
        case ModelNotFoundError() | UnknownServiceError():
            return RpcStatus(grpc.StatusCode.NOT_FOUND, str(error))
        case UnknownMethodError():
            return RpcStatus(grpc.StatusCode.UNIMPLEMENTED, str(error))
        case UnauthenticatedError():
            return RpcStatus(grpc.StatusCode.UNAUTHENTICATED, str(error))
        case NotPermittedError():
            return RpcStatus(grpc.StatusCode.PERMISSION_DENIED, str(error))
        case PolicyRefusedError():
            detail = error_details_pb2.ErrorInfo(
                reason="POLICY_RULE", domain="hearth.v1", metadata={"rule": error.rule}
            )
            return RpcStatus(grpc.StatusCode.PERMISSION_DENIED, str(error), (detail,))
        case QueueFullError():
            return _try_again(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), error.retry_after_seconds)
        case QuotaExceededError():
            violation = error_details_pb2.QuotaFailure.Violation(
                subject=f"caller:{error.caller}", description=error.limit
            )
            detail = error_details_pb2.QuotaFailure(violations=[violation])
            return _try_again(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), error.retry_after_seconds, detail)
        case DeadlineTooShortError():
            return RpcStatus(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        case SlowReaderError():
            return RpcStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        case NotServingError(retry_after_seconds=float(seconds)):
            return _try_again(grpc.StatusCode.UNAVAILABLE, str(error), seconds)
        case NotServingError():
            return RpcStatus(grpc.StatusCode.UNAVAILABLE, str(error), retry_after_ms=_NEVER_MS)
        case EngineCrashedError():
            incident = error.incident
        case _:
            incident = log_incident("a call failed", error)
    return RpcStatus(grpc.StatusCode.INTERNAL, f"a fault of the daemon, incident {incident}; its journal says more")


def _try_again(code: grpc.StatusCode, message: str, seconds: float, *details: ProtoMessage) -> RpcStatus:
    # Up: whoever comes back a moment too early would only be sent away once more.
    milliseconds = math.ceil(seconds * 1000)
    delay = duration_pb2.Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)
    retry = error_details_pb2.RetryInfo(retry_delay=delay)
    return RpcStatus(code, message, (retry, *details), milliseconds)


class ErrorBoundary(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets nothing out of a handler but answers and statuses."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        """observers: are told of each call that is refused."""
        self._observers = observers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Return the method's handler with the boundary around it; None if there is no such method."""
        handler = await continuation(handler_call_details)
        return None if handler is None else _guarded(handler, self._observers)


class _MalformedRequest:
    """Stands for a request that cannot be parsed until there is a context to say so."""


def _guarded(handler: grpc.RpcMethodHandler, observers: Sequence[Observer]) -> grpc.RpcMethodHandler:
    serializers = {
        "request_deserializer": _guarded_deserializer(handler),
        "response_serializer": handler.response_serializer,
    }
    if handler.response_streaming:
        behavior = handler.stream_stream or handler.unary_stream
        factory = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return factory(_guarded_stream(behavior, observers), **serializers)
    behavior = handler.stream_unary or handler.unary_unary
    factory = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
    return factory(_guarded_unary(behavior, observers), **serializers)


def _guarded_deserializer(handler: grpc.RpcMethodHandler) -> Callable[[bytes], Any]:
    deserialize = handler.request_deserializer

    def guarded(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:  # noqa: BLE001 - protobuf's implementations raise different types
            if handler.request_streaming:  # raised into the handler, inside of the boundary
                raise _malformed() from None
            return _MalformedRequest()

    return guarded


def _malformed() -> InvalidRequestError:
    return InvalidRequestError("request", "is not a message of this method's request type")


def _guarded_unary(
    behavior: Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]], observers: Sequence[Observer]
) -> Callable[..., Any]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            _refuse_malformed(request)
            return await behavior(request, context)
        except BaseException as error:
            if _must_pass(error):
                raise
            tell_refusal(observers, error)
            await _abort(context, error)

    return guarded


def _guarded_stream(
    behavior: Callable[[Any, grpc.aio.ServicerContext], Any], observers: Sequence[Observer]
) -> Callable[..., Any]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> None:
        try:
            _refuse_malformed(request)
            if inspect.isasyncgenfunction(behavior):
                responses: AsyncIterator[Any] = behavior(request, context)
                async for response in responses:
                    await context.write(response)
            else:
                await behavior(request, context)
        except BaseException as error:
            if _must_pass(error):
                raise
            tell_refusal(observers, error)
            await _abort(context, error)

    return guarded


def _refuse_malformed(request: object) -> None:
    if isinstance(request, _MalformedRequest):
        raise _malformed()


def _must_pass(error: BaseException) -> bool:
    """Whether an exception is no answer to the caller: it is gone, or its deadline has passed, or gRPC has answered."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        # Otherwise nobody cancelled this call: a CancelledError from elsewhere would leave the caller waiting
        # (grpc#29248).
        return task is not None and task.cancelling() > 0
    return isinstance(error, grpc.aio.AbortError) or not isinstance(error, Exception)


async def _abort(context: grpc.aio.ServicerContext, error: BaseException) -> None:
    status = status_of(error if isinstance(error, Exception) else RuntimeError("a CancelledError of another task"))
    # What it came through holds the request and all that was made of it.
    error.__traceback__ = error.__context__ = None
    try:
        await context.abort(status.code, status.message, status.trailers())
    except grpc.aio.AbortError as aborted:
        # gRPC keeps this exception with the call, and raises it once more when the handler has returned. Its traceback
        # leads back to the call: a cycle, which would hold a refused prompt until a full garbage collection.
        aborted.__traceback__ = aborted.__context__ = None
