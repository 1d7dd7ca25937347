"""hearth.v1.ModelService: which models there are, what they can do, how long a text is in their tokens."""

import grpc

from hearth.v1 import model_pb2, model_pb2_grpc
from hearthd.caller import current_caller
from hearthd.config import LimitsConfig
from hearthd.convert import read_conversation, to_sampling_options
from hearthd.errors import InvalidRequestError
from hearthd.model import Model
from hearthd.policy.policy_file import PolicyFile
from hearthd.sampling import MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from hearthd.services.chosen_model import find_model
from hearthd.services.prompt import encoding
from hearthd.tokenising import Tokenising
from hearthd.worker import Worker

__all__ = ["ModelService"]


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
        return model_pb2.GetModelResponse(model=self._describe(find_model(self._worker, request.name)))

    async def CountTokens(  # noqa: N802
        self,
        request: model_pb2.CountTokensRequest,
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> model_pb2.CountTokensResponse:
        """Count the tokens of a text or a conversation."""
        model = find_model(self._worker, request.model)
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
