"""Addresses of a daemon: read what a person writes, and find the one to use when nobody wrote any.

Knows nothing of gRPC but how it spells a target. Called by `_settings`, and by `_whereabouts`, which asks who answers.
"""

import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from hearth._errors import ConfigurationError

DEFAULT_PORT = 50051
SYSTEM_SOCKET = "/run/hearth/hearthd.sock"
FORMS = "write unix:///absolute/path, host:port or [IPv6 address]:port"

# sun_path holds 108 bytes, the last of them zero (unix(7)).
_MAX_SOCKET_PATH_BYTES = 107
# More than the longest host name (RFC 1035) or socket path with all around it; an error quotes an address.
_MAX_CHARACTERS = 300
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?\.?")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a daemon is."""

    text: str
    """As a person writes it; for messages."""
    target: str
    """As gRPC takes it."""
    is_unix: bool
    is_loopback: bool
    """What is sent there cannot be seen from outside this machine."""


def parse_address(text: str) -> Address:
    """Read `unix:///path`, `host:port` or `[::1]:port`. Raises ConfigurationError on anything else."""
    if len(text) > _MAX_CHARACTERS:
        raise ConfigurationError(f"an address of {len(text)} characters; it has at most {_MAX_CHARACTERS}; {FORMS}")
    if text.startswith("unix:"):
        return _parse_unix(text)
    if "://" in text:
        raise ConfigurationError(f"address {text!r}: no such scheme; {FORMS}")
    if text.startswith("["):
        host, bracket, port_text = text[1:].rpartition("]:")
    else:
        host, bracket, port_text = text.rpartition(":")
        if ":" in host:
            raise ConfigurationError(f"address {text!r}: more than one colon; {FORMS}")
    if not bracket:
        example = f"{text}:{DEFAULT_PORT}"
        raise ConfigurationError(f"address {text!r}: the port is missing, for example {example!r}; {FORMS}")
    if not (port_text.isascii() and port_text.isdigit() and 1 <= int(port_text[:6]) <= 65535 and len(port_text) < 6):
        raise ConfigurationError(f"address {text!r}: the port is not a number from 1 to 65535")
    is_loopback = _parse_ipv6(text, host).is_loopback if text.startswith("[") else _is_loopback_name(text, host)
    return Address(text, f"dns:///{quote(text, safe='[]:')}", is_unix=False, is_loopback=is_loopback)


def _parse_unix(text: str) -> Address:
    path = text.removeprefix("unix://")
    if not path.startswith("/"):
        raise ConfigurationError(f"address {text!r}: the path of a Unix socket is absolute: unix:///run/x.sock")
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES or "\0" in path:
        raise ConfigurationError(
            f"address {text!r}: the path of a Unix socket has at most {_MAX_SOCKET_PATH_BYTES} bytes, none of them zero"
        )
    # gRPC takes the path for a part of a URI: unquoted, `%41` would name another file and `#` would cut it off.
    return Address(text, f"unix:{quote(os.fsencode(path))}", is_unix=True, is_loopback=True)


def _parse_ipv6(text: str, host: str) -> ipaddress.IPv6Address:
    try:
        return ipaddress.IPv6Address(host)
    except ValueError:
        raise ConfigurationError(f"address {text!r}: {host!r} is not an IPv6 address; {FORMS}") from None


def _is_loopback_name(text: str, host: str) -> bool:
    if not host:
        raise ConfigurationError(f"address {text!r}: the host is missing; {FORMS}")
    if not _HOST.fullmatch(host) or len(host) > 253:
        raise ConfigurationError(f"address {text!r}: {host!r} is not the name or address of a host; {FORMS}")
    try:
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        if all(part.isdigit() for part in host.rstrip(".").split(".")):
            raise ConfigurationError(f"address {text!r}: {host!r} is not an IPv4 address") from None
        return host.lower() == "localhost"


def default_address(environ: Mapping[str, str]) -> str:
    """HEARTH_ADDRESS, else the likeliest place of this machine."""
    return environ.get("HEARTH_ADDRESS") or local_addresses(environ)[0]


def local_addresses(environ: Mapping[str, str]) -> list[str]:
    """Where a daemon of this machine may be: the Unix sockets of this user's and of the system's; else loopback.

    Loopback counts only where there is no socket: while a daemon that has one is away, anybody on this machine may
    listen on the port. A socket that this user may not write to is another group's: loopback is for everybody.
    """
    return [f"unix://{path}" for path in _sockets(environ) if os.access(path, os.W_OK)] or [loopback_address()]


def loopback_address() -> str:
    """Where a daemon listens that was told no other TCP address."""
    return f"127.0.0.1:{DEFAULT_PORT}"


def closed_socket(environ: Mapping[str, str]) -> str | None:
    """The path of a daemon's socket that is there and that this user may not write to; None if there is none."""
    return next((path for path in _sockets(environ) if not os.access(path, os.W_OK)), None)


def _sockets(environ: Mapping[str, str]) -> list[str]:
    candidates = [SYSTEM_SOCKET]
    if (runtime := environ.get("XDG_RUNTIME_DIR", "")).startswith("/"):
        candidates.insert(0, f"{runtime}/hearth/hearthd.sock")
    return [path for path in candidates if _is_socket(path) and _has_own_place(path)]


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _has_own_place(path: str) -> bool:
    """Whether nobody but root, the daemon or this user could have put that socket there.

    That is, its directory is root's or this user's; or whoever has it got it from root, in a directory like /run: the
    service's own user, whose name not each machine can look up.
    """
    directory = os.path.dirname(path)
    try:
        owner, above = os.stat(directory).st_uid, os.stat(os.path.dirname(directory))
    except OSError:
        return False
    return owner in (0, os.geteuid()) or (above.st_uid == 0 and not above.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
