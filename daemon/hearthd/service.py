"""The three services of hearth.v1: what a call does, from its request to its last message.

A handler checks, asks the worker, and converts; what goes wrong it raises, and `statuses` answers. Nothing that a
person says to the model, and nothing that it answers, goes into the log. Called by gRPC; made by `server`.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import grpc

from hearth.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc, status_pb2, status_pb2_grpc
from hearthd.audit import current_record
from hearthd.caller import current_caller
from hearthd.chat_template import Message
from hearthd.config import LimitsConfig
from hearthd.convert import (
    ChatCall,
    fit_to_context,
    read_chat,
    read_conversation,
    to_chat_response,
    to_sampling_options,
)
from hearthd.errors import InvalidRequestError, ModelNotFoundError, SlowReaderError
from hearthd.metering import ChatMeter, Meters
from hearthd.model import Model
from hearthd.policy.policy_file import PolicyFile
from hearthd.policy.rules import RoleRules
from hearthd.policy.screening import Screen
from hearthd.sampling import MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from hearthd.sequence import Sequence
from hearthd.stream import ChatStream
from hearthd.tokenising import Tokenising
from hearthd.version import daemon_version
from hearthd.worker import State, Worker

__all__ = ["ChatService", "ModelService", "StatusService"]

_logger = logging.getLogger(__name__)

_STATES: Final = {
    State.LOADING: status_pb2.DAEMON_STATE_LOADING,
    State.SERVING: status_pb2.DAEMON_STATE_SERVING,
    State.DRAINING: status_pb2.DAEMON_STATE_DRAINING,
    State.ENDED: status_pb2.DAEMON_STATE_DRAINING,
}


def _find_model(worker: Worker, name: str) -> Model:
    model = worker.model
    current_caller().require_model(name or model.name)
    if name not in ("", model.name):
        # The name that was asked for is the caller's text, so it is not repeated.
        raise ModelNotFoundError(f"there is no model of that name; this daemon serves {model.name}")
    return model


class ChatService(chat_pb2_grpc.ChatServiceServicer):
    """hearth.v1.ChatService."""

    def __init__(
        self,
        worker: Worker,
        meters: Meters,
        limits: LimitsConfig,
        tokenising: Tokenising,
        policy: PolicyFile,
        *,
        write_timeout_seconds: float,
    ) -> None:
        self._worker = worker
        self._meters = meters
        self.limits = limits
        """In force; `live_parts` exchanges them."""
        self._tokenising = tokenising
        self._policy = policy
        self._write_timeout_seconds = write_timeout_seconds

    async def Chat(  # noqa: N802
        self, request: chat_pb2.ChatRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Answer a conversation, message by message."""
        arrived = time.monotonic()
        model = _find_model(self._worker, request.model)
        call = read_chat(request, model, self.limits.max_messages)
        caller = current_caller()
        rules = self._policy.current.for_role(caller.role)
        if rules.has_output_rules and call.params.top_logprobs is not None:
            raise InvalidRequestError(
                "sampling.top_logprobs",
                "is set; this daemon's policy screens answers, and they would tell what it hides",
            )
        screen = rules.screen_answer()
        with self._meters.admit_chat(caller) as meter, self._worker.admit() as chat:
            try:
                prompt_ids = await self._tokenising.run(
                    current_caller().account, _encoding(model, rules, call.messages)
                )
                seconds_left = context.time_remaining()
                chat.submit(
                    Sequence(
                        request_id=call.request_id,
                        prompt_ids=tuple(prompt_ids),
                        params=fit_to_context(call, len(prompt_ids), model.engine.context_length),
                        cache_identity=caller.identity,
                        arrived=arrived,
                        deadline=None if seconds_left is None else time.monotonic() + seconds_left,
                        screen=screen,
                    )
                )
                async for event in chat:
                    _charge(meter, chat)
                    await self._write(context, chat, to_chat_response(event, call.request_id, model.name))
            finally:
                _charge(meter, chat)
                _record_end(chat, screen)
                _log_end(chat, call, arrived)

    async def _write(
        self, context: grpc.aio.ServicerContext, chat: ChatStream, response: chat_pb2.ChatResponse
    ) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_seconds):
                await context.write(response)
        except TimeoutError:
            error = SlowReaderError(
                f"the caller took nothing for {self._write_timeout_seconds:g} seconds, the limit; read faster"
            )
            chat.fail(error)
            raise error from None


def _charge(meter: ChatMeter, chat: ChatStream) -> None:
    """Charge what a chat has cost so far: nothing without a slot, its whole prompt with one, and each token since."""
    sequence = chat.sequence
    if sequence is not None and sequence.admitted is not None:
        meter.charge_up_to(len(sequence.prompt_ids) + len(sequence.output_ids))


def _encoding(model: Model, rules: RoleRules, messages: tuple[Message, ...]) -> Callable[[], list[int]]:
    """Return what makes token ids of a conversation, as the policy has it, in another thread."""
    fired = current_record().rules
    return lambda: model.tokenizer.encode_chat(rules.apply(messages, fired))


def _record_end(chat: ChatStream, screen: Screen | None) -> None:
    """Tell the audit log how a chat ended: counts, and names of rules."""
    record, sequence = current_record(), chat.sequence
    if screen is not None:
        record.rules |= screen.fired
    if sequence is not None and sequence.admitted is not None:
        record.prompt_tokens, record.completion_tokens = len(sequence.prompt_ids), len(sequence.output_ids)
    if chat.finished is not None:
        record.finish_reason = chat.finished.reason.value


def _log_end(chat: ChatStream, call: ChatCall, arrived: float) -> None:
    """Log how a chat ended: counts and times, no text."""
    if chat.sequence is None:
        return  # refused; its caller knows why
    finished = chat.finished
    if finished is not None:
        _logger.info(
            "chat %s of %s: %s, prompt %d (cached %d), answer %d tokens, first after %.0f ms, %.2f s",
            call.request_id,
            current_caller().name,
            finished.reason.value,
            finished.prompt_tokens,
            finished.cached_prompt_tokens,
            finished.completion_tokens,
            finished.time_to_first_token_seconds * 1000,
            time.monotonic() - arrived,
        )
    else:
        how = "cancelled" if chat.error is None else f"ended by {type(chat.error).__name__}"
        _logger.info(
            "chat %s of %s: %s, %.2f s", call.request_id, current_caller().name, how, time.monotonic() - arrived
        )


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """hearth.v1.ModelService."""

    def __init__(self, worker: Worker, limits: LimitsConfig, tokenising: Tokenising, policy: PolicyFile) -> None:
        self._worker = worker
        self.limits = limits
        """In force; `live_parts` exchanges them."""
        self._tokenising = tokenising
        self._policy = policy

    async def ListModels(  # noqa: N802
        self,
        request: model_pb2.ListModelsRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> model_pb2.ListModelsResponse:
        """List the one model."""
        model = self._worker.model
        # What a caller may not use is not there for it.
        models = [self._describe(model)] if current_caller().rights.may_use(model.name) else []
        return model_pb2.ListModelsResponse(models=models)

    async def GetModel(  # noqa: N802
        self,
        request: model_pb2.GetModelRequest,
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> model_pb2.GetModelResponse:
        """Describe a model."""
        return model_pb2.GetModelResponse(model=self._describe(_find_model(self._worker, request.name)))

    async def CountTokens(  # noqa: N802
        self,
        request: model_pb2.CountTokensRequest,
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> model_pb2.CountTokensResponse:
        """Count the tokens of a text or a conversation."""
        model = _find_model(self._worker, request.model)
        account = current_caller().account
        match request.WhichOneof("input"):
            case "text":
                ids = await self._tokenising.run(
                    current_caller().account, lambda: model.tokenizer.encode_text(request.text)
                )
            case "conversation":
                messages = read_conversation(
                    request.conversation.messages, self.limits.max_messages, must_end_with_user=False
                )
                rules = self._policy.current.for_role(current_caller().role)
                ids = await self._tokenising.run(account, _encoding(model, rules, messages))
            case _:
                raise InvalidRequestError("input", "is not set; give text or conversation")
        return model_pb2.CountTokensResponse(token_count=len(ids))

    def _describe(self, model: Model) -> model_pb2.Model:
        return model_pb2.Model(
            name=model.name,
            architecture=model.architecture,
            context_length=model.engine.context_length,
            parameter_count=model.parameter_count,
            quantization=model.quantization,
            size_bytes=model.size_bytes,
            license=model.license,
            limits=model_pb2.Limits(
                max_total_tokens=model.engine.context_length,
                default_max_tokens=self.limits.default_max_tokens,
                max_messages=self.limits.max_messages,
                max_request_bytes=self.limits.max_request_bytes,
                max_stop_strings=MAX_STOP_STRINGS,
                max_stop_string_chars=MAX_STOP_STRING_CHARS,
                max_top_logprobs=MAX_TOP_LOGPROBS,
                max_running=model.engine.num_slots,
                max_queued=self._worker.max_queued,
            ),
            default_sampling=to_sampling_options(model.default_sampling),
            source=model.source,
        )


class StatusService(status_pb2_grpc.StatusServiceServicer):
    """hearth.v1.StatusService. Answers while the model loads, and waits for nothing."""

    def __init__(
        self, worker: Worker, *, model_name: str, max_running: int, warnings: Callable[[], Iterable[str]] = tuple
    ) -> None:
        """model_name, max_running: as configured, for the time before the model is there.

        warnings: what somebody should look at, in lines that every caller may read.
        """
        self._warnings = warnings
        self._worker = worker
        self._model_name = model_name
        self._max_running = max_running
        self._started = time.monotonic()
        self._version = daemon_version()

    async def GetStatus(  # noqa: N802
        self,
        request: status_pb2.GetStatusRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> status_pb2.GetStatusResponse:
        """Describe the daemon."""
        worker, counts = self._worker, self._worker.counts
        num_running = min(worker.num_chats, self._max_running)
        return status_pb2.GetStatusResponse(
            state=_STATES[worker.state],
            version=self._version,
            uptime_ms=round((time.monotonic() - self._started) * 1000),
            running_count=num_running,
            max_running=self._max_running,
            queued_count=worker.num_chats - num_running,
            max_queued=worker.max_queued,
            resident_bytes=_resident_bytes(),
            chats_finished_count=counts.finished,
            chats_cancelled_count=counts.cancelled,
            chats_refused_count=counts.refused,
            chats_failed_count=counts.failed,
            prompt_tokens_count=counts.prompt_tokens,
            cached_prompt_tokens_count=counts.cached_prompt_tokens,
            completion_tokens_count=counts.completion_tokens,
            model=self._model_name,
            warnings=self._warnings(),
        )


def _resident_bytes() -> int:
    # proc(5): the second number of statm is the resident pages.
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
