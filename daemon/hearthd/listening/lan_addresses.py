"""The IPv4 addresses under which other machines of the house reach this one.

Asks the kernel by ioctl and not by netlink, which the service's sandbox does not have. Sends nothing. Leaves out
loopback, tunnels and the bridges of containers, whose addresses mean nothing to a phone. Called by `pairing` and
`announcing`.
"""

import array
import fcntl
import ipaddress
import re
import socket
import struct
from typing import Final

__all__ = ["lan_addresses"]

# <linux/sockios.h>, <net/if.h>
_SIOCGIFCONF: Final = 0x8912
_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 0x1
_IFF_LOOPBACK: Final = 0x8
_IFF_POINTOPOINT: Final = 0x10
_IFF_MULTICAST: Final = 0x1000
# struct ifreq: a name of 16 bytes and a union, the largest member of which is struct ifmap.
_NAME_BYTES: Final = 16
_IFREQ_BYTES: Final = _NAME_BYTES + 3 * struct.calcsize("P")
_MAX_INTERFACES: Final = 256
_FOR_CONTAINERS: Final = re.compile(r"docker|br-|veth|virbr|vnet|lxc|lxdbr|podman|cni|flannel|cali")


def lan_addresses() -> tuple[str, ...]:
    """Return the addresses, that of the default route first; none if this machine is on no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        found = [address for name, address in _interfaces(asking) if _is_lan(asking, name)]
    usable = [address for address in dict.fromkeys(found) if not ipaddress.ip_address(address).is_loopback]
    first = _address_of_the_default_route()
    # One that the machine gave itself, since nobody gave it any, is the last resort.
    return tuple(sorted(usable, key=lambda each: (each != first, ipaddress.ip_address(each).is_link_local)))


def _interfaces(asking: socket.socket) -> list[tuple[bytes, str]]:
    buffer = array.array("B", bytes(_MAX_INTERFACES * _IFREQ_BYTES))
    address, _ = buffer.buffer_info()
    filled = fcntl.ioctl(asking, _SIOCGIFCONF, struct.pack("iP", len(buffer), address))
    data = buffer.tobytes()[: struct.unpack("iP", filled)[0]]
    requests = [data[start : start + _IFREQ_BYTES] for start in range(0, len(data), _IFREQ_BYTES)]
    # struct sockaddr_in: family and port, 2 bytes each, then the address.
    return [
        (each[:_NAME_BYTES].partition(b"\0")[0], socket.inet_ntoa(each[_NAME_BYTES + 4 : _NAME_BYTES + 8]))
        for each in requests
    ]


def _is_lan(asking: socket.socket, name: bytes) -> bool:
    if _FOR_CONTAINERS.match(name.decode("ascii", "replace")):
        return False
    answer = fcntl.ioctl(asking, _SIOCGIFFLAGS, struct.pack(f"{_NAME_BYTES}sH", name, 0) + bytes(_IFREQ_BYTES))
    (flags,) = struct.unpack_from("H", answer, _NAME_BYTES)
    return bool(flags & _IFF_UP and flags & _IFF_MULTICAST) and not flags & (_IFF_LOOPBACK | _IFF_POINTOPOINT)


def _address_of_the_default_route() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Of a datagram socket: the kernel chooses the route and sends nothing. An address of documentation.
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])
