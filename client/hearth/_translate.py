"""gRPC's failures as errors of this package: the only place where a status becomes an exception.

Works on anything that has the methods of a failed gRPC call, so that it needs no gRPC itself. Called by `_connection`
and `_pairing`.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from hearth._errors import (
    AuthenticationError,
    CallCancelledError,
    ConnectError,
    DeadlineError,
    HearthError,
    InternalError,
    InvalidRequestError,
    LimitExceededError,
    ModelNotFoundError,
    PermissionDeniedError,
    ProtocolError,
    QueueFullError,
    QuotaExceededError,
    UnavailableError,
)


class _Code(Protocol):
    @property
    def name(self) -> str: ...


class RpcFailure(Protocol):
    """What grpc.RpcError, synchronous or not, offers."""

    def code(self) -> _Code | None: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


class _Reason(NamedTuple):
    pattern: str
    text: str
    is_transient: bool


# gRPC's own words for a missing connection, and what they mean to a person. The first that matches counts.
_REASONS = (
    _Reason(r"No such file or directory", "there is no such socket; is hearthd running?", True),
    _Reason(r"Connection refused", "nobody listens there; is hearthd running?", True),
    _Reason(r"Permission denied", "this user may not open the socket", False),
    # The system's own resolver, which knows .local names, does not know this one; see _grpc.
    _Reason(r"getaddrinfo", "the name is not known", True),
    _Reason(
        r"resolv\w+ \S+\.local\b|DNS resolution failed for \S+\.local\b",
        "the name is not known; gRPC finds .local names only if GRPC_DNS_RESOLVER=native is in the environment when it "
        "is imported",
        True,
    ),
    _Reason(r"errors resolving|DNS resolution failed", "the name is not known", True),
    _Reason(r"WRONG_VERSION_NUMBER", "it does not speak TLS; leave the CA file out", False),
    _Reason(r"Hostname Verification|not in peer certificate", "its certificate is for another name or address", False),
    # Either clock may be the wrong one: most boards, and a device after a long sleep, do not know the date at first.
    _Reason(r"certificate has expired", "its certificate has expired; renew it, or set this device's clock", False),
    _Reason(r"not yet valid", "its certificate is not valid yet; set this device's clock, or the daemon's", False),
    _Reason(r"CERTIFICATE_VERIFY_FAILED", "its certificate is not signed by that of the CA file", False),
    _Reason(r"Expected SETTINGS frame", "it does not speak gRPC, or wants TLS: then name the CA file", False),
    _Reason(
        r"Socket closed|[Cc]onnection reset",
        "it hangs up at once: it has as many connections as it takes, or it wants TLS (then name the CA file), or a "
        "certificate of its callers (then name yours and its key)",
        True,
    ),
    _Reason(
        r"before receiving SETTINGS",
        "it takes connections and stays silent; if it is hearthd, restart it: sudo systemctl restart hearthd",
        True,
    ),
    _Reason(r"timed out|timeout was reached", "it does not answer; is it switched on, and in this network?", True),
)
_NO_CONNECTION = re.compile(r"(?i)failed to connect|errors resolving|DNS resolution failed|name resolution")
_CONNECTION_LOST = re.compile(
    r"(?i)^stream removed|socket closed|connection reset|connection aborted|broken pipe|ping timeout|keepalive|goaway"
    r"|transport closed|connection closed"
)
# The daemon writes `... incident 4f1c...` into the text of an INTERNAL; see hearth.v1.ChatService.
_ERROR_ID = re.compile(r"\b(?:incident|id)[ :=]+([A-Za-z0-9._:-]*[A-Za-z0-9])")
# gRPC's server says so itself, before the daemon sees the request.
_TOO_LARGE = re.compile(r"^SERVER: Received message larger than max \((\d+) vs\. (\d+)\)")
# gRPC's own words for a deadline that passed: "Deadline Exceeded", or "Stream removed (Deadline Exceeded)" where the
# end of the stream came first [M: grpcio 1.85, both clients]. The daemon's sentences never hold them.
_DEADLINE_PASSED = re.compile(r"(?i)deadline (exceeded|expired)\b")
_DETAILS_TRAILER = "grpc-status-details-bin"
_PUSHBACK_TRAILER = "grpc-retry-pushback-ms"


def translate(failure: RpcFailure, address: str) -> HearthError:
    """Make the error for a failed call to `address`."""
    code = failure.code()
    # What the daemon says becomes one line, whatever it is.
    said = " ".join((failure.details() or "").split())
    # Pair by pair: grpc.aio's metadata of older versions has keys() and is no mapping, so that dict() fails on it.
    trailers = dict(iter(failure.trailing_metadata() or ()))
    make = _BY_CODE.get(code.name if code else "UNKNOWN")
    if make is None:
        return ProtocolError(
            f"the daemon at {address} answered with the unexpected status {code and code.name}: {said}"
        )
    return make(said, trailers, address)


Trailers = dict[str, str | bytes]


def _invalid_argument(said: str, trailers: Trailers, address: str) -> HearthError:
    field, text = None, said
    if bad_request := _detail(trailers, "BadRequest"):
        for violation in bad_request.field_violations:
            field = field or violation.field or None
            text = text or f"{violation.field}: {violation.description}"
    return InvalidRequestError(text or f"the daemon at {address} refused the request and did not say why", field=field)


def _resource_exhausted(said: str, trailers: Trailers, address: str) -> HearthError:
    text = said or f"a limit of the daemon at {address} was reached"
    if too_large := _TOO_LARGE.search(said):
        text = f"the request has {too_large[1]} bytes; the daemon takes at most {too_large[2]}"
    is_retryable, delay = _retry_delay(trailers)
    if delay is None and is_retryable:
        return LimitExceededError(text)
    if delay is not None and _detail(trailers, "QuotaFailure") is not None:
        return QuotaExceededError(text, retry_after=delay)
    return QueueFullError(text, retry_after=delay)


def _unavailable(said: str, trailers: Trailers, address: str) -> HearthError:
    if _NO_CONNECTION.search(said):
        for reason in _REASONS:
            if re.search(reason.pattern, said):
                return ConnectError(f"cannot reach {address}: {reason.text}", is_transient=reason.is_transient)
        return ConnectError(f"cannot reach {address}: {said}")
    if _CONNECTION_LOST.search(said):
        # A dead peer has been waited for already.
        is_dead = re.search(r"(?i)ping timeout|keepalive", said) is not None
        what = "the daemon stopped answering" if is_dead else "the connection broke"
        return ConnectError(
            f"lost {address}: {what}; ask again when `hearth status` finds it", is_transient=not is_dead
        )
    # Older daemons say nothing of it, and nor does what may stand between: then it is tried again.
    is_transient, delay = _retry_delay(trailers)
    return UnavailableError(
        said or f"the daemon at {address} cannot serve now", retry_after=delay, is_transient=is_transient
    )


def _deadline_exceeded(said: str, _trailers: Trailers, address: str) -> DeadlineError:
    if said and not _DEADLINE_PASSED.search(said):
        # The daemon refused at once: its estimate tells how much time would do.
        return DeadlineError(said)
    return DeadlineError(f"the daemon at {address} did not finish in time; allow more with timeout (--timeout)")


def _cancelled(said: str, _trailers: Trailers, address: str) -> HearthError:
    if said.startswith("Locally cancelled"):
        return CallCancelledError(f"the call to {address} was cancelled before its end")
    # gRPC's server ends so what it had taken when it was told to stop.
    return UnavailableError(f"the daemon at {address} gave the call up; it is probably shutting down")


def _internal(said: str, trailers: Trailers, address: str) -> HearthError:
    request_info = _detail(trailers, "RequestInfo")
    match = _ERROR_ID.search(said)
    error_id = request_info.request_id if request_info and request_info.request_id else match and match[1]
    return InternalError(said or f"the daemon at {address} failed", error_id=error_id or None)


def _retry_delay(trailers: Trailers) -> tuple[bool, float | None]:
    """(whether another attempt is welcome, seconds until then or None if the daemon did not say)."""
    if (pushback := trailers.get(_PUSHBACK_TRAILER)) is not None:
        try:
            delay = int(pushback) / 1000
        except ValueError:
            delay = -1
        # Negative or malformed: do not come again (gRFC A6).
        return (True, delay) if delay >= 0 else (False, None)
    if retry_info := _detail(trailers, "RetryInfo"):
        delay = retry_info.retry_delay.seconds + retry_info.retry_delay.nanos / 1e9
        return (True, delay) if 0 <= delay < math.inf else (False, None)
    return True, None


def _detail(trailers: Trailers, name: str) -> Any:
    """The detail google.rpc.`name` of the status, or None."""
    packed = trailers.get(_DETAILS_TRAILER)
    if not isinstance(packed, bytes):
        return None
    from google.protobuf.message import DecodeError

    from hearth._standard_protos import message_class

    try:
        for detail in message_class("Status").FromString(packed).details:
            if detail.type_url.rpartition("/")[2] == f"google.rpc.{name}":
                return message_class(name).FromString(detail.value)
    except DecodeError:
        # The status and its text still say what happened.
        return None
    return None


_Make = Callable[[str, Trailers, str], HearthError]
_BY_CODE: dict[str, _Make] = {
    "INVALID_ARGUMENT": _invalid_argument,
    "NOT_FOUND": lambda said, _, address: ModelNotFoundError(said or f"the daemon at {address} has no such model"),
    "UNAUTHENTICATED": lambda said, _, address: AuthenticationError(
        said or f"the daemon at {address} wants a token that it knows"
    ),
    "PERMISSION_DENIED": lambda said, _, address: PermissionDeniedError(
        said or f"the daemon at {address} does not allow this call with this token"
    ),
    "RESOURCE_EXHAUSTED": _resource_exhausted,
    "UNAVAILABLE": _unavailable,
    "DEADLINE_EXCEEDED": _deadline_exceeded,
    "CANCELLED": _cancelled,
    "INTERNAL": _internal,
    "UNKNOWN": _internal,
    "DATA_LOSS": _internal,
    "UNIMPLEMENTED": lambda said, _, address: ProtocolError(
        f"{address} does not serve hearth.v1 as this client knows it ({said})"
    ),
}
