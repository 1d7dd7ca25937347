"""Keeps strangers from taking all TCP connections: where these run short, it hangs up on who has shown no credential.

gRPC bounds the number of connections for all peers together (`transport`), so that one peer who holds that many shuts
all others out, without a single valid call. From three quarters of the number on, a connection is closed that has not
made a call with a right to it within some seconds, and of one source all but the newest few. Whoever has made such a
call is not hung up on, unless a later one shows that its credential is no longer valid.

It sees what the process sees: behind a proxy (`server.tls_socket`) all callers are one Unix socket, and a flood that is
quicker than a look is for a firewall (docs/systemd.md). `auth` tells of calls, `troubles` asks, `grpc_servers` lets it
watch.
"""

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from typing import Final

from hearthd.listening.own_connections import Connection, find_connections, hang_up
from hearthd.listening.peer_address import End, find_end, find_source

__all__ = ["ConnectionGuard"]

_logger = logging.getLogger(__name__)

_CROWDED_SHARE: Final = 0.75
# For the handshake and the first call; gRPC gives as much to the handshake alone.
_STRANGER_SECONDS: Final = 5.0
# Of one source, of max_connections, where it is crowded: a household behind one address still gets in.
_STRANGERS_SHARE: Final = 1 / 8
_SECONDS_BETWEEN_LOOKS: Final = 1.0
_SECONDS_BETWEEN_LOOKS_IF_CROWDED: Final = 0.25
_SECONDS_BETWEEN_LINES: Final = 60.0
# After the last time that it was crowded: who is hung up on comes again.
_TOLD_SECONDS: Final = 60.0


class ConnectionGuard:
    """One for all TCP addresses. Of the event loop."""

    def __init__(
        self,
        max_connections: int,
        *,
        find: Callable[[Collection[int]], list[Connection]] = find_connections,
        close: Callable[[Connection], bool] = hang_up,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_connections: as gRPC has it. clock: monotonic."""
        self._max_connections = max_connections
        self._find = find
        self._close = close
        self._clock = clock
        self._admitted: set[End] = set()
        self._first_seen: dict[Connection, float] = {}
        self._hung_up: set[Connection] = set()
        self._crowded_at = self._told_at = -math.inf
        self._num_open = self._num_busiest = self._num_closed = 0

    def note_admitted(self, peer: str) -> None:
        """Take note of a call whose caller has the right to it. peer: as gRPC names it."""
        if (end := find_end(peer)) is not None:
            self._admitted.add(end)

    def note_refused(self, peer: str) -> None:
        """Take note of a call without a valid credential: its caller may have lost what it had."""
        if (end := find_end(peer)) is not None:
            self._admitted.discard(end)

    def find_problem(self) -> str | None:
        """Return that connections run short and what helps; None if they do not, for a minute. Names no address."""
        if self._clock() - self._crowded_at >= _TOLD_SECONDS:
            return None
        return (
            f"server.max_connections: {self._num_open} of {self._max_connections} TCP connections were open, "
            f"{self._num_busiest} of them from one address, which the journal names; raise it if they are yours, and "
            "see docs/systemd.md for a firewall's rule if they are not"
        )

    async def watch(self, ports: Collection[int]) -> None:
        """Look now and then, until cancelled."""
        while ports:
            crowded = self.look(ports)
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS_IF_CROWDED if crowded else _SECONDS_BETWEEN_LOOKS)

    def look(self, ports: Collection[int]) -> bool:
        """Look once; hang up on strangers if it is crowded, and return whether it is."""
        try:
            connections = self._find(ports)
        except OSError:
            # No descriptor is left: gRPC takes nobody in either, until there are some again.
            return True
        now = self._clock()
        self._first_seen = {each: self._first_seen.get(each, now) for each in connections}
        self._admitted &= {each.end for each in connections}
        self._hung_up &= self._first_seen.keys()
        if len(connections) < _CROWDED_SHARE * self._max_connections:
            return False
        self._note_crowd(connections, now)
        closed = {each for each in self._unwanted(now) if self._close(each)}
        self._hung_up |= closed
        self._num_closed += len(closed)
        self._tell(connections, now)
        return True

    def _note_crowd(self, connections: Collection[Connection], now: float) -> None:
        if now - self._crowded_at >= _TOLD_SECONDS or len(connections) >= self._num_open:
            self._num_open = len(connections)
            self._num_busiest = Counter(find_source(each.end.ip) for each in connections).most_common(1)[0][1]
        self._crowded_at = now

    def _unwanted(self, now: float) -> list[Connection]:
        strangers: defaultdict[str, list[Connection]] = defaultdict(list)
        for each in sorted(self._first_seen, key=self._first_seen.__getitem__):
            # gRPC has not noticed yet, of some.
            if each.end not in self._admitted and each not in self._hung_up:
                strangers[find_source(each.end.ip)].append(each)
        num_kept = max(round(_STRANGERS_SHARE * self._max_connections), 1)
        return [
            each
            for of_source in strangers.values()
            for place, each in enumerate(of_source)
            # The newest stay: whoever has just come may be about to show a credential.
            if place < len(of_source) - num_kept or now - self._first_seen[each] >= _STRANGER_SECONDS
        ]

    def _tell(self, connections: Collection[Connection], now: float) -> None:
        if now - self._told_at < _SECONDS_BETWEEN_LINES:
            return
        (busiest, num_busiest), *_ = Counter(find_source(each.end.ip) for each in connections).most_common(1)
        _logger.warning(
            "%d of %d TCP connections (server.max_connections) are open, %d of them from %s; %d without a valid "
            "credential were closed since the last such line",
            len(connections), self._max_connections, num_busiest, busiest, self._num_closed,
        )  # fmt: skip
        self._told_at, self._num_closed = now, 0
