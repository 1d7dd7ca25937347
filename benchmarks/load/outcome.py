"""What became of one request, whatever server it went to. Made by `chat` and `openai_http`, summed up by `summary`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class End(enum.StrEnum):
    """How a request ended."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """Before any of the answer: the server said that it would not, or not now."""
    FAILED = "failed"
    """Anything else that is no whole answer."""
    CANCELLED = "cancelled"
    """By the caller itself."""


@dataclass(slots=True)
class Outcome:
    """One request. Times are monotonic seconds."""

    caller: str
    scheduled: float
    """When it was due: all waiting counts from here, the generator's own delay included."""
    priority: str = ""
    sent: float = 0.0
    deltas: list[float] = field(default_factory=list)
    """When each piece of the answer's text came."""
    ended: float = 0.0
    end: End = End.FAILED
    reason: str = "it did not end"
    """Of a refusal or failure."""
    retry_after: float | None = None
    """Seconds that a refusal asks to wait."""
    positions: list[int] = field(default_factory=list)
    """In the queue, as they were announced."""
    text: str = ""
    tokens: list[tuple[int, float]] = field(default_factory=list)
    """Id and log probability of each, if they were asked for."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_seconds: float = 0.0
    """From arrival to slot, by the server."""

    @property
    def first_token(self) -> float | None:
        """When the first token came; of an answer without text, whose first token ended it, when that was said."""
        if self.deltas:
            return self.deltas[0]
        return self.ended if self.end is End.ANSWERED else None

    @property
    def first_token_seconds(self) -> float | None:
        """Time to first token, from when the request was due."""
        return None if self.first_token is None else self.first_token - self.scheduled

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece of the answer and the next."""
        return [after - before for before, after in zip(self.deltas, self.deltas[1:], strict=False)]
