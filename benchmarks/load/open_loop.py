"""Sends each request when it is due, whatever became of those before it. Called by the scenarios.

Knows no server: `ask` is a chat over gRPC, or a request to some other one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from load.arrivals import Arrival
from load.outcome import Outcome

Ask = Callable[[Arrival, float], Awaitable[Outcome]]
"""Takes a request and the monotonic time at which it is due; never raises for what a server does."""

# Before the first one: connections are there, tasks are made.
_LEAD_SECONDS = 0.2


async def offer(arrivals: Sequence[Arrival], ask: Ask) -> list[Outcome]:
    """Return what became of each, in their order. All run at once, as far as they have begun."""
    begin = time.monotonic() + _LEAD_SECONDS

    async def one(arrival: Arrival) -> Outcome:
        due = begin + arrival.at
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        return await ask(arrival, due)

    async with asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(one(arrival)) for arrival in arrivals]
    return [task.result() for task in started]
