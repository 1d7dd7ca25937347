"""Coroutines beside one another: those that run while others do, and those of which the first one counts.

Knows nothing of what they do. Called by `server` and `grpc_servers`.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from hearthd.logs import log_incident

__all__ = ["beside", "cancel", "first_of"]


@asynccontextmanager
async def beside(*coroutines: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """While the block runs, they do; with it they end. What one raises goes to the journal at once, and ends it alone.

    Also the one that feeds the watchdog: systemd, fed no more, ends the daemon and starts it again.
    """
    tasks = [asyncio.create_task(each) for each in coroutines]
    for task in tasks:
        task.add_done_callback(_tell)
    try:
        yield
    finally:
        await cancel(*tasks)


def _tell(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log_incident(f"{getattr(task.get_coro(), '__qualname__', 'a task')} has ended before its time", error)


async def first_of(*coroutines: Coroutine[Any, Any, object], timeout: float | None = None) -> bool:  # noqa: ASYNC109
    """Wait until one of them has ended, or until the time is over; cancel the others and raise what that one raised.

    Returns whether the first one that was given has ended.
    """
    tasks = [asyncio.create_task(each) for each in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return tasks[0] in done
    finally:
        await cancel(*tasks)


async def cancel(*tasks: "asyncio.Task[Any]") -> None:
    """End tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
