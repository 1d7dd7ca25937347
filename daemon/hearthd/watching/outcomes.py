"""How calls and chats end, in words of a bounded set: what may be counted, and never who asked or what was said.

`statuses` and `services` tell observers of each end. `tally` and `metrics.figures` are observers, made by
`observation`. Knows no gRPC and no Prometheus.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from hearthd.errors import (
    DeadlineTooShortError,
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
from hearthd.sequences.events import Finished, FinishReason

__all__ = [
    "CHAT_OUTCOMES",
    "ChatEnd",
    "Observer",
    "Refusal",
    "Unfinished",
    "refusal_of",
    "tell_refusal",
    "unfinished_by",
]


class Unfinished(enum.Enum):
    """Why a chat ended before its answer did."""

    CANCELLED = "cancelled"
    """Its caller left."""
    DEADLINE = "deadline"
    """Its caller's deadline passed."""
    SLOW_READER = "slow_reader"
    POLICY_REFUSED = "policy_refused"
    """A rule forbade what the model was about to write."""
    SHUTDOWN = "shutdown"
    FAILED = "failed"


CHAT_OUTCOMES: Final = tuple(each.value for each in (*FinishReason, *Unfinished))


class Refusal(enum.Enum):
    """Why a call was refused."""

    QUEUE_FULL = "queue_full"
    DEADLINE = "deadline"
    """No answer would have begun before it."""
    RATE = "rate"
    """Too many calls or tokens in a minute."""
    QUOTA = "quota"
    """Too many tokens in a day."""
    TOO_MANY_CHATS = "too_many_chats"
    """More at once than the role may have."""
    UNAUTHENTICATED = "unauthenticated"
    NOT_PERMITTED = "not_permitted"
    POLICY = "policy"
    INVALID = "invalid"
    NOT_FOUND = "not_found"
    NOT_SERVING = "not_serving"
    """The daemon loads or shuts down."""


# The keys of a role, with which `metering` begins what it says of a limit.
_LIMITS: Final = {
    "tokens_per_day": Refusal.QUOTA,
    "max_concurrent_chats": Refusal.TOO_MANY_CHATS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatEnd:
    """A chat that was handed to the engine and has ended."""

    model: str
    """As configured, not as the caller wrote it."""
    role: str
    priority: str = "normal"
    """One of the daemon's own words."""
    why: FinishReason | Unfinished
    finished: Finished | None
    """None of a chat that did not finish."""


class Observer(Protocol):
    """Counts what happens. Of the event loop; must not fail, and must keep nothing of what it is shown."""

    def chat_ended(self, end: ChatEnd) -> None:
        """Take note of a chat that has ended."""

    def call_refused(self, refusal: Refusal) -> None:
        """Take note of a call that was refused."""


def refusal_of(error: BaseException) -> Refusal | None:
    """Return why a call was refused; None where something else went wrong."""
    match error:
        case QueueFullError():
            return Refusal.QUEUE_FULL
        case DeadlineTooShortError():
            return Refusal.DEADLINE
        case QuotaExceededError():
            return _LIMITS.get(error.limit.partition(" ")[0], Refusal.RATE)
        case UnauthenticatedError():
            return Refusal.UNAUTHENTICATED
        case NotPermittedError():
            return Refusal.NOT_PERMITTED
        case PolicyRefusedError():
            return Refusal.POLICY
        case InvalidRequestError():
            return Refusal.INVALID
        case ModelNotFoundError() | UnknownServiceError() | UnknownMethodError():
            return Refusal.NOT_FOUND
        case NotServingError():
            return Refusal.NOT_SERVING
        case _:
            return None


def unfinished_by(error: Exception | None, seconds_left: float | None) -> Unfinished:
    """Return why a chat did not finish. error: what ended it, None if its caller did; seconds_left: to its deadline."""
    match error:
        case None:
            is_late = seconds_left is not None and seconds_left <= 0
            return Unfinished.DEADLINE if is_late else Unfinished.CANCELLED
        case DeadlineTooShortError():
            return Unfinished.DEADLINE
        case SlowReaderError():
            return Unfinished.SLOW_READER
        case PolicyRefusedError():
            return Unfinished.POLICY_REFUSED
        case NotServingError():
            return Unfinished.SHUTDOWN
        case _:
            return Unfinished.FAILED


def tell_refusal(observers: Iterable[Observer], error: BaseException) -> None:
    """Tell observers if an error is a refusal."""
    if (refusal := refusal_of(error)) is not None:
        for observer in observers:
            observer.call_refused(refusal)
