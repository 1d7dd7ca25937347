"""hearth.v1.ChatService: a conversation in, its answer out, message by message."""

import asyncio
import logging
import time
from dataclasses import replace

import grpc

from hearth.v1 import chat_pb2, chat_pb2_grpc
from hearthd.access.caller import current_caller
from hearthd.access.metering import ChatMeter, Meters
from hearthd.audit.audit import current_record
from hearthd.configuration.config import LimitsConfig
from hearthd.errors import InvalidRequestError, QueueFullError, SlowReaderError
from hearthd.inference.stream import ChatStream
from hearthd.inference.worker import Worker
from hearthd.models.pool import ModelPool
from hearthd.policy.policy_file import PolicyFile
from hearthd.policy.screening import Screen
from hearthd.sequences.events import Queued
from hearthd.sequences.sequence import Sequence
from hearthd.services.chosen_model import find_model
from hearthd.services.convert import ChatCall, asked_priority, fit_to_context, read_chat, to_chat_response
from hearthd.services.prompt import encoding_with_beginning
from hearthd.services.tokenising import Tokenising
from hearthd.watching.observation import Observation
from hearthd.watching.outcomes import ChatEnd, unfinished_by

__all__ = ["ChatService"]

_logger = logging.getLogger(__name__)


class ChatService(chat_pb2_grpc.ChatServiceServicer):
    """hearth.v1.ChatService."""

    def __init__(
        self,
        models: ModelPool,
        meters: Meters,
        limits: LimitsConfig,
        tokenising: Tokenising,
        policy: PolicyFile,
        *,
        write_timeout_seconds: float,
        observation: Observation,
    ) -> None:
        """observation: is told of each chat that ends."""
        self._models = models
        self._meters = meters
        self.limits = limits
        """In force; `live_parts` exchanges them."""
        self._tokenising = tokenising
        self._policy = policy
        self._write_timeout_seconds = write_timeout_seconds
        self._observation = observation

    async def Chat(  # noqa: N802
        self, request: chat_pb2.ChatRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Answer a conversation, message by message."""
        arrived = time.monotonic()
        entry = find_model(self._models, request.model)
        # Before the model is waited for: a caller's limits hold then, too.
        with self._meters.admit_chat(current_caller()) as meter:

            async def tell(queued: Queued) -> None:
                await context.write(to_chat_response(queued, request.request_id, entry.name))

            async with self._models.using(entry, tell, context.time_remaining()) as worker:
                await self._answer(request, context, worker, meter, arrived)

    async def _answer(
        self,
        request: chat_pb2.ChatRequest,
        context: grpc.aio.ServicerContext,
        worker: Worker,
        meter: ChatMeter,
        arrived: float,
    ) -> None:
        model = worker.model
        caller = current_caller()
        priority = caller.choose_priority(asked_priority(request))
        # Before anything else of a request is looked at: it is when many come at once that most are refused.
        worker.require_room(priority, caller.account)
        call = read_chat(request, model, self.limits.max_messages)
        max_tokens = caller.choose_max_tokens(call.params.max_tokens, is_asked=call.sets_max_tokens)
        call = replace(call, params=replace(call.params, max_tokens=max_tokens))
        rules = self._policy.current.for_role(caller.role)
        if rules.has_output_rules and call.params.top_logprobs is not None:
            raise InvalidRequestError(
                "sampling.top_logprobs",
                "is set; this daemon's policy screens answers, and they would tell what it hides",
            )
        screen = rules.screen_answer()
        # Before the text is looked at, which costs most of all that comes before the model.
        with worker.admit(priority, caller.account) as chat:
            try:
                prompt_ids, num_first = await self._tokenising.run(
                    caller.account, encoding_with_beginning(model, rules, call.messages)
                )
                caller.require_prompt(len(prompt_ids))
                seconds_left = context.time_remaining()
                chat.submit(
                    Sequence(
                        request_id=call.request_id,
                        prompt_ids=tuple(prompt_ids),
                        num_first=num_first,
                        params=fit_to_context(call, len(prompt_ids), model.engine.context_length),
                        cache_identity=caller.identity,
                        audience=caller.role,
                        arrived=arrived,
                        priority=priority,
                        account=caller.account,
                        deadline=None if seconds_left is None else time.monotonic() + seconds_left,
                        screen=screen,
                    )
                )
                is_throttled = False
                async for event in chat:
                    is_throttled |= self._observation.governor.throttle.level > 0
                    _charge(meter, chat)
                    response = to_chat_response(event, call.request_id, model.name, is_throttled=is_throttled)
                    await self._write(context, chat, response)
            finally:
                _charge(meter, chat)
                _record_end(chat, screen)
                _log_end(chat, call, arrived)
                self._tell_end(chat, model.name, caller.role, context.time_remaining())

    def _tell_end(self, chat: ChatStream, model: str, role: str, seconds_left: float | None) -> None:
        if chat.sequence is None or isinstance(chat.error, QueueFullError):
            return  # refused, at once or when somebody came for whom it gave way
        finished = chat.finished
        why = unfinished_by(chat.error, seconds_left) if finished is None else finished.reason
        end = ChatEnd(model=model, role=role, priority=chat.sequence.priority.word, why=why, finished=finished)
        for observer in self._observation.observers:
            observer.chat_ended(end)

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
