"""Everything that the daemon raises on purpose.

    HearthdError
    ├── ConfigError          the configuration cannot be used; exit before READY
    ├── BundleError          a model directory is missing, damaged or of another kind; exit before READY
    ├── BuildError           a checkpoint cannot become a bundle
    ├── BenchError           a model cannot be measured on this machine
    ├── MissingPackageError  the daemon's packages are not all installed; exit before READY
    ├── AddressInUseError    another daemon serves the address
    ├── InvalidRequestError  a request field is wrong           -> INVALID_ARGUMENT
    ├── ModelNotFoundError   no model of that name              -> NOT_FOUND
    ├── UnknownServiceError  no service of that name to ask for -> NOT_FOUND
    ├── UnknownMethodError   no method of that name             -> UNIMPLEMENTED
    ├── UnauthenticatedError no credential, or no valid one     -> UNAUTHENTICATED
    ├── NotPermittedError    the caller's role has no right     -> PERMISSION_DENIED
    ├── QuotaExceededError   a rate or quota of the caller      -> RESOURCE_EXHAUSTED
    ├── PolicyRefusedError   a rule of the policy forbids it    -> PERMISSION_DENIED
    ├── QueueFullError       too many chats wait                -> RESOURCE_EXHAUSTED
    ├── DeadlineTooShortError no answer would begin in time     -> DEADLINE_EXCEEDED
    ├── SlowReaderError      the caller does not read           -> RESOURCE_EXHAUSTED
    ├── NotServingError      loading, draining, no such load    -> UNAVAILABLE
    └── EngineCrashedError   the inference thread is dead       -> INTERNAL; the daemon exits

Each message is one line: what was wrong, the value, the limit, the remedy. No message holds a caller's text: it may
reach the journal. `statuses` maps these to gRPC statuses; nothing else does.
"""

from collections.abc import Sequence
from typing import Final, Self

__all__ = [
    "MAX_PROBLEMS",
    "AddressInUseError",
    "BenchError",
    "BuildError",
    "BundleError",
    "ConfigError",
    "DeadlineTooShortError",
    "EngineCrashedError",
    "HearthdError",
    "InvalidRequestError",
    "MissingPackageError",
    "ModelNotFoundError",
    "NotPermittedError",
    "NotServingError",
    "PolicyRefusedError",
    "QueueFullError",
    "QuotaExceededError",
    "SlowReaderError",
    "UnauthenticatedError",
    "UnknownMethodError",
    "UnknownServiceError",
]

# That are told of one request. They travel as metadata, of which callers take 8 KiB; each has some 200 bytes.
MAX_PROBLEMS: Final = 16


class HearthdError(Exception):
    """The base of all errors that the daemon raises on purpose."""


class ConfigError(HearthdError):
    """The configuration cannot be used."""


class BundleError(HearthdError):
    """A model directory is missing, damaged, hostile or of another kind."""


class ShortOfMemoryError(HearthdError):
    """There is not enough memory now; at another start there may be."""


class BuildError(HearthdError):
    """A checkpoint cannot become a bundle, or the bundle is not faithful enough."""


class BenchError(HearthdError):
    """A model cannot be measured on this machine."""


class MissingPackageError(HearthdError):
    """A package that the daemon needs is not installed."""


class AddressInUseError(HearthdError):
    """Another process serves the address."""


class InvalidRequestError(HearthdError):
    """A field of a request is wrong."""

    def __init__(self, field: str, message: str) -> None:
        """`field` is the path in the request's proto, for example `sampling.top_p` or `messages[2].role`."""
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.others: tuple[InvalidRequestError, ...] = ()
        """What else is wrong with the same request."""

    @property
    def problems(self) -> "tuple[InvalidRequestError, ...]":
        """All that is wrong, this first."""
        return (self, *self.others)

    @classmethod
    def of(cls, problems: Sequence[Self]) -> Self:
        """Return one error that tells all of these, at most MAX_PROBLEMS of them."""
        first, *others = problems[:MAX_PROBLEMS]
        first.others = tuple(others)
        return first


class ModelNotFoundError(HearthdError):
    """There is no model of that name."""


class UnknownServiceError(HearthdError):
    """The health of a service was asked that is not there."""


class UnknownMethodError(HearthdError):
    """A method was called that is not there."""


class UnauthenticatedError(HearthdError):
    """A call came without a credential, or with one that is not valid."""


class NotPermittedError(HearthdError):
    """The role of a caller has no right to what it asks for."""


class QuotaExceededError(HearthdError):
    """A caller has used up what its role allows in a minute, in a day, or at once."""

    def __init__(self, caller: str, limit: str, message: str, retry_after_seconds: float) -> None:
        """caller: its name. limit: which, in words, for example `requests_per_minute = 30 of role guest`."""
        super().__init__(message)
        self.caller = caller
        self.limit = limit
        self.retry_after_seconds = retry_after_seconds


class PolicyRefusedError(HearthdError):
    """A rule of the owner's policy forbids what a caller sent, or what the model wrote."""

    def __init__(self, message: str, rule: str) -> None:
        """`message` is the owner's own sentence, if the rule has one; `rule` is its name."""
        super().__init__(message)
        self.rule = rule


class QueueFullError(HearthdError):
    """Too many chats are waiting."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        """`retry_after_seconds` is what the caller is told to wait before it tries again."""
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineTooShortError(HearthdError):
    """A caller's deadline comes before its answer could begin."""


class SlowReaderError(HearthdError):
    """A caller does not read its stream, and its backlog reached the limit."""


class NotServingError(HearthdError):
    """The daemon is loading or draining, or a model cannot be loaded."""

    def __init__(self, message: str, *, retry_after_seconds: float | None = 0.25) -> None:
        """`retry_after_seconds`: what the caller is told to wait; None: waiting a little does not help."""
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineCrashedError(HearthdError):
    """An exception ended the inference thread. The daemon answers nothing any more and exits."""

    def __init__(self, incident: str) -> None:
        """`incident` is the id under which the journal has the exception."""
        super().__init__(f"the inference thread crashed, incident {incident}; the log has it")
        self.incident = incident
