"""A daemon's gRPC servers: what they listen on, and what a call meets before a service does.

Local addresses and those of the network get a server each: a flood of connections to one leaves the other. Made by
`server`.
"""

import asyncio
import logging
from contextlib import ExitStack

import grpc
from grpc_reflection.v1alpha import reflection

from hearth.v1 import pairing_pb2
from hearthd.access.auth import AccessInterceptor
from hearthd.audit.audit import AuditInterceptor, RefusalRecorder
from hearthd.configuration.config import Config
from hearthd.life.beside import cancel
from hearthd.life.parts import HEALTH, SERVICES, Parts
from hearthd.listening.binding import bind
from hearthd.listening.instance_lock import hold_socket
from hearthd.listening.transport import transport_options
from hearthd.services.statuses import ErrorBoundary

__all__ = ["GrpcServers"]

_logger = logging.getLogger(__name__)

_SHOWN_BY_REFLECTION = (
    *SERVICES,
    pairing_pb2.DESCRIPTOR.services_by_name["PairingService"].full_name,
    HEALTH,
    reflection.SERVICE_NAME,
)


class GrpcServers:
    """Of the event loop."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self._config = config
        self._parts = parts
        self._servers: list[grpc.aio.Server] = []
        self._watching: asyncio.Task[None] | None = None
        self.addresses: list[str] = []
        """Where they listen, once they do: `unix:///path`, `host:port`."""

    async def open(self, held: ExitStack) -> None:
        """Bind all addresses and begin to answer. held: ends what is held for as long as they listen.

        Raises AddressInUseError, ConfigError.
        """
        self._bind(held)
        for server in self._servers:
            await server.start()
        _logger.info("listening on %s", ", ".join(self.addresses))
        ports = {int(each.rpartition(":")[2]) for each in self.addresses if not each.startswith("unix:")}
        self._watching = asyncio.create_task(self._parts.guard.watch(ports))

    def exposed(self) -> list[str]:
        """Return the addresses that other machines can reach."""
        bound = zip(self._parts.listeners, self.addresses, strict=True)
        return [address for listener, address in bound if listener.is_exposed and not listener.socket_path]

    async def close(self, seconds: float) -> None:
        """End, however far `open` has come. seconds: for calls that have just failed to say so."""
        if self._watching:
            await cancel(self._watching)
        # Not `stop(None)`, which would cut them off.
        await asyncio.gather(*(server.stop(seconds) for server in self._servers))

    def _bind(self, held: ExitStack) -> None:
        certificates = self._parts.certificates
        unix = [listener for listener in self._parts.listeners if listener.is_local]
        network = [listener for listener in self._parts.listeners if not listener.is_local]
        for listeners in (unix, network):
            if not listeners:
                continue
            server = self._make_server(is_unix=listeners is unix)
            self._servers.append(server)
            for listener in listeners:
                if listener.socket_path:
                    held.enter_context(hold_socket(listener.socket_path))
                secret = certificates.credentials() if certificates and not listener.is_local else None
                mode = self._config.server.unix_socket_mode
                self.addresses.append(bind(server, listener, unix_socket_mode=mode, credentials=secret))

    def _make_server(self, *, is_unix: bool) -> grpc.aio.Server:
        parts = self._parts
        # In this order: what stands further to the right hears only of calls that those before it let pass.
        audit = [AuditInterceptor(parts.audit_log)] if parts.audit_log else []
        boundary = ErrorBoundary([*parts.observation.observers, RefusalRecorder()])
        access = AccessInterceptor(parts.authenticator, parts.meters, parts.guard, is_unix=is_unix)
        server = grpc.aio.server(
            interceptors=[*audit, boundary, parts.pairing, access],
            options=transport_options(self._config.server, self._config.limits),
        )
        for add, servicer in parts.services:
            add(servicer, server)
        reflection.enable_server_reflection(_SHOWN_BY_REFLECTION, server)
        return server
