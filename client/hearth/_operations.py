"""The small calls, each as data: where it goes, what it sends, what its response means.

Knows neither channels nor asyncio, so that `Client` and `AsyncClient` run the same ones.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hearth import _requests, _responses
from hearth._standard_protos import message_class
from hearth._status import DaemonStatus
from hearth._values import Health, Message, ModelInfo
from hearth.v1 import chat_pb2, model_pb2, status_pb2

_T = TypeVar("_T")

CHAT = f"/{chat_pb2.DESCRIPTOR.services_by_name['ChatService'].full_name}/Chat"
_MODEL = f"/{model_pb2.DESCRIPTOR.services_by_name['ModelService'].full_name}"
_STATUS = f"/{status_pb2.DESCRIPTOR.services_by_name['StatusService'].full_name}"


@dataclass(frozen=True, slots=True)
class Operation(Generic[_T]):
    """A call with one response."""

    method: str
    request: bytes
    parse: Callable[[bytes], _T]
    waits_for_ready: bool = True
    """False where the question is how the daemon is right now."""


def list_models() -> Operation[tuple[ModelInfo, ...]]:
    """ModelService.ListModels."""
    request = model_pb2.ListModelsRequest()
    return Operation(f"{_MODEL}/ListModels", request.SerializeToString(), _responses.parse_models)


def get_model(name: str | None) -> Operation[ModelInfo]:
    """ModelService.GetModel."""
    request = _requests.get_model_request(name)
    return Operation(f"{_MODEL}/GetModel", request.SerializeToString(), _responses.parse_model)


def count_tokens(text: str | Iterable[Message], model: str | None) -> Operation[int]:
    """ModelService.CountTokens."""
    request = _requests.count_tokens_request(text, model)
    return Operation(f"{_MODEL}/CountTokens", request.SerializeToString(), _responses.parse_token_count)


def get_status() -> Operation[DaemonStatus]:
    """StatusService.GetStatus."""
    request = status_pb2.GetStatusRequest()
    return Operation(
        f"{_STATUS}/GetStatus", request.SerializeToString(), _responses.parse_status, waits_for_ready=False
    )


def check_health() -> Operation[Health]:
    """grpc.health.v1.Health.Check of the daemon as a whole."""
    request = message_class("HealthCheckRequest")()
    return Operation(
        "/grpc.health.v1.Health/Check", request.SerializeToString(), _responses.parse_health, waits_for_ready=False
    )
