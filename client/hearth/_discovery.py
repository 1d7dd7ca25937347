"""Daemons that announce themselves on the local network by multicast DNS. The only place that knows `zeroconf`.

That package is an extra: `pip install 'hearth-chat[discover]'`. What is found says of itself what it likes; whoever
connects must compare the certificate. Called by `_whereabouts` and the command `discover`.
"""

import ipaddress
import queue
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from hearth._errors import ConfigurationError

SERVICE_TYPE = "_hearth._tcp.local."
ANNOUNCING = "a daemon announces itself only if the board's hearthd.toml has [discovery] announce = true"
_FINGERPRINT = re.compile(rb"[0-9a-f]{64}")
_MAX_DAEMONS = 256


@dataclass(frozen=True, slots=True)
class FoundDaemon:
    """What an announcement says."""

    name: str
    addresses: tuple[str, ...]
    """host:port"""
    fingerprint: str
    """SHA-256 of the certificate, base 16; empty if it does not say."""


def can_discover() -> bool:
    """Whether the extra is installed."""
    try:
        return find_spec("zeroconf") is not None
    except ValueError:  # what find_spec says of a module that the program itself has shut out
        return False


def discover(
    seconds: float, is_enough: Callable[[FoundDaemon], bool] = lambda _: False, interfaces: Sequence[str] = ()
) -> list[FoundDaemon]:
    """Ask the network and listen for so long, or until `is_enough`. Returns what answered, in the order it did.

    interfaces: this machine's own addresses on the networks to ask; none: all of them. Raises ConfigurationError if the
    extra is missing, or the network cannot be asked.
    """
    if not can_discover():
        raise ConfigurationError(
            "looking for daemons needs the package zeroconf on this device: pip install 'hearth-chat[discover]'; and "
            f"{ANNOUNCING}; or name the daemon with --address"
        )
    for interface in interfaces:
        if not _is_ipv4(interface):
            raise ConfigurationError(
                f"interface {interface[:80]!r} is no address as this machine has them, 192.168.1.7 for example; see: "
                "ip -4 address"
            )
    import zeroconf

    names: queue.SimpleQueue[str] = queue.SimpleQueue()

    def note(name: str, state_change: Any, **_: object) -> None:
        if state_change is not zeroconf.ServiceStateChange.Removed:
            names.put(name)

    deadline = time.monotonic() + seconds
    found: dict[str, FoundDaemon] = {}
    try:
        network = zeroconf.Zeroconf(
            interfaces=list(interfaces) or zeroconf.InterfaceChoice.All, ip_version=zeroconf.IPVersion.V4Only
        )
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigurationError(f"the network cannot be asked for daemons: {reason}") from error
    try:
        zeroconf.ServiceBrowser(network, SERVICE_TYPE, handlers=[note])
        while (left := deadline - time.monotonic()) > 0 and len(found) < _MAX_DAEMONS:
            try:
                name = names.get(timeout=left)
            except queue.Empty:
                break
            info = network.get_service_info(
                SERVICE_TYPE, name, timeout=max(1, round((deadline - time.monotonic()) * 1000))
            )
            if info is None or not info.port:
                continue
            found[name] = daemon = _read(name, info)
            if is_enough(daemon):
                break
    finally:
        network.close()
    return list(found.values())


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _read(name: str, info: Any) -> FoundDaemon:
    mark = info.properties.get(b"fp") or b""
    return FoundDaemon(
        name=name.removesuffix(f".{SERVICE_TYPE}"),
        addresses=tuple(f"{address}:{info.port}" for address in info.parsed_addresses()),
        fingerprint=mark.decode("ascii") if _FINGERPRINT.fullmatch(mark) else "",
    )
