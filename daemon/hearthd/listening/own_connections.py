"""The daemon's TCP connections as the kernel knows them, and how to hang up on one.

gRPC for Python tells nobody of a connection before a call comes, and closes none of them on request. So the process
looks through its own descriptors. To hang up, it shuts the connection down by a second descriptor: gRPC finds that its
peer has left, and tidies up.

Knows no gRPC, and not why. Called by `connection_guard`.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hearthd.listening.peer_address import End, parse_ip

__all__ = ["Connection", "find_connections", "hang_up"]

_DESCRIPTORS: Final = Path("/proc/self/fd")


@dataclass(frozen=True, slots=True)
class Connection:
    """One that a caller has made."""

    descriptor: int
    inode: int
    """Of the socket; the descriptor's number may come to mean another."""
    end: End


def find_connections(ports: Collection[int]) -> list[Connection]:
    """Return the connections that callers have made to ports of ours. Raises OSError if there is no descriptor left."""
    looked = [_look(int(name), ports) for name in os.listdir(_DESCRIPTORS)]
    return [connection for connection in looked if connection is not None]


def hang_up(connection: Connection) -> bool:
    """End a connection; whether that was done: it may be gone."""
    try:
        copy = os.dup(connection.descriptor)
    except OSError:
        return False
    try:
        # From here on it is known which socket this is: the copy cannot come to mean another.
        if os.fstat(copy).st_ino != connection.inode:
            return False
        with _borrowed(copy) as held:
            held.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    finally:
        os.close(copy)
    return True


def _look(descriptor: int, ports: Collection[int]) -> Connection | None:
    # One that is closed meanwhile, one that listens, and one of another kind have no peer.
    with contextlib.suppress(OSError):
        found = os.fstat(descriptor)
        if not stat.S_ISSOCK(found.st_mode):
            return None
        with _borrowed(descriptor) as held:
            if held.family not in (socket.AF_INET, socket.AF_INET6) or held.getsockname()[1] not in ports:
                return None
            host, port = held.getpeername()[:2]
            return Connection(descriptor, found.st_ino, End(parse_ip(host), port))
    return None


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Give a socket of somebody else's descriptor, and leave that open."""
    held = socket.socket(fileno=descriptor)
    try:
        yield held
    finally:
        held.detach()
