"""The Python client of Hearth, a chat model that lives in the house.

    from hearth import Client

    with Client() as client:
        print(client.chat("Why is the sky blue?").text)

Importing this package loads no gRPC, no NumPy and no model runtime: `Client` and `AsyncClient` arrive when they are
first named. If gRPC is not imported by then, they have it find .local names (GRPC_DNS_RESOLVER=native, unless set).
What stands in `__all__` is the public interface; every module with a leading underscore may change.
"""

from typing import TYPE_CHECKING

from hearth._errors import (
    AuthenticationError,
    CallCancelledError,
    ConfigurationError,
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
from hearth._status import (
    BoardFlag,
    BoardStatus,
    ChatCounts,
    DaemonState,
    DaemonStatus,
    ModelLoad,
    RecentAnswers,
)
from hearth._values import (
    Answer,
    ChatOptions,
    ClientOptions,
    Delta,
    FinishReason,
    Health,
    Limits,
    Message,
    ModelInfo,
    ModelState,
    Priority,
    Queued,
    Role,
    SamplingDefaults,
    Timings,
    TokenLogprob,
    TokenProbability,
    Usage,
)

if TYPE_CHECKING:
    from hearth._async_client import AsyncChatStream, AsyncClient
    from hearth._client import ChatStream, Client

__all__ = [
    "Answer",
    "AsyncChatStream",
    "AsyncClient",
    "AuthenticationError",
    "BoardFlag",
    "BoardStatus",
    "CallCancelledError",
    "ChatCounts",
    "ChatOptions",
    "ChatStream",
    "Client",
    "ClientOptions",
    "ConfigurationError",
    "ConnectError",
    "DaemonState",
    "DaemonStatus",
    "DeadlineError",
    "Delta",
    "FinishReason",
    "Health",
    "HearthError",
    "InternalError",
    "InvalidRequestError",
    "LimitExceededError",
    "Limits",
    "Message",
    "ModelInfo",
    "ModelLoad",
    "ModelNotFoundError",
    "ModelState",
    "PermissionDeniedError",
    "Priority",
    "ProtocolError",
    "QueueFullError",
    "Queued",
    "QuotaExceededError",
    "RecentAnswers",
    "Role",
    "SamplingDefaults",
    "Timings",
    "TokenLogprob",
    "TokenProbability",
    "UnavailableError",
    "Usage",
]

# Those whose module imports gRPC, which takes a board about a second.
_LAZY = {
    "AsyncChatStream": "hearth._async_client",
    "AsyncClient": "hearth._async_client",
    "ChatStream": "hearth._client",
    "Client": "hearth._client",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'hearth' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
