"""Binding one address of a gRPC server. What may be bound, `listeners` has decided. Called by `grpc_servers`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from hearthd.errors import AddressInUseError
from hearthd.listening.listeners import Listener

__all__ = ["bind"]


def bind(
    server: grpc.aio.Server,
    listener: Listener,
    *,
    unix_socket_mode: int,
    credentials: grpc.ServerCredentials | None,
) -> str:
    """Let a server listen; return where it does, `unix:///path` or `host:port`. credentials: None for no TLS.

    Raises AddressInUseError.
    """
    try:
        with _umask(0o777 & ~unix_socket_mode):
            if credentials is None:
                port = server.add_insecure_port(listener.target)
            else:
                port = server.add_secure_port(listener.target, credentials)
    except RuntimeError:  # gRPC's only word for all that can go wrong with a bind
        raise AddressInUseError(
            f"{listener.text} cannot be bound: another program listens there, or it is no address of this machine; "
            "stop that program, or change server.tcp"
        ) from None
    # The kernel chooses a port for 0.
    return listener.text if listener.socket_path else f"{listener.target.rpartition(':')[0]}:{port}"


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    """Give what is created in the block its mode from the start: a chmod would come a moment too late."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
