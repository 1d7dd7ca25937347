"""Open-loop arrivals as in a house: many callers, short and urgent, long and in no hurry, at two rates.

The peer's scenario, `peer`, is offered the same.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

from load import prompts
from load.arrivals import HOUSE, Arrival, open_loop
from load.bench import Bench
from load.chat import request
from load.measures import percentile
from load.open_loop import offer
from load.outcome import End, Outcome
from load.summary import summarise
from load.targets import Result

CALLERS = tuple(f"caller-{number}" for number in range(6))
SECONDS = 45.0
PATIENCE_SECONDS = 120.0
_SYSTEM_WORDS = 60


def arrivals(bench: Bench, rate: float) -> list[Arrival]:
    """Return who asks for what, and when: the same for every server."""
    return open_loop(CALLERS, HOUSE, rate=rate, seconds=SECONDS * bench.scale, seed=bench.seed)


def texts(arrival: Arrival) -> tuple[str, str]:
    """Return an arrival's system prompt, which its caller always has, and its question."""
    return (
        prompts.words(_SYSTEM_WORDS, f"house/{arrival.caller}"),
        prompts.question(arrival.kind.prompt_words, f"house/{arrival.number}"),
    )


def name_of(rate: float) -> str:
    """Name a rate, in figures."""
    return f"{rate:g}/s"


def curves(outcomes: list[Outcome]) -> dict[str, list[float]]:
    """Return what to draw: percentiles from the first one on, in milliseconds.

    Of all requests: where some got no whole answer the first curve ends before its hundredth point.
    """
    answered = [each for each in outcomes if each.end is End.ANSWERED]
    firsts = [each.first_token_seconds or 0.0 if each.end is End.ANSWERED else math.inf for each in outcomes]
    gaps = [gap for each in answered for gap in each.gaps]
    drawn = {}
    for name, values in (("first_token_ms", firsts), ("inter_token_ms", gaps)):
        if values:
            each_percent = (1000 * percentile(values, percent) for percent in range(1, 101))
            drawn[name] = [value for value in each_percent if value < math.inf]
    return drawn


async def run(bench: Bench) -> Result:
    """Offer both rates to the daemon."""
    figures: dict[str, Any] = {}
    for rate in bench.rates:
        with bench.server("house", callers=CALLERS) as server:
            callers = {name: server.caller(name) for name in CALLERS}
            await asyncio.gather(*(caller.channel.channel_ready() for caller in callers.values()))

            async def ask(arrival: Arrival, due: float, callers: Any = callers) -> Outcome:
                system, question = texts(arrival)
                asked = request(
                    question, system=system, priority=arrival.kind.priority, max_tokens=arrival.kind.answer_tokens
                )
                outcome: Outcome = await callers[arrival.caller].ask(asked, scheduled=due, seconds=PATIENCE_SECONDS)
                outcome.priority = arrival.kind.priority
                return outcome

            offered = arrivals(bench, rate)
            bench.say(f"house: {len(offered)} requests at {name_of(rate)}")
            outcomes = await offer(offered, ask)
            server.check_alive()
            figures[name_of(rate)] = summarise(outcomes) | {
                "resident_mb": server.resident_bytes / 1e6,
                "curves": curves(outcomes),
            }
            for caller in callers.values():
                await caller.close()
    return Result([], figures)
