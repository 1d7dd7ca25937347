"""How soon the place of a caller who hangs up is free: 1,000 times, at random moments, while prompts are read too.

Each lane has one place of the daemon: it starts a chat, cancels it at a random moment, and at once asks for one token.
There are as many lanes as the daemon has slots, so this probe can begin only where the cancelled chat was: the time
from the cancel to the probe's slot, which its final message tells, is the time that the place took to become free.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from hearth.v1 import status_pb2, status_pb2_grpc
from load import prompts
from load.bench import Bench
from load.chat import Caller, request
from load.measures import percentiles
from load.outcome import End, Outcome
from load.targets import Result, at_most

_CANCELS = 1000
_LIMIT_MS = 200.0
# Words of the prompts that are cancelled: from those that are read in a moment to those that take a second.
_PROMPT_WORDS = (10, 100, 400, 900)
_ANSWER_TOKENS = 300
_LONGEST_WAIT_SECONDS = 0.5
_REST_SECONDS = 10.0


@dataclass(slots=True)
class Tally:
    """What the lanes have seen."""

    free_ms: list[float] = field(default_factory=list)
    moments: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)


async def run(bench: Bench) -> Result:
    """Cancel, and watch the places become free."""
    wanted = bench.count(_CANCELS, least=bench.slots)
    names = [f"lane-{number}" for number in range(bench.slots)]
    tally = Tally()
    with bench.server("cancels", callers=[*names, "watch"]) as server:
        callers = [server.caller(name) for name in names]
        async with asyncio.TaskGroup() as tasks:
            for number, caller in enumerate(callers):
                chance = random.Random(f"{bench.seed}/cancels/{number}")
                share = wanted // len(callers) + (number < wanted % len(callers))
                tasks.create_task(_lane(caller, chance, share, tally))
        rest_ms = await _come_to_rest(server.caller("watch"))
        for caller in callers:
            await caller.close()
    times = percentiles(tally.free_ms)
    figures = {
        "cancels": len(tally.free_ms),
        "free_ms": times,
        "moments": dict(tally.moments),
        "problems": dict(tally.problems),
        "at_rest_ms": rest_ms,
    }
    num_lost = tally.problems.total()
    # A probe that was not answered has no time; its place counts as never free.
    worst = float("inf") if num_lost or times is None else times["max"]
    note = ", ".join(f"{count} {moment}" for moment, count in tally.moments.most_common())
    if times is not None:
        note += f"; p50 {times['p50']:.0f}, p99 {times['p99']:.0f} ms"
    if num_lost:
        note += f"; lost: {dict(tally.problems)}"
    return Result(
        [
            at_most(f"slot free after a cancel, worst of {len(tally.free_ms):,}", worst, _LIMIT_MS, "ms", note),
            at_most("chats left in the status after the last cancel, gone within", rest_ms, _LIMIT_MS, "ms"),
        ],
        figures,
    )


async def _lane(caller: Caller, chance: random.Random, wanted: int, tally: Tally) -> None:
    number = 0
    while wanted:
        number += 1
        words = chance.choice(_PROMPT_WORDS)
        chat = caller.start(
            request(prompts.question(words, f"{caller.name}/{number}"), max_tokens=_ANSWER_TOKENS), seconds=60
        )
        reading = asyncio.create_task(chat.finish())
        await asyncio.wait((reading,), timeout=chance.uniform(0, _LONGEST_WAIT_SECONDS))
        moment = _moment(chat.outcome)
        cancelled = time.monotonic()
        chat.cancel()
        outcome = await reading
        if outcome.end is End.ANSWERED:
            continue  # it had ended by itself
        wanted -= 1
        if outcome.end is not End.CANCELLED:
            tally.problems[f"the chat: {outcome.reason}"] += 1
            continue
        tally.moments[moment] += 1
        probe = await caller.ask(request("Hello", max_tokens=1), seconds=60)
        if probe.end is End.ANSWERED:
            tally.free_ms.append(1000 * (probe.sent - cancelled + probe.queue_seconds))
        else:
            tally.problems[f"the probe: {probe.reason}"] += 1


def _moment(outcome: Outcome) -> str:
    if outcome.deltas:
        return "while writing"
    return "while waiting or reading" if outcome.positions else "while reading"


async def _come_to_rest(caller: Caller) -> float:
    """Return the milliseconds until the daemon has no chat left, by its own status; infinity if it keeps some."""
    stub = status_pb2_grpc.StatusServiceStub(caller.channel)  # type: ignore[no-untyped-call]
    started = time.monotonic()
    try:
        while (waited := time.monotonic() - started) < _REST_SECONDS:
            status = await stub.GetStatus(status_pb2.GetStatusRequest(), timeout=10, metadata=caller.metadata)
            if not status.running_count + status.queued_count:
                return 1000 * waited
            await asyncio.sleep(0.01)
        return float("inf")
    finally:
        await caller.close()
