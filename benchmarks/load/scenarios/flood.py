"""Fifty callers at once, where four run and sixteen wait; and one caller who asks for far more than others do."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from load import prompts
from load.bench import Bench
from load.chat import Caller, request
from load.hearth_server import MAX_QUEUED
from load.measures import jain_index, percentile, percentiles
from load.outcome import End, Outcome
from load.targets import Result, Target, Verdict, at_least, at_most

_CALLERS = 50
_ANSWERS_EACH = 3
_ANSWER_TOKENS = 24
_HEALTH_SECONDS = 0.05
# Nobody waits longer for one answer; who does has starved.
_PATIENCE_SECONDS = 120.0
_NEWCOMERS = 5


async def run(bench: Bench) -> Result:
    """Flood the daemon, ask after its health meanwhile, and let a newcomer in while one caller floods it."""
    names = [f"caller-{number}" for number in range(max(2 * bench.slots + MAX_QUEUED, bench.count(_CALLERS)))]
    answers_each = bench.count(_ANSWERS_EACH)
    with bench.server("flood", callers=[*names, "health", "flooder", "newcomer"]) as server:
        callers = [server.caller(name) for name in names]
        await asyncio.gather(*(caller.channel.channel_ready() for caller in callers))
        checks: list[float] = []
        checking = asyncio.create_task(_check_health(server.caller("health"), checks))
        started = time.monotonic()
        try:
            visits = await asyncio.gather(
                *(_patient(caller, answers_each, random.Random(f"{bench.seed}/{caller.name}")) for caller in callers)
            )
        finally:
            checking.cancel()
        seconds = time.monotonic() - started
        await asyncio.gather(*(caller.close() for caller in callers), checking, return_exceptions=True)
        flooder, newcomer = server.caller("flooder"), server.caller("newcomer")
        overtaken = []
        for number in range(bench.count(_NEWCOMERS, least=2)):
            await asyncio.to_thread(server.wait_until_quiet)
            overtaken.append(await _newcomer(flooder, newcomer, bench.slots + MAX_QUEUED - 2, number))
        await flooder.close()
        await newcomer.close()
    return result(dict(zip(names, visits, strict=True)), answers_each, checks, overtaken, seconds)


async def _patient(caller: Caller, wanted: int, chance: random.Random) -> list[Outcome]:
    """Get so many answers, one after the other, and come back when told. Returns every attempt."""
    attempts = []
    for number in range(wanted):
        asked = request(prompts.question(12, f"{caller.name}/{number}"), max_tokens=_ANSWER_TOKENS)
        due = time.monotonic()
        while time.monotonic() - due < _PATIENCE_SECONDS:
            attempt = await caller.ask(asked, seconds=_PATIENCE_SECONDS)
            attempts.append(attempt)
            if attempt.end is not End.REFUSED:
                # Its waiting began with the first attempt.
                attempt.scheduled = due
                break
            # Up to a tenth later than asked, as the client does.
            await asyncio.sleep((attempt.retry_after or 1.0) * (1 + chance.random() / 10))
    return attempts


async def _check_health(caller: Caller, seconds: list[float]) -> None:
    """Ask after the daemon's health, again and again. Appends how long each took; infinity for no or a bad answer."""
    stub = health_pb2_grpc.HealthStub(caller.channel)
    try:
        while True:
            asked = time.monotonic()
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10, metadata=caller.metadata)
                is_well = answer.status == health_pb2.HealthCheckResponse.SERVING
            except grpc.RpcError:
                is_well = False
            seconds.append(time.monotonic() - asked if is_well else float("inf"))
            await asyncio.sleep(_HEALTH_SECONDS)
    finally:
        await caller.close()


async def _newcomer(flooder: Caller, newcomer: Caller, num_jobs: int, number: int) -> int:
    """Return how many jobs of a caller who floods got a slot after a newcomer had come, and before the newcomer."""
    jobs = [
        asyncio.create_task(
            flooder.ask(request(prompts.question(20, f"flood/{number}/{job}"), max_tokens=2 * _ANSWER_TOKENS))
        )
        for job in range(num_jobs)
    ]
    await asyncio.sleep(0.3)
    came = await newcomer.ask(request(prompts.question(12, f"newcomer/{number}"), max_tokens=4))
    done = await asyncio.gather(*jobs)
    if came.end is not End.ANSWERED:
        return num_jobs
    slot = came.sent + came.queue_seconds
    return sum(came.sent < job.sent + job.queue_seconds < slot for job in done if job.end is End.ANSWERED)


def result(
    visits: dict[str, list[Outcome]], answers_each: int, checks: list[float], overtaken: list[int], seconds: float
) -> Result:
    """Sum up. visits: every attempt of each caller."""
    attempts = [attempt for each in visits.values() for attempt in each]
    refused = [attempt for attempt in attempts if attempt.end is End.REFUSED]
    answered = {name: sum(each.end is End.ANSWERED for each in found) for name, found in visits.items()}
    served = sum(number == answers_each for number in answered.values())
    waits = [
        each.first_token_seconds
        for each in attempts
        if each.end is End.ANSWERED and each.first_token_seconds is not None
    ]
    refusal_ms = [1000 * (each.ended - each.sent) for each in refused]
    with_delay = sum(each.retry_after is not None for each in refused)
    health_ms = [1000 * each for each in checks]
    targets = [
        _of_refusals(refusal_ms),
        at_least("refusals that say when to come again", 100 * with_delay / max(len(refused), 1), 100, "%"),
        at_most(
            f"health during the flood, p99 of {len(checks)}",
            percentile(health_ms, 99) if health_ms else float("inf"),
            100,
            "ms",
        ),
        at_least(
            f"patient callers who got all answers, of {len(visits)}",
            served,
            len(visits),
            "",
            f"longest wait {max(waits, default=0):.1f} s, mean {sum(waits) / max(len(waits), 1):.1f} s",
        ),
        at_most(
            "jobs of a flooding caller that got a slot before a newcomer, worst",
            max(overtaken),
            1,
            "",
            f"in {len(overtaken)} tries: {', '.join(map(str, overtaken))}",
        ),
    ]
    figures: dict[str, Any] = {
        "attempts": len(attempts),
        "refused": len(refused),
        "failed": [each.reason for each in attempts if each.end is End.FAILED],
        "refusal_ms": percentiles(refusal_ms),
        "retry_after_seconds": percentiles([each.retry_after for each in refused if each.retry_after is not None]),
        "health_ms": percentiles(health_ms),
        "wait_seconds": percentiles(waits),
        "jain_index_of_answers": jain_index(list(answered.values())),
        "jain_index_of_waits": jain_index(waits) if waits else None,
        "overtaken": overtaken,
        "seconds": seconds,
    }
    return Result(targets, figures)


def _of_refusals(refusal_ms: list[float]) -> Target:
    name, limit = f"refusal, p99 of {len(refusal_ms)}", 50.0
    if not refusal_ms:
        return Target(name, f"<= {limit:g} ms", None, "ms", Verdict.NOT_MET, "a full queue refused nobody")
    return at_most(name, percentile(refusal_ms, 99), limit, "ms", f"longest {max(refusal_ms):.0f} ms")
