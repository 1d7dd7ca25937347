"""What a system prompt costs that was seen before: cold, from memory, and after the daemon was restarted."""

from __future__ import annotations

import asyncio
import statistics

from load import prompts
from load.bench import Bench
from load.chat import Caller, request
from load.hearth_server import HearthServer
from load.outcome import End, Outcome
from load.server_process import ServerError
from load.targets import Result, Target, at_most, not_available

_SYSTEM_WORDS = 1000
_PROMPTS = 5
# Of a system prompt, from which on it counts as cached: its end and the question after it never are.
_CACHED_SHARE = 0.9


async def run(bench: Bench) -> Result:
    """Ask three questions about each of a few system prompts: the third one after a restart."""
    systems = [prompts.words(_SYSTEM_WORDS, f"system/{number}") for number in range(bench.count(_PROMPTS, least=2))]
    with bench.server("prefix", callers=("caller", "other")) as server:
        cold, cached = [], []
        caller = await _arrive(server)
        for system in systems:
            cold.append(await _ask(server, caller, system, "What is this?"))
            cached.append(await _ask(server, caller, system, "And why is that?"))
        await caller.close()
        # Whatever it still writes to its disk.
        await asyncio.to_thread(server.wait_until_quiet)
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
        caller = await _arrive(server)
        restarted = [await _ask(server, caller, system, "Where may it be?") for system in systems]
        await caller.close()
    return result(cold, cached, restarted)


async def _arrive(server: HearthServer) -> Caller:
    """Return a caller on a connection that is there, to a daemon that has answered somebody else before."""
    other = server.caller("other")
    await other.ask(request("Hello", max_tokens=2))
    await other.close()
    caller = server.caller("caller")
    await caller.channel.channel_ready()
    return caller


async def _ask(server: HearthServer, caller: Caller, system: str, question: str) -> Outcome:
    await asyncio.to_thread(server.wait_until_quiet)
    outcome = await caller.ask(request(question, system=system, max_tokens=2))
    if outcome.end is not End.ANSWERED:
        raise ServerError(f"a question was not answered: {outcome.reason}")
    return outcome


def result(cold: list[Outcome], cached: list[Outcome], restarted: list[Outcome]) -> Result:
    """Compare times to first token: of the same system prompt, then the median."""
    figures = {
        name: {
            "first_token_ms": [1000 * _first(each) for each in outcomes],
            "prompt_tokens": [each.prompt_tokens for each in outcomes],
            "cached_tokens": [each.cached_tokens for each in outcomes],
        }
        for name, outcomes in (("cold", cold), ("cached", cached), ("after_restart", restarted))
    }
    return Result(
        [
            _target("system prompt of 1,000 tokens from memory, first token, of cold", cold, cached, 25),
            _target("the same after a restart of the daemon", cold, restarted, 8),
        ],
        figures,
    )


def _target(name: str, cold: list[Outcome], again: list[Outcome], times: int) -> Target:
    shares = [each.cached_tokens / each.prompt_tokens for each in again]
    if statistics.median(shares) < _CACHED_SHARE:
        why = f"{statistics.median(each.cached_tokens for each in again):.0f} tokens came from a cache"
        return not_available(name, f"<= 1/{times}", why)
    share = statistics.median(_first(after) / _first(before) for before, after in zip(cold, again, strict=True))
    before, after = (1000 * statistics.median(_first(each) for each in side) for side in (cold, again))
    note = f"1/{1 / share:.0f}: {before:,.0f} ms cold, {after:,.0f} ms; 1/{times} is wanted"
    return at_most(name, 100 * share, 100 / times, "%", note)


def _first(outcome: Outcome) -> float:
    """From sending: the generator's own time before that is no server's."""
    assert outcome.first_token is not None, "it was answered"
    return outcome.first_token - outcome.sent
