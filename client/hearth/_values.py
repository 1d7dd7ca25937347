"""What goes into the client and what comes out: frozen values, enums and option names.

Knows neither gRPC nor protobuf; `_requests` and `_responses` translate. Times are in seconds.
"""

import enum
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

Role: TypeAlias = Literal["system", "user", "assistant"]
Priority: TypeAlias = Literal["interactive", "normal", "background"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. A system message, if there is one, comes first; the last one is the user's."""

    role: Role
    content: str


class ChatOptions(TypedDict, total=False):
    """What `chat` and `stream` take by keyword. An option that is absent or None takes the model's default.

    The ranges are those of `SamplingOptions` in protos/hearth/v1/chat.proto; the daemon checks them.
    """

    model: str | None
    """Its name; the daemon's default model if not set."""
    temperature: float | None
    """0 chooses the likeliest token always; up to 2."""
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    """The same seed, request, model and machine give the same answer."""
    max_tokens: int | None
    stop: str | Sequence[str] | None
    """The answer ends before the first of these."""
    top_logprobs: int | None
    """Set: each delta carries log probabilities, with so many alternatives at each token; 0: the chosen ones only."""
    request_id: str | None
    """Names the request in the daemon's journal."""
    priority: Priority | None
    """How urgent it is; the daemon may not allow every one. Not set: the daemon decides."""


class ClientOptions(TypedDict, total=False):
    """What `Client` and `AsyncClient` take by keyword. Times are in seconds; math.inf is no limit."""

    daemon: str | None
    """Name of a paired daemon, instead of an address and of what belongs to it. Not set: HEARTH_DAEMON."""
    token: str | None
    """Sent with each call. Not set: `token_file`, then HEARTH_TOKEN, then the file that HEARTH_TOKEN_FILE names."""
    token_file: str | os.PathLike[str] | None
    ca: str | os.PathLike[str] | None
    """File with the certificate, PEM, that the daemon's is checked against. Makes the connection TLS. Not set:
    HEARTH_CA."""
    cert: str | os.PathLike[str] | None
    """File with a certificate, PEM, that says to the daemon who calls, for one that lets callers in by theirs. Goes
    with `key` and `ca`. Not set: HEARTH_CERT."""
    key: str | os.PathLike[str] | None
    """File with the key of `cert`, PEM, without a passphrase. Not set: HEARTH_KEY."""
    timeout: float
    """For a whole answer, waiting and retries included. 600 if not set."""
    call_timeout: float
    """For each of the small calls. 10 if not set."""
    ready_timeout: float
    """For so long, a daemon that is not there yet, or still loads its model, is waited for. 10 if not set; 0: never."""
    max_retries: int
    """When the queue is full, a chat is sent again so often, each time after the delay that the daemon asks for. 3 if
    not set."""
    keepalive: float
    """After so long a silence, a running call asks whether the daemon is alive; no sign of life within half of it ends
    the call with ConnectError. 10 if not set, so that a dead daemon is noticed after at most 15."""
    allow_plaintext_token: bool
    """Send the token over the network unencrypted. Whoever can listen there can then use it."""


@dataclass(frozen=True, slots=True)
class TokenProbability:
    """A token with its probability."""

    token_id: int
    text: bytes
    """The token's own bytes, which need not be whole characters."""
    logprob: float
    """Natural logarithm, before any sampling option."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One chosen token and the likeliest ones at its place, likeliest first."""

    chosen: TokenProbability
    top: tuple[TokenProbability, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """More of an answer's text."""

    text: str
    token_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Queued:
    """A chat waits for its turn."""

    position: int
    """How many chats are before it."""
    expected_wait_seconds: float | None
    """By the daemon's estimate; None if it has none yet."""


class FinishReason(enum.StrEnum):
    """Why an answer ended."""

    END_OF_TURN = "end_of_turn"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    """`max_tokens` or the end of the context was reached: the answer may break off in mid-sentence."""
    TIME_LIMIT = "time_limit"
    """The daemon's own cap on an answer's time was reached."""
    POLICY = "policy"
    """A rule of the daemon's owner ended the answer, before what it does not allow."""
    UNKNOWN = "unknown"
    """A reason that this client is too old to know."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that an answer cost."""

    prompt_tokens: int
    """The whole conversation with the template's own tokens."""
    cached_prompt_tokens: int
    """Of those, the ones taken from the daemon's cache."""
    completion_tokens: int
    drafted_tokens: int = 0
    """Of the answer: those that were guessed ahead."""
    accepted_tokens: int = 0
    """Those of them that came without a run of their own."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the daemon's time went."""

    queue_seconds: float
    prefill_seconds: float
    time_to_first_token_seconds: float
    decode_seconds: float
    decode_tokens_per_second: float
    paused_seconds: float = 0.0
    """While more urgent requests ran in its place; in none of the others."""
    longest_gap_seconds: float = 0.0
    """Between two tokens of the answer, without pauses."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    request_id: str
    model: str
    token_logprobs: tuple[TokenLogprob, ...] = ()
    """Empty unless `top_logprobs` was set."""
    throttled: bool = False
    """Whether the daemon held back meanwhile, because its board was hot or short of power."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask of a model."""

    max_total_tokens: int
    """Prompt and answer together."""
    default_max_tokens: int
    max_messages: int
    max_request_bytes: int
    max_stop_strings: int
    max_stop_string_chars: int
    max_top_logprobs: int
    max_running: int
    max_queued: int
    max_prompt_tokens: int = 0
    """That you may send; 0: the daemon is too old to say."""
    max_tokens: int = 0
    """That you may ask for; 0: the daemon is too old to say."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a model takes for sampling options that are not set; None where the daemon did not say."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None


class ModelState(enum.StrEnum):
    """Where a model is. All but FAILED answer requests; LOADABLE and LOADING make them wait first."""

    LOADABLE = "loadable"
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"
    """It could not be loaded; it is tried again after some seconds. Maybe only its name is known."""
    UNKNOWN = "unknown"
    """The daemon did not say, or in a word that this version does not know."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the daemon serves."""

    name: str
    architecture: str
    context_length: int
    num_parameters: int
    quantization: str
    size_bytes: int
    license: str
    source: str
    limits: Limits
    default_sampling: SamplingDefaults
    state: ModelState
    memory_bytes: int
    """What it takes when it is loaded and all its slots are full, as the daemon reckons it; 0: not known."""


class Health(enum.StrEnum):
    """The daemon's answer to grpc.health.v1."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
    UNKNOWN = "unknown"
