"""Messages of the protocol to the engine's values and back. Pure functions; no gRPC, no waiting.

Whatever a request says is checked here, before anything is computed, and all that is wrong with it is told at once.
Called by `services`.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from hearth.v1 import chat_pb2
from hearthd.errors import InvalidRequestError
from hearthd.inference.model import Model
from hearthd.priority import Priority
from hearthd.sequences.events import Delta, Event, Finished, FinishReason, Queued, TokenLogprob
from hearthd.sequences.sampling import SamplingParams, validate
from hearthd.text.chat_template import Message, Role, validate_messages

__all__ = [
    "ChatCall",
    "asked_priority",
    "fit_to_context",
    "read_chat",
    "read_conversation",
    "to_chat_response",
    "to_sampling_options",
]

_MAX_REQUEST_ID_CHARS: Final = 64
_NOT_IN_REQUEST_ID: Final = re.compile(r"[^A-Za-z0-9._:-]")
_ROLES: Final[dict[int, Role]] = {
    chat_pb2.ROLE_SYSTEM: "system",
    chat_pb2.ROLE_USER: "user",
    chat_pb2.ROLE_ASSISTANT: "assistant",
}
_PRIORITIES: Final[dict[int, Priority | None]] = {
    chat_pb2.PRIORITY_UNSPECIFIED: None,
    chat_pb2.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    chat_pb2.PRIORITY_NORMAL: Priority.NORMAL,
    chat_pb2.PRIORITY_BACKGROUND: Priority.BACKGROUND,
}
_FINISH_REASONS: Final = {
    FinishReason.END_OF_TURN: chat_pb2.FINISH_REASON_END_OF_TURN,
    FinishReason.STOP_STRING: chat_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.LENGTH: chat_pb2.FINISH_REASON_LENGTH,
    FinishReason.TIME_LIMIT: chat_pb2.FINISH_REASON_TIME_LIMIT,
    FinishReason.POLICY: chat_pb2.FINISH_REASON_POLICY,
}
_OPTIONS: Final = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "top_logprobs",
)


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A ChatRequest that is well-formed; whether it fits the context, its tokens will tell."""

    request_id: str
    messages: tuple[Message, ...]
    params: SamplingParams
    sets_max_tokens: bool


def asked_priority(request: chat_pb2.ChatRequest) -> Priority | None:
    """Return what a request asks for; None if the caller's role decides, or `read_chat` refuses what it asks for."""
    return _PRIORITIES.get(request.priority)


def read_chat(request: chat_pb2.ChatRequest, model: Model, max_messages: int) -> ChatCall:
    """Check a request. Raises InvalidRequestError; its `others` hold what else is wrong."""
    problems: list[InvalidRequestError] = []
    messages: tuple[Message, ...] = ()
    try:
        messages = read_conversation(request.messages, max_messages)
    except InvalidRequestError as error:
        problems.extend(error.problems)
    params = _read_sampling(request.sampling, model, problems)
    if fault := _find_request_id_fault(request.request_id):
        problems.append(InvalidRequestError("request_id", fault))
    if request.priority not in _PRIORITIES:
        problems.append(
            InvalidRequestError(
                "priority", f"is {request.priority}; give PRIORITY_INTERACTIVE, PRIORITY_NORMAL or PRIORITY_BACKGROUND"
            )
        )
    if problems:
        raise InvalidRequestError.of(problems)
    return ChatCall(
        request_id=request.request_id or secrets.token_hex(8),
        messages=messages,
        params=params,
        sets_max_tokens=request.sampling.HasField("max_tokens"),
    )


def _find_request_id_fault(request_id: str) -> str | None:
    faults = []
    if len(request_id) > _MAX_REQUEST_ID_CHARS:
        faults.append(f"has {len(request_id)} characters")
    if wrong := _NOT_IN_REQUEST_ID.search(request_id):
        # In ASCII, and no more than this one: an id may have been meant for other eyes.
        faults.append(f"has {wrong[0]!a} at character {wrong.start() + 1}")
    if not faults:
        return None
    return f"{' and '.join(faults)}; give at most {_MAX_REQUEST_ID_CHARS} characters of A-Z a-z 0-9 . _ : -"


def read_conversation(
    messages: Sequence[chat_pb2.Message], max_messages: int, *, must_end_with_user: bool = True
) -> tuple[Message, ...]:
    """Check messages. Raises InvalidRequestError; its `others` hold what else is wrong."""
    if len(messages) > max_messages:
        raise InvalidRequestError("messages", f"has {len(messages)} messages; give at most {max_messages}")
    problems = [
        InvalidRequestError(
            f"messages[{place}].role", f"is {message.role}; give ROLE_SYSTEM, ROLE_USER or ROLE_ASSISTANT"
        )
        for place, message in enumerate(messages)
        if message.role not in _ROLES
    ]
    # For a role that is none, the user's: of that message the content is judged, and its role not once more.
    converted = tuple(Message(_ROLES.get(message.role, "user"), message.content) for message in messages)
    try:
        validate_messages(converted, must_end_with_user=must_end_with_user)
    except InvalidRequestError as error:
        problems.extend(error.problems)
    if problems:
        raise InvalidRequestError.of(problems)
    return converted


def _read_sampling(
    options: chat_pb2.SamplingOptions, model: Model, problems: list[InvalidRequestError]
) -> SamplingParams:
    """Return the model's defaults with what the request sets; note what is out of range."""
    params = model.default_sampling
    given: dict[str, object] = {name: getattr(options, name) for name in _OPTIONS if options.HasField(name)}
    if options.stop:
        given["stop"] = tuple(options.stop)
    for name, value in given.items():
        # One at a time, so that `validate`, which stops at the first, finds each.
        candidate = replace(params, **{name: value})  # type: ignore[arg-type]
        try:
            validate(candidate, model.runner.vocab_size)
        except InvalidRequestError as error:
            problems.extend(error.problems)
        else:
            params = candidate
    return params


def fit_to_context(call: ChatCall, num_prompt_tokens: int, context_length: int) -> SamplingParams:
    """Return the call's sampling with the most tokens that its answer may have.

    Raises InvalidRequestError if prompt and answer do not fit: nothing is ever cut short silently.
    """
    room = context_length - num_prompt_tokens
    if room < 1:
        raise InvalidRequestError(
            "messages",
            f"prompt_tokens {num_prompt_tokens} leave no room in the context_length {context_length}; send fewer or "
            "shorter messages",
        )
    max_tokens = call.params.max_tokens
    if call.sets_max_tokens and max_tokens > room:
        raise InvalidRequestError(
            "sampling.max_tokens",
            f"prompt_tokens {num_prompt_tokens} + max_tokens {max_tokens} exceed the context_length {context_length}; "
            f"give at most {room}, or send fewer or shorter messages",
        )
    return replace(call.params, max_tokens=min(max_tokens, room))


def to_chat_response(
    event: Event, request_id: str, model_name: str, *, is_throttled: bool = False
) -> chat_pb2.ChatResponse:
    """Return what the caller sees of an event. A Failed is no response, and must not come here.

    is_throttled: whether the daemon held anything back meanwhile.
    """
    match event:
        case Queued():
            wait = event.expected_wait_seconds
            queued = chat_pb2.Queued(position=event.position, expected_wait_ms=None if wait is None else wait * 1000)
            return chat_pb2.ChatResponse(queued=queued)
        case Delta():
            return chat_pb2.ChatResponse(
                delta=chat_pb2.TextDelta(text=event.text, token_logprobs=map(_to_logprob, event.token_logprobs))
            )
        case Finished():
            return chat_pb2.ChatResponse(final=_to_final(event, request_id, model_name, is_throttled))
        case _:
            raise TypeError(f"{type(event).__name__} is no response")


def _to_logprob(logprob: TokenLogprob) -> chat_pb2.TokenLogprob:
    return chat_pb2.TokenLogprob(
        chosen=chat_pb2.TokenProbability(token_id=logprob.token_id, text=logprob.text, logprob=logprob.logprob),
        top=(
            chat_pb2.TokenProbability(token_id=each.token_id, text=each.text, logprob=each.logprob)
            for each in logprob.top
        ),
    )


def _to_final(event: Finished, request_id: str, model_name: str, is_throttled: bool) -> chat_pb2.Final:
    decoded = event.completion_tokens - 1
    return chat_pb2.Final(
        finish_reason=_FINISH_REASONS[event.reason],
        usage=chat_pb2.Usage(
            prompt_tokens=event.prompt_tokens,
            cached_prompt_tokens=event.cached_prompt_tokens,
            completion_tokens=event.completion_tokens,
            drafted_tokens=event.drafted_tokens,
            accepted_tokens=event.accepted_tokens,
        ),
        timings=chat_pb2.Timings(
            queue_ms=event.queue_seconds * 1000,
            prefill_ms=event.prefill_seconds * 1000,
            time_to_first_token_ms=event.time_to_first_token_seconds * 1000,
            decode_ms=event.decode_seconds * 1000,
            decode_tokens_per_second=decoded / event.decode_seconds if decoded > 0 and event.decode_seconds > 0 else 0,
            paused_ms=event.paused_seconds * 1000,
            longest_gap_ms=event.longest_gap_seconds * 1000,
        ),
        request_id=request_id,
        model=model_name,
        throttled=is_throttled,
    )


def to_sampling_options(params: SamplingParams) -> chat_pb2.SamplingOptions:
    """Return a model's defaults as a request would set them, without seed and max_tokens."""
    return chat_pb2.SamplingOptions(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
    )
