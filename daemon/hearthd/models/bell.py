"""Tells everybody who waits that something has changed. Used by `pool` and `health`."""

import asyncio

__all__ = ["Bell"]


class Bell:
    """Wakes all who wait, each time that it rings; they look again for themselves. Of one event loop."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        """Wake all who wait now."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    async def wait(self) -> None:
        """Return at the next ring."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)
