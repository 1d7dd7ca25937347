"""What happens to a sequence, in the order that its caller sees it: queued, deltas, and one end.

Values only. Knows neither how they are made (`engine`) nor how they travel (`worker`, `services`).
"""

import enum
from dataclasses import dataclass

__all__ = ["Delta", "Event", "Failed", "FinishReason", "Finished", "Queued", "TokenLogprob", "TokenProbability"]


class FinishReason(enum.Enum):
    """Why an answer ended."""

    END_OF_TURN = "end_of_turn"
    """The model ended its turn."""
    STOP_STRING = "stop_string"
    """One of the request's stop strings came."""
    LENGTH = "length"
    """max_tokens, or the end of the context, was reached."""
    POLICY = "policy"
    """A rule of the owner's policy ended the answer."""
    TIME_LIMIT = "time_limit"
    """The sequence's deadline, or the daemon's cap on an answer's wall time, was reached."""


@dataclass(frozen=True, slots=True)
class TokenProbability:
    """A token and the model's probability of it, before any sampling option."""

    token_id: int
    text: bytes
    """The token's own bytes, which need not be whole characters. Empty for a control token."""
    logprob: float
    """Natural logarithm, at most 0."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token, and the likeliest ones at its place."""

    token_id: int
    text: bytes
    logprob: float
    top: tuple[TokenProbability, ...]
    """Likeliest first; of equally likely ones the lower id first."""


@dataclass(frozen=True, slots=True)
class Queued:
    """The sequence waits for its turn."""

    position: int
    """How many sequences start before this one; 0 is the next to start."""
    expected_wait_seconds: float | None = None
    """Until it starts; None while nothing was measured yet."""


@dataclass(frozen=True, slots=True)
class Delta:
    """More of the answer."""

    text: str
    """Never empty, unless `token_logprobs` is not empty."""
    token_logprobs: tuple[TokenLogprob, ...] = ()
    """In the order of the tokens; only if the request asked. A token comes with the delta that completes its text."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete. The last event of its sequence."""

    reason: FinishReason
    prompt_tokens: int
    cached_prompt_tokens: int
    """Prompt tokens whose KV came from an earlier sequence of the same identity."""
    completion_tokens: int
    """The token that ended the answer included."""
    queue_seconds: float
    """From arrival to the slot."""
    prefill_seconds: float
    """From the slot to the logits of the prompt's last token, without pauses."""
    time_to_first_token_seconds: float
    """From arrival to the first token; 0 if the answer has none."""
    decode_seconds: float
    """From the first token to the last, without pauses."""
    paused_seconds: float = 0.0
    """While more urgent ones ran in its place."""
    longest_gap_seconds: float = 0.0
    """Between two tokens, without pauses."""
    drafted_tokens: int = 0
    """Tokens of the answer that were guessed and run together with the ones before."""
    accepted_tokens: int = 0
    """Those of them behind which the answer went on: each saved a step."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence cannot go on; the engine can. The last event of its sequence."""

    error: Exception


Event = Queued | Delta | Finished | Failed
