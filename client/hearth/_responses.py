"""Responses: messages of hearth.v1 as values.

Knows nothing of calls. Takes serialised bytes, so that a response that cannot be decoded is reported in one way,
whichever kind of client received it. Called by `_operations` and `_chat`.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from hearth import _status as status_values
from hearth import _values as values
from hearth._errors import ProtocolError
from hearth._standard_protos import message_class
from hearth.v1 import chat_pb2, model_pb2, status_pb2

_FINISH_REASONS = {
    chat_pb2.FINISH_REASON_END_OF_TURN: values.FinishReason.END_OF_TURN,
    chat_pb2.FINISH_REASON_STOP_STRING: values.FinishReason.STOP_STRING,
    chat_pb2.FINISH_REASON_LENGTH: values.FinishReason.LENGTH,
    chat_pb2.FINISH_REASON_TIME_LIMIT: values.FinishReason.TIME_LIMIT,
    chat_pb2.FINISH_REASON_POLICY: values.FinishReason.POLICY,
}
_STATES = {
    status_pb2.DAEMON_STATE_LOADING: status_values.DaemonState.LOADING,
    status_pb2.DAEMON_STATE_SERVING: status_values.DaemonState.SERVING,
    status_pb2.DAEMON_STATE_DRAINING: status_values.DaemonState.DRAINING,
}
_MODEL_STATES = {
    model_pb2.MODEL_STATE_LOADABLE: values.ModelState.LOADABLE,
    model_pb2.MODEL_STATE_LOADING: values.ModelState.LOADING,
    model_pb2.MODEL_STATE_LOADED: values.ModelState.LOADED,
    model_pb2.MODEL_STATE_FAILED: values.ModelState.FAILED,
}
_BOARD_FLAGS: dict[int, status_values.BoardFlag] = {
    status_pb2.BOARD_FLAG_UNDER_VOLTAGE: status_values.BoardFlag.UNDER_VOLTAGE,
    status_pb2.BOARD_FLAG_FREQUENCY_CAPPED: status_values.BoardFlag.FREQUENCY_CAPPED,
    status_pb2.BOARD_FLAG_THROTTLED: status_values.BoardFlag.THROTTLED,
    status_pb2.BOARD_FLAG_SOFT_TEMPERATURE_LIMIT: status_values.BoardFlag.SOFT_TEMPERATURE_LIMIT,
}
# grpc.health.v1.HealthCheckResponse.ServingStatus
_HEALTH = {1: values.Health.SERVING, 2: values.Health.NOT_SERVING}

_M = TypeVar("_M", bound=Message)


def decode(message_type: type[_M], data: bytes) -> _M:
    """Parse one message. Raises ProtocolError if `data` is none of that type."""
    try:
        return message_type.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"the daemon sent {len(data)} bytes that are no {message_type.DESCRIPTOR.name}") from error


def parse_models(data: bytes) -> tuple[values.ModelInfo, ...]:
    """ListModelsResponse -> the models, the default one first."""
    return tuple(_model(model) for model in decode(model_pb2.ListModelsResponse, data).models)


def parse_model(data: bytes) -> values.ModelInfo:
    """GetModelResponse -> the model."""
    response = decode(model_pb2.GetModelResponse, data)
    if not response.HasField("model"):
        raise ProtocolError("the daemon described no model")
    return _model(response.model)


def parse_token_count(data: bytes) -> int:
    """CountTokensResponse -> the number of tokens."""
    return decode(model_pb2.CountTokensResponse, data).token_count


def parse_health(data: bytes) -> values.Health:
    """grpc.health.v1.HealthCheckResponse -> the state."""
    return _HEALTH.get(decode(message_class("HealthCheckResponse"), data).status, values.Health.UNKNOWN)


def parse_status(data: bytes) -> status_values.DaemonStatus:
    """GetStatusResponse -> the daemon's state."""
    response = decode(status_pb2.GetStatusResponse, data)
    return status_values.DaemonStatus(
        state=_STATES.get(response.state, status_values.DaemonState.UNKNOWN),
        version=response.version,
        model=response.model,
        uptime_seconds=response.uptime_ms / 1000,
        num_running=response.running_count,
        max_running=response.max_running,
        num_queued=response.queued_count,
        max_queued=response.max_queued,
        resident_bytes=response.resident_bytes,
        num_chats_finished=response.chats_finished_count,
        num_chats_cancelled=response.chats_cancelled_count,
        num_chats_refused=response.chats_refused_count,
        num_chats_failed=response.chats_failed_count,
        num_prompt_tokens=response.prompt_tokens_count,
        num_cached_prompt_tokens=response.cached_prompt_tokens_count,
        num_completion_tokens=response.completion_tokens_count,
        warnings=tuple(response.warnings),
        interactive=_counts(response.interactive),
        normal=_counts(response.normal),
        background=_counts(response.background),
        kv_bytes=response.kv_bytes,
        max_kv_bytes=response.max_kv_bytes,
        recent=status_values.RecentAnswers(
            num_answers=response.recent.answer_count,
            median_time_to_first_token_seconds=response.recent.median_time_to_first_token_ms / 1000,
            worst_time_to_first_token_seconds=response.recent.worst_time_to_first_token_ms / 1000,
            median_decode_tokens_per_second=response.recent.median_decode_tokens_per_second,
        ),
        board=_board(response.board),
        models=tuple(
            status_values.ModelLoad(
                model.name, model.is_loaded, model.running_count, model.queued_count, model.load_count
            )
            for model in response.models
        ),
        num_drafted_tokens=response.drafted_tokens_count,
        num_accepted_tokens=response.accepted_tokens_count,
        num_cached_prompt_tokens_from_disk=response.cached_prompt_tokens_from_disk_count,
        num_refused_calls=dict(response.refused_calls_count),
    )


def _counts(counts: status_pb2.ChatCounts) -> status_values.ChatCounts:
    return status_values.ChatCounts(counts.running_count, counts.queued_count, counts.paused_count)


def _board(board: status_pb2.BoardStatus) -> status_values.BoardStatus:
    return status_values.BoardStatus(
        temperature_celsius=board.temperature_celsius if board.HasField("temperature_celsius") else None,
        flags=_flags(board.flags) if board.has_flags else None,
        flags_since_start=_flags(board.flags_since_start),
        thermal_level=board.thermal_level,
    )


def _flags(flags: Iterable[int]) -> tuple[status_values.BoardFlag, ...]:
    return tuple(_BOARD_FLAGS.get(flag, status_values.BoardFlag.UNKNOWN) for flag in flags)


def parse_delta(delta: chat_pb2.TextDelta) -> values.Delta:
    """TextDelta -> more of an answer."""
    return values.Delta(
        delta.text,
        tuple(
            values.TokenLogprob(_probability(entry.chosen), tuple(map(_probability, entry.top)))
            for entry in delta.token_logprobs
        ),
    )


def parse_queued(queued: chat_pb2.Queued) -> values.Queued:
    """Queued -> the same."""
    wait = queued.expected_wait_ms / 1000 if queued.HasField("expected_wait_ms") else None
    return values.Queued(queued.position, wait)


def parse_answer(final: chat_pb2.Final, text: str, token_logprobs: tuple[values.TokenLogprob, ...]) -> values.Answer:
    """Final, with what the deltas added up to -> the whole answer."""
    usage, timings = final.usage, final.timings
    return values.Answer(
        text=text,
        finish_reason=_FINISH_REASONS.get(final.finish_reason, values.FinishReason.UNKNOWN),
        usage=values.Usage(
            usage.prompt_tokens,
            usage.cached_prompt_tokens,
            usage.completion_tokens,
            usage.drafted_tokens,
            usage.accepted_tokens,
        ),
        timings=values.Timings(
            queue_seconds=timings.queue_ms / 1000,
            prefill_seconds=timings.prefill_ms / 1000,
            time_to_first_token_seconds=timings.time_to_first_token_ms / 1000,
            decode_seconds=timings.decode_ms / 1000,
            decode_tokens_per_second=timings.decode_tokens_per_second,
            paused_seconds=timings.paused_ms / 1000,
            longest_gap_seconds=timings.longest_gap_ms / 1000,
        ),
        request_id=final.request_id,
        model=final.model,
        token_logprobs=token_logprobs,
        throttled=final.throttled,
    )


def _probability(entry: chat_pb2.TokenProbability) -> values.TokenProbability:
    return values.TokenProbability(entry.token_id, entry.text, entry.logprob)


def _model(model: model_pb2.Model) -> values.ModelInfo:
    limits, sampling = model.limits, model.default_sampling

    def unless_unset(name: str) -> Any:
        return getattr(sampling, name) if sampling.HasField(name) else None

    return values.ModelInfo(
        name=model.name,
        architecture=model.architecture,
        context_length=model.context_length,
        num_parameters=model.parameter_count,
        quantization=model.quantization,
        size_bytes=model.size_bytes,
        license=model.license,
        source=model.source,
        state=_MODEL_STATES.get(model.state, values.ModelState.UNKNOWN),
        memory_bytes=model.memory_bytes,
        limits=values.Limits(
            max_total_tokens=limits.max_total_tokens,
            default_max_tokens=limits.default_max_tokens,
            max_messages=limits.max_messages,
            max_request_bytes=limits.max_request_bytes,
            max_stop_strings=limits.max_stop_strings,
            max_stop_string_chars=limits.max_stop_string_chars,
            max_top_logprobs=limits.max_top_logprobs,
            max_running=limits.max_running,
            max_queued=limits.max_queued,
            max_prompt_tokens=limits.max_prompt_tokens,
            max_tokens=limits.max_tokens,
        ),
        default_sampling=values.SamplingDefaults(
            **{name: unless_unset(name) for name in values.SamplingDefaults.__dataclass_fields__}
        ),
    )
