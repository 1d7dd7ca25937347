"""The channel of a client, and where it leads: unless an address was named, that is looked up first, and again whenever
the daemon is not there.

A client for which nobody named an address, and that has once gone to a Unix socket, keeps to sockets: what it says, and
its token, never go to the loopback address when the socket is gone, since in those seconds any user of the machine may
listen there. One that found no socket when it began goes to loopback, until there is a socket.

Says what a failed call means, too, which for a paired daemon is another thing.

Two kinds, kept parallel: for threads and for asyncio. Called by `Client` and `AsyncClient`.
"""

import asyncio
import math
import os
import threading
from dataclasses import replace
from typing import Any, NamedTuple

from hearth._address import local_addresses, parse_address
from hearth._channel import open_async_channel, open_channel
from hearth._errors import AuthenticationError, ConnectError, HearthError
from hearth._settings import Settings
from hearth._translate import RpcFailure, translate
from hearth._whereabouts import advise, find_address, find_local


class _Found(NamedTuple):
    """What came of a look."""

    address: str
    advice: str
    """What may help if the daemon is not there; empty if somebody answers there."""


class _Whereabouts:
    """The settings with the address of now, and whether that must be asked for before the next call."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._can_move = settings.paired is not None or settings.is_default
        self.must_look = self._can_move
        self._advice = ""
        self._opened: Any = None

    @property
    def address(self) -> str:
        """Where the daemon is looked for."""
        return self.settings.address.text

    def note(self, failure: HearthError) -> None:
        """Hear of a failed attempt: a daemon that cannot be reached may be elsewhere by now."""
        if self._can_move and isinstance(failure, ConnectError):
            self.must_look = True

    def explain(self, failure: RpcFailure) -> HearthError:
        """The error of a failed call. What a daemon says of tokens is for programmers; a paired device has a person."""
        error = translate(failure, self.address)
        if isinstance(error, ConnectError) and self._advice:
            said, advice = str(error), self._advice
            joined = f"{said} {advice[0].upper()}{advice[1:]}" if said.endswith("?") else f"{said}; {advice}"
            return ConnectError(joined, is_transient=error.is_transient)
        if self.settings.paired is None or not isinstance(error, AuthenticationError):
            return error
        return AuthenticationError(
            f"{self.settings.paired.name} does not let this device in any more: its token was taken back, or has "
            "expired; to be let in again, on the board: sudo hearthd pair NAME, and here: hearth pair CODE"
        )

    def look(self, seconds: float | None) -> _Found:
        """Ask where the daemon is; blocks. If it is nowhere: the likeliest place, so that a call says what is wrong."""
        paired, known = self.settings.paired, self.settings.address
        if paired is not None:
            found = find_address(paired, math.inf if seconds is None else seconds, os.environ)
            likeliest = paired.addresses[0]
        else:
            found = find_local(os.environ, only_sockets=known.is_unix)
            likeliest = known.text if known.is_unix else local_addresses(os.environ)[0]
        return _Found(found or likeliest, "" if found else advise(paired, parse_address(likeliest), os.environ))

    def move(self, found: _Found) -> None:
        """Go by what `look` found. Streams that still run keep the channel that they have."""
        if found.address != self.address:
            self.settings = replace(self.settings, address=parse_address(found.address))
            self._opened = None
        self._advice = found.advice
        self.must_look = False


class Connection(_Whereabouts):
    """For threads."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._lock = threading.Lock()

    def channel(self, seconds: float | None) -> Any:
        """The channel to call on. `seconds`: how long the daemon may be looked for."""
        with self._lock:
            if self.must_look:
                self.move(self.look(seconds))
            if self._opened is None:
                self._opened = open_channel(self.settings)
            return self._opened

    def close(self) -> None:
        """Close the channel. Calls that run on it end."""
        if self._opened is not None:
            self._opened.close()


class AsyncConnection(_Whereabouts):
    """For one event loop."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._lock = asyncio.Lock()

    async def channel(self, seconds: float | None) -> Any:
        """As `Connection.channel`."""
        if self.must_look:
            async with self._lock:
                if self.must_look:
                    self.move(await asyncio.to_thread(self.look, seconds))
        if self._opened is None:
            self._opened = open_async_channel(self.settings)
        return self._opened

    async def close(self) -> None:
        """As `Connection.close`."""
        # A closed channel of grpc.aio goes on connecting for as long as anything holds it.
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.close()
