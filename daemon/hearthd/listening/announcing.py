"""The daemon's name on the local network, by multicast DNS: what `hearth discover` lists. Off unless configured.

**This is the only thing that the daemon sends without being asked.** It says, to whoever listens in the same network:
here is a Hearth daemon, its host's name, address and port, and the SHA-256 of its certificate. No model, no caller.

Announces only where there is a network with other machines on it, and follows its addresses when they change. The only
import of zeroconf on this side. Called by `server`.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from hearthd.listening.lan_addresses import lan_addresses
from hearthd.logs import log_incident

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncZeroconf

__all__ = ["SERVICE_TYPE", "Announcer", "announce"]

_logger = logging.getLogger(__name__)

SERVICE_TYPE: Final = "_hearth._tcp.local."
# Addresses change when a router restarts; nobody is in a hurry to know.
_LOOK_SECONDS: Final = 30.0


async def announce(exposed: Sequence[str], fingerprint: Callable[[], bytes | None]) -> None:
    """Announce what listens for other machines until cancelled; a fault of it is told and ends nothing else.

    exposed: the addresses that they can reach, `host:port` or `[host]:port`.
    """
    if not exposed:
        _logger.warning("not announced: no other machine can reach any address of server.tcp")
        return
    hosts = {address.rpartition(":")[0] for address in exposed}

    def addresses() -> Sequence[str]:
        return [address for address in lan_addresses() if "[::]" in hosts or address in hosts]

    try:
        await Announcer(int(exposed[0].rpartition(":")[2]), fingerprint, addresses).run()
    except Exception as error:  # noqa: BLE001 - a library's fault must not end the service, nor pass unseen
        log_incident("announcing on the local network ended", error)


class Announcer:
    """Announces one port. `run` until it is cancelled; then it says good-bye."""

    def __init__(
        self,
        port: int,
        fingerprint: Callable[[], bytes | None],
        addresses: Callable[[], Sequence[str]] = lan_addresses,
        look_seconds: float = _LOOK_SECONDS,
    ) -> None:
        """fingerprint: SHA-256 of the certificate of now. addresses: this machine's own, on networks with others."""
        self._port = port
        self._fingerprint = fingerprint
        self._addresses = addresses
        self._look_seconds = look_seconds

    async def run(self) -> None:
        """Announce, and again whenever addresses or certificate change."""
        announced: tuple[tuple[str, ...], bytes | None] | None = None
        network: AsyncZeroconf | None = None
        try:
            while True:
                current = tuple(self._addresses()), self._fingerprint()
                if current != announced:
                    if network is not None:
                        await network.async_close()
                    network = await self._announce(*current)
                    announced = current
                await asyncio.sleep(self._look_seconds)
        finally:
            if network is not None:
                await network.async_close()

    async def _announce(self, addresses: tuple[str, ...], fingerprint: bytes | None) -> "AsyncZeroconf | None":
        if not addresses:
            _logger.info("not announced: this machine is on no network")
            return None
        # Takes a board a second to import, so not before it is wanted.
        from zeroconf import IPVersion
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

        host = socket.gethostname().partition(".")[0]
        mark = fingerprint.hex() if fingerprint else ""
        info = AsyncServiceInfo(
            SERVICE_TYPE,
            f"{host}.{SERVICE_TYPE}",
            port=self._port,
            addresses=[socket.inet_aton(address) for address in addresses],
            properties={"v": "1", "fp": mark},
            # A name of its own: the host's is another program's to announce.
            server=f"hearth-{mark[:16] or host}.local.",
        )
        try:
            network = AsyncZeroconf(interfaces=list(addresses), ip_version=IPVersion.V4Only)
            # Two boards may have one name: the second becomes NAME-2.
            await network.async_register_service(info, allow_name_change=True)
        except (OSError, RuntimeError) as error:
            _logger.warning("not announced: multicast DNS cannot be used: %s", error)
            return None
        _logger.info("announced on the local network as %s, on %s", info.name, ", ".join(addresses))
        return network
