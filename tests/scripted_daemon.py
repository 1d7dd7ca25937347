"""A peer for client tests: the services of hearth.v1, health and reflection on a real socket, scripted by the test.

What `Chat` does is a function that the test gives; the rest answers with fixed values. Knows nothing of the client.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from hearth.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc, status_pb2_grpc
from hearth.v1 import status_pb2 as daemon_status_pb2

Script = Callable[[chat_pb2.ChatRequest, grpc.ServicerContext], Iterable[chat_pb2.ChatResponse]]

MODEL = model_pb2.Model(
    name="tiny",
    architecture="LlamaForCausalLM",
    context_length=64,
    parameter_count=134_515_008,
    quantization="int8",
    size_bytes=138_000_000,
    license="Apache-2.0",
    source="a test",
    state=model_pb2.MODEL_STATE_LOADED,
    memory_bytes=210_000_000,
    limits=model_pb2.Limits(
        max_total_tokens=64,
        default_max_tokens=32,
        max_running=2,
        max_queued=8,
        max_top_logprobs=5,
        max_prompt_tokens=60,
        max_tokens=16,
    ),
    default_sampling=chat_pb2.SamplingOptions(temperature=0.5, top_k=0, top_p=0.9),
)
OTHER = model_pb2.Model(name="other", state=model_pb2.MODEL_STATE_FAILED)
STATUS = daemon_status_pb2.GetStatusResponse(
    state=daemon_status_pb2.DAEMON_STATE_SERVING,
    version="1.2.3",
    uptime_ms=93_784_500,
    running_count=1,
    max_running=2,
    queued_count=3,
    max_queued=8,
    resident_bytes=300 << 20,
    chats_finished_count=4,
    chats_cancelled_count=5,
    chats_refused_count=6,
    chats_failed_count=7,
    prompt_tokens_count=800,
    cached_prompt_tokens_count=200,
    completion_tokens_count=90,
    model="tiny",
)


def queued(position: int, expected_wait_ms: float | None = None) -> chat_pb2.ChatResponse:
    return chat_pb2.ChatResponse(queued=chat_pb2.Queued(position=position, expected_wait_ms=expected_wait_ms))


def delta(text: str, *logprobs: chat_pb2.TokenLogprob) -> chat_pb2.ChatResponse:
    return chat_pb2.ChatResponse(delta=chat_pb2.TextDelta(text=text, token_logprobs=logprobs))


def final(**fields: Any) -> chat_pb2.ChatResponse:
    values: dict[str, Any] = {
        "finish_reason": chat_pb2.FINISH_REASON_END_OF_TURN,
        "usage": chat_pb2.Usage(prompt_tokens=10, cached_prompt_tokens=4, completion_tokens=3),
        "timings": chat_pb2.Timings(
            queue_ms=1.0, prefill_ms=20.0, time_to_first_token_ms=25.0, decode_ms=50.0, decode_tokens_per_second=40.0
        ),
        "request_id": "r-1",
        "model": "tiny",
    }
    return chat_pb2.ChatResponse(final=chat_pb2.Final(**values | fields))


def say(*texts: str) -> Script:
    """A chat that answers with these texts."""

    def script(_request: chat_pb2.ChatRequest, _context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield from map(delta, texts)
        yield final()

    return script


def refuse(
    code: grpc.StatusCode, message: str = "", *, pushback: str | None = None, details: Iterable[Any] = ()
) -> Script:
    """A chat that ends with that status before anything was streamed."""

    def script(_request: chat_pb2.ChatRequest, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        abort(context, code, message, pushback=pushback, details=details)
        yield final()

    return script


def in_turn(*scripts: Script) -> Script:
    """The first chat runs the first script, the second the second, any further one the last."""
    left = list(scripts)
    lock = threading.Lock()

    def script(request: chat_pb2.ChatRequest, context: grpc.ServicerContext) -> Iterable[chat_pb2.ChatResponse]:
        with lock:
            chosen = left.pop(0) if len(left) > 1 else left[0]
        return chosen(request, context)

    return script


def abort(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    message: str,
    *,
    pushback: str | None = None,
    details: Iterable[Any] = (),
) -> None:
    if pushback is not None:
        context.set_trailing_metadata((("grpc-retry-pushback-ms", pushback),))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    if not packed:
        context.abort(code, message)
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message, details=packed)
    wrapped = rpc_status.to_status(status)
    context.set_trailing_metadata(
        (*((("grpc-retry-pushback-ms", pushback),) if pushback else ()), *wrapped.trailing_metadata)
    )
    context.abort(code, message)


def bad_request(field: str, description: str) -> error_details_pb2.BadRequest:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    return error_details_pb2.BadRequest(field_violations=[violation])


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def quota_failure(subject: str, description: str) -> error_details_pb2.QuotaFailure:
    violation = error_details_pb2.QuotaFailure.Violation(subject=subject, description=description)
    return error_details_pb2.QuotaFailure(violations=[violation])


class ScriptedDaemon(
    chat_pb2_grpc.ChatServiceServicer, model_pb2_grpc.ModelServiceServicer, status_pb2_grpc.StatusServiceServicer
):
    """A server that runs from `start` to `stop`, or while a `with` block does."""

    def __init__(
        self,
        chat: Script | None = None,
        *,
        address: str = "127.0.0.1:0",
        credentials: grpc.ServerCredentials | None = None,
        token: str | None = None,
    ) -> None:
        self.script: Script = chat or say("Hello", ", world")
        self.requests: list[chat_pb2.ChatRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.small_call: Callable[[grpc.ServicerContext], None] = lambda context: None
        """Runs before each call but Chat is answered."""
        self.status = STATUS
        self.chat_ended = threading.Event()
        """Some chat is over, however it ended."""
        self._address = address
        self._token = token
        self._server = grpc.server(
            futures.ThreadPoolExecutor(8),
            options=[("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 10)],
        )
        chat_pb2_grpc.add_ChatServiceServicer_to_server(self, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        status_pb2_grpc.add_StatusServiceServicer_to_server(self, self._server)
        self.health = health.HealthServicer()
        self.health.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        names = ("hearth.v1.ChatService", "hearth.v1.ModelService", "hearth.v1.StatusService", health.SERVICE_NAME)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._server)
        for name in names:
            self.health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if credentials is None:
            self._port = self._server.add_insecure_port(address)
        else:
            self._port = self._server.add_secure_port(address, credentials)

    @property
    def address(self) -> str:
        if self._address.startswith("unix:"):
            return self._address
        return f"{self._address.rpartition(':')[0]}:{self._port}"

    @property
    def port(self) -> int:
        return int(self._port)

    def start(self) -> ScriptedDaemon:
        self._server.start()
        return self

    def stop(self) -> None:
        self._server.stop(0).wait()

    def __enter__(self) -> ScriptedDaemon:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def Chat(self, request: chat_pb2.ChatRequest, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        self._note(context)
        self.requests.append(request)
        context.add_callback(self.chat_ended.set)
        yield from self.script(request, context)

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> model_pb2.ListModelsResponse:
        self._begin(context)
        return model_pb2.ListModelsResponse(models=[MODEL, OTHER])

    def GetModel(self, request: model_pb2.GetModelRequest, context: grpc.ServicerContext) -> model_pb2.GetModelResponse:
        self._begin(context)
        if request.name not in ("", "tiny"):
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no model {request.name!r}; there are tiny, other")
        return model_pb2.GetModelResponse(model=MODEL)

    def CountTokens(
        self, request: model_pb2.CountTokensRequest, context: grpc.ServicerContext
    ) -> model_pb2.CountTokensResponse:
        self._begin(context)
        if request.WhichOneof("input") == "text":
            return model_pb2.CountTokensResponse(token_count=len(request.text))
        return model_pb2.CountTokensResponse(token_count=1000 + len(request.conversation.messages))

    def GetStatus(self, request: Any, context: grpc.ServicerContext) -> daemon_status_pb2.GetStatusResponse:
        self._begin(context)
        return self.status

    def _begin(self, context: grpc.ServicerContext) -> None:
        self._note(context)
        self.small_call(context)

    def _note(self, context: grpc.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata())
        self.metadata.append(metadata)
        if self._token and metadata.get("authorization") != f"Bearer {self._token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token that this daemon knows")


def wait_for_end(context: grpc.ServicerContext) -> None:
    """Block until the call is over for another reason than this script's end."""
    over = threading.Event()
    if context.add_callback(over.set):
        over.wait(60)
