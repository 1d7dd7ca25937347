"""Who is at the other end of a connection: IP address and port out of gRPC's words, and the network that one host has.

One host can take any address of its IPv6 network: whoever counts hosts counts networks. Knows no gRPC. Used by
`connection_guard` and `pairing.gate`.
"""

import ipaddress
from typing import Final, NamedTuple
from urllib.parse import unquote

__all__ = ["IP", "End", "find_end", "find_source", "parse_ip"]

IP = ipaddress.IPv4Address | ipaddress.IPv6Address

# What a router gives to a home's network, all of it for any machine there to choose from (RFC 4291, 2.5.1).
_HOST_BITS: Final = 64


class End(NamedTuple):
    """The other end of a TCP connection."""

    ip: IP
    port: int


def parse_ip(text: str) -> IP:
    """Return an address without its zone; one of IPv4 also where an IPv6 socket took it. Raises ValueError."""
    ip = ipaddress.ip_address(text.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip


def find_end(peer: str) -> End | None:
    """Return what gRPC's `ipv4:192.0.2.1:36014` or `ipv6:%5B2001:db8::1%5D:36014` names; None: no such end."""
    kind, _, place = unquote(peer).partition(":")
    host, _, port = place.rpartition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    try:
        return End(parse_ip(host.strip("[]")), int(port))
    except ValueError:
        return None


def find_source(ip: IP) -> str:
    """Name the host, as far as can be told, that has an address: `192.0.2.1`, `2001:db8::/64`."""
    if ip.version == 4 or ip.is_loopback:
        return str(ip)
    return str(ipaddress.ip_network((int(ip) >> _HOST_BITS << _HOST_BITS, 128 - _HOST_BITS)))
