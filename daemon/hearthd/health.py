"""grpc.health.v1: whether the daemon serves, as a question and as a stream of changes.

Not grpcio-health-checking's own servicer: that one's Watch never ends by itself, and a server with one open Watch
waits with its shutdown for the whole grace. Knows no model and no engine. Called by `server`.
"""

import asyncio
from collections.abc import Iterable
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hearthd.errors import UnknownServiceError

__all__ = ["OVERALL", "HealthService"]

OVERALL: Final = ""

_Status = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One status for all services of the daemon: they need the same model and the same thread."""

    def __init__(self, services: Iterable[str]) -> None:
        """`services` are the full names that callers may ask for, besides the overall one."""
        self._services = frozenset({OVERALL, *services})
        self._status: int = _Status.NOT_SERVING
        self._has_ended = False
        self._changed = asyncio.Condition()

    async def set_serving(self, is_serving: bool) -> None:
        """Change the status, and tell everybody who watches."""
        async with self._changed:
            self._status = _Status.SERVING if is_serving else _Status.NOT_SERVING
            self._changed.notify_all()

    async def end_watches(self) -> None:
        """Let every Watch send the last status and end; those that begin later end at once."""
        async with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    async def Check(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> health_pb2.HealthCheckResponse:
        """Answer with the status now. Raises UnknownServiceError."""
        if request.service not in self._services:
            raise UnknownServiceError("there is no service of that name; List names those that there are")
        return _Status(status=self._status)

    async def List(  # noqa: N802
        self,
        request: health_pb2.HealthListRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> health_pb2.HealthListResponse:
        """Answer with the status of each service."""
        return health_pb2.HealthListResponse(
            statuses={service: _Status(status=self._status) for service in self._services}
        )

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Send the status now and at each change. A service that is not known never becomes one."""
        is_known = request.service in self._services
        sent: int | None = None
        while True:
            # Written outside of the lock: a caller who does not read must not hold up the others.
            status = self._status if is_known else _Status.SERVICE_UNKNOWN
            if status != sent:
                await context.write(_Status(status=status))
                sent = status
                continue
            if self._has_ended:
                return
            async with self._changed:
                if not self._has_ended and (not is_known or self._status == sent):
                    await self._changed.wait()
