"""Everything that the client raises on purpose.

    HearthError
    ├── ConfigurationError        an address, token, certificate or time that cannot be used; nothing was sent
    ├── InvalidRequestError       a field of the request is wrong; `field` names it
    ├── ModelNotFoundError        the daemon has no model of that name
    ├── AuthenticationError       no token, or one that the daemon does not know
    ├── PermissionDeniedError     the token is known and does not allow this
    ├── LimitExceededError        a limit of the daemon was reached
    │   ├── QueueFullError        too many chats wait; `retry_after` says how many seconds to leave it in peace
    │   └── QuotaExceededError    this caller has used up a rate or its quota of the day; `retry_after` as above
    ├── UnavailableError          the daemon is loading its model or shutting down, or cannot load that model;
    │   │                         `retry_after` as above, `is_transient` says whether waiting may help
    │   └── ConnectError          there is no connection to a daemon
    ├── DeadlineError             the call took longer than its `timeout`, or the daemon says at once that it would
    ├── CallCancelledError        the stream or the client was closed before the end
    ├── InternalError             a fault of the daemon; `error_id` finds it in the daemon's journal
    └── ProtocolError             the other side does not speak hearth.v1 as agreed

Each message is one line that says what was wrong and what helps. Knows nothing of gRPC: `_translate` makes the errors
of the daemon from statuses, and nothing else does.
"""

__all__ = [
    "AuthenticationError",
    "CallCancelledError",
    "ConfigurationError",
    "ConnectError",
    "DeadlineError",
    "HearthError",
    "InternalError",
    "InvalidRequestError",
    "LimitExceededError",
    "ModelNotFoundError",
    "PermissionDeniedError",
    "ProtocolError",
    "QueueFullError",
    "QuotaExceededError",
    "UnavailableError",
]


class HearthError(Exception):
    """The base of all errors that the client raises on purpose."""


class ConfigurationError(HearthError):
    """What the client was given cannot be used. Nothing was sent."""


class InvalidRequestError(HearthError):
    """A field of the request is missing, malformed or out of range, or the conversation does not fit the context."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        """`field` is its path in the request, for example `sampling.top_p`; None if the daemon did not say."""
        super().__init__(message)
        self.field = field


class ModelNotFoundError(HearthError):
    """The daemon has no model of that name."""


class AuthenticationError(HearthError):
    """The daemon wants a token that it knows."""


class PermissionDeniedError(HearthError):
    """The daemon knows the token and does not allow this call."""


class LimitExceededError(HearthError):
    """A limit of the daemon was reached, for example the size of a request."""


class QueueFullError(LimitExceededError):
    """Too many chats wait, and the retries that the client was allowed are used up."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        """`retry_after`: the daemon asks not to be called again for so many seconds; None: not to be called again."""
        super().__init__(message)
        self.retry_after = retry_after


class QuotaExceededError(LimitExceededError):
    """This caller has used up what its role may have in a minute, in a day, or at once."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        """`retry_after`: seconds until the daemon would take another call; None if it did not say."""
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(HearthError):
    """The daemon cannot serve now: it is loading its model, or shutting down, or cannot load the model."""

    def __init__(self, message: str, *, retry_after: float | None = None, is_transient: bool = True) -> None:
        """`retry_after`: seconds that the daemon asks to wait; None if it did not say.

        `is_transient`: False if waiting a little does not help, as with a model that cannot be loaded, or with a
        certificate that does not fit.
        """
        super().__init__(message)
        self.retry_after = retry_after
        self.is_transient = is_transient


class ConnectError(UnavailableError):
    """There is no connection to a daemon, or it broke."""


class DeadlineError(HearthError):
    """The call took longer than its `timeout`, or the daemon refused it at once because it would have."""


class CallCancelledError(HearthError):
    """The stream or the client was closed before the answer was complete."""


class InternalError(HearthError):
    """A fault of the daemon."""

    def __init__(self, message: str, *, error_id: str | None = None) -> None:
        """`error_id` stands in the daemon's journal beside the cause; None if the daemon named none."""
        super().__init__(message)
        self.error_id = error_id


class ProtocolError(HearthError):
    """The other side is no Hearth daemon, or one whose protocol this client does not know."""
