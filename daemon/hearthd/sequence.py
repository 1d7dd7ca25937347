"""One request's state while the engine works on it."""

from dataclasses import dataclass

from hearthd.sampling import SamplingParams

__all__ = ["Sequence"]


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One request: made by the caller, then owned by the engine. Compared by identity."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    cache_identity: str
    """KV is reused only between sequences of equal identity."""
    arrived: float
    """By the engine's monotonic clock, seconds."""
    deadline: float | None = None
    """By the same clock; the answer ends with TIME_LIMIT when it passes."""
