"""Whether memory leaks: the daemon's resident set over 10,000 short requests."""

from __future__ import annotations

import asyncio
from collections import Counter

from load import prompts
from load.bench import Bench
from load.chat import Caller, request
from load.hearth_server import HearthServer
from load.measures import growth_percent
from load.outcome import End
from load.server_process import ServerError
from load.targets import Result, at_most

_REQUESTS = 10_000
_SAMPLES = 100
_LIMIT_PERCENT = 2.0


async def run(bench: Bench) -> Result:
    """Ask, and look at the resident set a hundred times meanwhile."""
    total = bench.count(_REQUESTS, least=_SAMPLES)
    names = [f"caller-{number}" for number in range(bench.slots)]
    samples: list[int] = []
    ends: Counter[str] = Counter()
    with bench.server("memory", callers=names) as server:
        callers = [server.caller(name) for name in names]
        for number in range(_SAMPLES):
            await _some(server, callers, range(total * number // _SAMPLES, total * (number + 1) // _SAMPLES), ends)
            samples.append(server.resident_bytes)
            if number % 10 == 9:
                bench.say(f"memory: {total * (number + 1) // _SAMPLES:,} requests, {samples[-1] / 1e6:.1f} MB")
        for caller in callers:
            await caller.close()
    if ends.keys() - {End.ANSWERED.value}:
        raise ServerError(f"not all requests were answered: {dict(ends)}")
    growth = growth_percent(samples)
    note = f"{samples[0] / 1e6:.1f} MB at first, {samples[-1] / 1e6:.1f} at last; last tenth over the second"
    name = f"growth of the resident set over {total:,} requests"
    return Result([at_most(name, growth, _LIMIT_PERCENT, "%", note)], {"resident_bytes": samples, "requests": total})


async def _some(server: HearthServer, callers: list[Caller], numbers: range, ends: Counter[str]) -> None:
    """Ask so many requests, each caller one after the other, each of them another text."""

    async def one_by_one(place: int) -> None:
        for number in numbers[place :: len(callers)]:
            asked = request(prompts.words(4 + number % 5, f"memory/{number}"), max_tokens=1 + number % 3)
            outcome = await callers[place].ask(asked)
            ends[outcome.end.value if outcome.end is End.ANSWERED else outcome.reason] += 1

    await asyncio.gather(*(one_by_one(place) for place in range(len(callers))))
    server.check_alive()
