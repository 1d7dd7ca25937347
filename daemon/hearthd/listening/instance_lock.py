"""One daemon for each Unix socket: a lock beside it, taken before the socket is touched.

gRPC replaces a socket that another daemon serves, and deletes it when either ends; the lock is what keeps the second
one away. The kernel drops it with the process, so that nothing has to be cleaned up after a crash. Called by
`grpc_servers`.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hearthd.errors import AddressInUseError, ConfigError

__all__ = ["hold_socket"]


@contextmanager
def hold_socket(path: Path) -> Iterator[None]:
    """Own a socket's path for as long as the block runs; what a dead daemon left there is removed.

    Raises AddressInUseError if another process owns it, ConfigError if the directory cannot be used.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"server.unix_socket {path}: its directory cannot be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AddressInUseError(
                f"unix://{path} is served by another hearthd ({_owner(descriptor)}); stop that one, or give this one "
                "another server.unix_socket"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        _remove_stale(path)
        try:
            yield
        finally:
            # gRPC removes the socket of a server that it had started, not of one that was only bound.
            _remove_stale(path)
        # The lock's file stays: if it were removed, two daemons could each hold a lock on one of that name.
    finally:
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    pid = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
    return f"process {pid}" if pid.isdigit() else "process unknown"


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"server.unix_socket {path} is there already and is no socket; remove it or name another")
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"server.unix_socket {path} cannot be replaced: {error.strerror}") from None
