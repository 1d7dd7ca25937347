"""Where the daemon listens: addresses as a person writes them, resolved, and refused where they expose too much.

A host name is resolved here, once, and gRPC gets the addresses: what was checked is what is bound, and gRPC's own
resolver would go on without an error when only some of a name's addresses can be bound.

Binds nothing. Called by `life.parts`, and by `__main__` for check-config.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import quote

from hearthd.configuration.config import AuthConfig, MetricsConfig, ServerConfig, TlsConfig
from hearthd.errors import ConfigError
from hearthd.listening.tls import find_files

__all__ = ["Listener", "find_listeners", "find_metrics_listeners"]

# More than the longest host name (RFC 1035) with all around it; an error quotes an address.
_MAX_CHARACTERS: Final = 300
_FORMS: Final = "write host:port or [IPv6 address]:port, for example 127.0.0.1:50051"


@dataclass(frozen=True, slots=True)
class Listener:
    """One socket to listen on."""

    text: str
    """For people: `unix:///run/hearth/hearthd.sock`, `127.0.0.1:50051`."""
    target: str
    """For gRPC."""
    socket_path: Path | None = None
    """Of a Unix socket; None for TCP."""
    is_exposed: bool = False
    """Whether other machines can reach it; a Unix socket, by way of a proxy."""

    @property
    def is_local(self) -> bool:
        """Whether it is for callers on this machine, whom the file system lets in: no TLS, and its own queue."""
        return self.socket_path is not None and not self.is_exposed


def find_listeners(server: ServerConfig, tls: TlsConfig, auth: AuthConfig) -> tuple[Listener, ...]:
    """Resolve the addresses of a configuration.

    Asks the resolver if one of them is a host name. Raises ConfigError for an address that cannot be used, and for one
    that other machines can reach without TLS and authentication, unless `allow_insecure_lan` says that this is meant.
    """
    _refuse_unverifiable(tls, auth)
    listeners = []
    if server.unix_socket:
        listeners.append(_unix_listener(server.unix_socket))
    if server.tls_socket:
        listeners.append(replace(_unix_listener(server.tls_socket), is_exposed=True))
    # A name and its address may both be given; the second bind would fail.
    tcp = {listener.target: listener for address in server.tcp for listener in _tcp_listeners("server.tcp", address)}
    listeners.extend(tcp.values())
    _refuse_exposure(listeners, server, tls, auth)
    return tuple(listeners)


def find_metrics_listeners(metrics: MetricsConfig, taken: Sequence[Listener] = ()) -> tuple[Listener, ...]:
    """Resolve the address of the metrics; none if there is none. taken: where the daemon listens for callers.

    Raises ConfigError for an address that cannot be used or is taken, and for one that other machines can reach unless
    `allow_lan` says that this is meant: the page asks for no credential.
    """
    listeners = _tcp_listeners("metrics.address", metrics.address) if metrics.address else []
    exposed = next((listener for listener in listeners if listener.is_exposed), None)
    if exposed and not metrics.allow_lan:
        raise ConfigError(
            f"metrics.address is {exposed.text}, which other machines can reach, and the page asks for no credential: "
            "give an address of 127.0.0.1, or set metrics.allow_lan = true to let everybody on the network read the "
            "figures"
        )
    for listener in listeners:
        other = next((each for each in taken if _is_same_port(each, listener)), None)
        if other:
            raise ConfigError(
                f"metrics.address is {listener.text}, and server.tcp has {other.text}, which is the same port of the "
                "same address: give the metrics a port of their own"
            )
    return tuple({listener.target: listener for listener in listeners}.values())


def _is_same_port(one: Listener, other: Listener) -> bool:
    """Whether only one of two can be bound. An unspecified address is all addresses."""
    (host, port), (other_host, other_port) = one.target.rsplit(":", 1), other.target.rsplit(":", 1)
    if one.socket_path or other.socket_path or port != other_port or port == "0":
        return False
    return host == other_host or "[::]" in (host, other_host)


def _refuse_exposure(listeners: Sequence[Listener], server: ServerConfig, tls: TlsConfig, auth: AuthConfig) -> None:
    missing = [] if tls.is_configured else ["tls.directory (or tls.certificate and tls.key)"]
    missing += [] if auth.token_file or auth.certificates else ["auth.token_file (or auth.certificates)"]
    if not missing or server.allow_insecure_lan:
        return
    for listener in listeners:
        if listener.is_exposed:
            key = "tls_socket" if listener.socket_path else "tcp"
            raise ConfigError(
                f"server.{key} has {listener.text}, which other machines can reach, without {', '.join(missing)}: set "
                "what is missing, or listen on 127.0.0.1 alone, or set server.allow_insecure_lan = true to let "
                "everybody on the network use the model and read what is said"
            )


def _refuse_unverifiable(tls: TlsConfig, auth: AuthConfig) -> None:
    """Refuse names of certificates that nobody would check: without an authority, no caller shows a certificate."""
    files = find_files(tls)
    if auth.certificates and (files is None or files.clients is None):
        where = f"{tls.directory} as clients.crt" if tls.directory else "tls.clients"
        raise ConfigError(
            "auth.certificates names client certificates, and there is no authority to check them against: put its "
            f"certificate into {where}, or take auth.certificates out"
        )


def _unix_listener(path: Path) -> Listener:
    # gRPC takes the path for a part of a URI: unquoted, `%41` would name another file.
    return Listener(f"unix://{path}", f"unix:{quote(os.fsencode(path))}", socket_path=path)


def _tcp_listeners(key: str, address: str) -> list[Listener]:
    if len(address) > _MAX_CHARACTERS:
        raise ConfigError(f"{key} has an address of {len(address)} characters; {_FORMS}")
    match = re.fullmatch(r"(?:\[(?P<ipv6>[^\[\]]+)\]|(?P<host>[^\[\]:/]+)):(?P<port>[0-9]{1,5})", address)
    if not match or int(match["port"]) > 65535:
        raise ConfigError(f"{key} has {address!r}; {_FORMS}")
    host, port = match["ipv6"] or match["host"], int(match["port"])
    flags = socket.AI_PASSIVE | (socket.AI_NUMERICHOST if match["ipv6"] else 0)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no host name"
        raise ConfigError(f"{key} has {address!r}, whose host cannot be resolved: {reason}; {_FORMS}") from None
    listeners = []
    for _, _, _, _, sockaddr in found:
        literal = str(sockaddr[0])
        ip = ipaddress.ip_address(literal)
        if ip.is_unspecified:
            # [M] gRPC binds [::] with IPv4 on top of it for either spelling, so they are one socket.
            literal = "::"
        target = f"[{literal}]:{port}" if ":" in literal else f"{literal}:{port}"
        listeners.append(Listener(address, target, is_exposed=not ip.is_loopback))
    return listeners
