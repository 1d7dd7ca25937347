"""The channel of a client, and where it leads: for a paired daemon that is looked up first, and again when it is gone.

Says what a failed call means, too, which for a paired daemon is another thing.

Two kinds, kept parallel: for threads and for asyncio. Called by `Client` and `AsyncClient`.
"""

import asyncio
import math
import os
import threading
from dataclasses import replace
from typing import Any

from hearth._address import parse_address
from hearth._channel import open_async_channel, open_channel
from hearth._errors import AuthenticationError, ConnectError, HearthError
from hearth._settings import Settings
from hearth._translate import RpcFailure, translate
from hearth._whereabouts import find_address


class _Whereabouts:
    """The settings with the address of now, and whether that must be asked for before the next call."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.must_look = settings.paired is not None
        self._opened: Any = None

    @property
    def address(self) -> str:
        """Where the daemon is looked for."""
        return self.settings.address.text

    def note(self, failure: HearthError) -> None:
        """Hear of a failed attempt: a paired daemon that cannot be reached may be elsewhere by now."""
        if self.settings.paired is not None and isinstance(failure, ConnectError):
            self.must_look = True

    def explain(self, failure: RpcFailure) -> HearthError:
        """The error of a failed call. What a daemon says of tokens is for programmers; a paired device has a person."""
        error = translate(failure, self.address)
        if self.settings.paired is None or not isinstance(error, AuthenticationError):
            return error
        return AuthenticationError(
            f"{self.settings.paired.name} does not let this device in any more: its token was taken back, or has "
            "expired; to be let in again, on the board: sudo hearthd pair NAME, and here: hearth pair CODE"
        )

    def look(self, seconds: float | None) -> Settings:
        """Ask where the daemon is; blocks."""
        assert self.settings.paired is not None
        found = find_address(self.settings.paired, math.inf if seconds is None else seconds, os.environ)
        return replace(self.settings, address=parse_address(found))

    def move(self, settings: Settings) -> None:
        """Go by what `look` found. Streams that still run keep the channel that they have."""
        if settings.address != self.settings.address:
            self.settings, self._opened = settings, None
        self.must_look = False


class Connection(_Whereabouts):
    """For threads."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._lock = threading.Lock()

    def channel(self, seconds: float | None) -> Any:
        """The channel to call on. `seconds`: how long a paired daemon may be looked for."""
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
