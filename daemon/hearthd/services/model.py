"""hearth.v1.ModelService: which models there are, what they can do, how long a text is in their tokens."""

from typing import Final

import grpc

from hearth.v1 import model_pb2, model_pb2_grpc
from hearthd.access.caller import current_caller
from hearthd.configuration.config import LimitsConfig
from hearthd.errors import InvalidRequestError
from hearthd.inference.model import Model
from hearthd.models.entry import Entry, ModelState
from hearthd.models.pool import ModelPool
from hearthd.policy.policy_file import PolicyFile
from hearthd.sequences.sampling import MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from hearthd.services.chosen_model import find_model
from hearthd.services.convert import read_conversation, to_sampling_options
from hearthd.services.prompt import encoding
from hearthd.services.tokenising import Tokenising

__all__ = ["ModelService"]

_STATES: Final = {
    ModelState.LOADABLE: model_pb2.MODEL_STATE_LOADABLE,
    ModelState.LOADING: model_pb2.MODEL_STATE_LOADING,
    ModelState.LOADED: model_pb2.MODEL_STATE_LOADED,
    ModelState.FAILED: model_pb2.MODEL_STATE_FAILED,
}


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """hearth.v1.ModelService."""

    def __init__(self, models: ModelPool, limits: LimitsConfig, tokenising: Tokenising, policy: PolicyFile) -> None:
        self._models = models
        self.limits = limits
        """In force; `live_parts` exchanges them."""
        self._tokenising = tokenising
        self._policy = policy

    async def ListModels(  # noqa: N802
        self,
        request: model_pb2.ListModelsRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> model_pb2.ListModelsResponse:
        """List the models, loaded or not."""
        self._models.require_loaded()
        # What a caller may not use is not there for it.
        rights = current_caller().rights
        models = [self._describe(entry) for entry in self._models.entries if rights.may_use(entry.name)]
        return model_pb2.ListModelsResponse(models=models)

    async def GetModel(  # noqa: N802
        self,
        request: model_pb2.GetModelRequest,
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> model_pb2.GetModelResponse:
        """Describe a model."""
        return model_pb2.GetModelResponse(model=self._describe(find_model(self._models, request.name)))

    async def CountTokens(  # noqa: N802
        self,
        request: model_pb2.CountTokensRequest,
        context: grpc.aio.ServicerContext,
    ) -> model_pb2.CountTokensResponse:
        """Count the tokens of a text or a conversation."""
        entry = find_model(self._models, request.model)
        async with self._models.using(entry, seconds_left=context.time_remaining()) as worker:
            return await self._count(request, worker.model)

    async def _count(self, request: model_pb2.CountTokensRequest, model: Model) -> model_pb2.CountTokensResponse:
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
                ids = await self._tokenising.run(account, encoding(model, rules, messages))
            case _:
                raise InvalidRequestError("input", "is not set; give text or conversation")
        return model_pb2.CountTokensResponse(token_count=len(ids))

    def _describe(self, entry: Entry) -> model_pb2.Model:
        facts = entry.facts
        if facts is None:  # its bundle cannot be read
            return model_pb2.Model(name=entry.name, state=_STATES[entry.state])
        caller = current_caller()
        # One of the context's tokens is the other side's at least.
        most = facts.context_length - 1
        return model_pb2.Model(
            name=entry.name,
            architecture=facts.architecture,
            context_length=facts.context_length,
            parameter_count=facts.parameter_count,
            quantization=facts.quantization,
            size_bytes=facts.size_bytes,
            license=facts.license,
            limits=model_pb2.Limits(
                max_total_tokens=facts.context_length,
                default_max_tokens=caller.choose_max_tokens(self.limits.default_max_tokens, is_asked=False),
                max_messages=self.limits.max_messages,
                max_request_bytes=self.limits.max_request_bytes,
                max_stop_strings=MAX_STOP_STRINGS,
                max_stop_string_chars=MAX_STOP_STRING_CHARS,
                max_top_logprobs=MAX_TOP_LOGPROBS,
                max_running=facts.num_slots,
                max_queued=self._models.max_queued,
                max_prompt_tokens=min(caller.rights.max_prompt_tokens or most, most),
                max_tokens=min(caller.rights.max_tokens or most, most),
            ),
            default_sampling=to_sampling_options(facts.default_sampling),
            source=facts.source,
            state=_STATES[entry.state],
            memory_bytes=facts.memory_bytes,
        )
