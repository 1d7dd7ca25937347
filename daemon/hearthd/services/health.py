"""grpc.health.v1: whether the daemon serves, and each of its models, as a question and as a stream of changes.

    ""                             the daemon
    hearth.v1.ChatService          the same; so for every service, which all need the default model
    hearth.v1.ChatService/NAME     one model: SERVING if a chat with it can begin, though it may have to be loaded
                                   first; NOT_SERVING if it could not be loaded the last time

Not grpcio-health-checking's own servicer: that one's Watch never ends by itself, and a server with one open Watch
waits with its shutdown for the whole grace. Knows no engine; which models there are it is told. Called by `server`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hearthd.access.caller import current_caller
from hearthd.errors import UnknownServiceError
from hearthd.models.bell import Bell

__all__ = ["OVERALL", "HealthService"]

OVERALL: Final = ""
_MODEL: Final = "hearth.v1.ChatService/"

_Status = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One status for all services of the daemon: they need the same model and the same thread. One for each model."""

    def __init__(
        self, services: Iterable[str], models: Callable[[], Mapping[str, bool]] = dict, changed: Bell | None = None
    ) -> None:
        """services: full names that callers may ask for, besides the overall one.

        models: whether each model can be chatted with, by name. changed: rings when that may have changed.
        """
        self._services = frozenset({OVERALL, *services})
        self._models = models
        self._is_serving = False
        self._has_ended = False
        self._changed = changed or Bell()

    def set_serving(self, is_serving: bool) -> None:
        """Change the daemon's status, and tell everybody who watches."""
        self._is_serving = is_serving
        self._changed.ring()

    def end_watches(self) -> None:
        """Let every Watch send the last status and end; those that begin later end at once."""
        self._has_ended = True
        self._changed.ring()

    async def Check(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> health_pb2.HealthCheckResponse:
        """Answer with the status now. Raises UnknownServiceError."""
        status = self._statuses().get(request.service)
        if status is None:
            raise UnknownServiceError("there is no service of that name; List names those that there are")
        return _Status(status=status)

    async def List(  # noqa: N802
        self,
        request: health_pb2.HealthListRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> health_pb2.HealthListResponse:
        """Answer with the status of each service, and of each model that the caller's role may use."""
        return health_pb2.HealthListResponse(
            statuses={service: _Status(status=status) for service, status in self._statuses().items()}
        )

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Send the status now and at each change. A service that is not known may become one: a model, at a reload."""
        sent: int | None = None
        while True:
            status = self._statuses().get(request.service, _Status.SERVICE_UNKNOWN)
            if status != sent:
                await context.write(_Status(status=status))
                sent = status
            elif self._has_ended:
                return
            else:
                await self._changed.wait()

    def _statuses(self) -> dict[str, int]:
        """Return all that the caller may ask for. What it may not use is not there for it."""
        rights = current_caller().rights
        is_serving = dict.fromkeys(self._services, self._is_serving)
        for name, can_chat in self._models().items():
            if rights.may_use(name):
                is_serving[_MODEL + name] = self._is_serving and can_chat
        return {service: _Status.SERVING if serving else _Status.NOT_SERVING for service, serving in is_serving.items()}
