"""What a running answer feels of a long prompt that is read beside it."""

from __future__ import annotations

import asyncio
import statistics

from hearth.v1 import chat_pb2
from load import prompts
from load.arrivals import BACKGROUND, INTERACTIVE
from load.bench import Bench
from load.chat import Caller, request
from load.measures import percentile
from load.outcome import End, Outcome
from load.server_process import ServerError
from load.targets import Result, at_most

# With what the template and the request around them have, 2,000 tokens.
_LONG_WORDS = 1925
_ANSWER_TOKENS = 400
# The first tokens are not compared: the prompt's end, and buffers that are touched for the first time.
_SKIPPED = 20
_ROUNDS = 5


async def run(bench: Bench) -> Result:
    """Let the same answer run alone, and again with a prompt of 2,000 tokens beside it."""
    ratios, figures = [], []
    with bench.server("stall", callers=("talks", "reads"), each_token=True) as server:
        talks, reads = server.caller("talks"), server.caller("reads")
        for number in range(bench.count(_ROUNDS) + 1):
            await asyncio.to_thread(server.wait_until_quiet)
            alone = await talks.ask(_talk(number))
            await asyncio.to_thread(server.wait_until_quiet)
            beside, long = await _beside(talks, reads, number)
            for each in (alone, beside, long):
                if each.end is not End.ANSWERED:
                    raise ServerError(f"{each.caller} was not answered: {each.reason}")
            assert long.first_token is not None, "it was answered"
            before, during = alone.gaps[_SKIPPED:], gaps_during(beside, long.sent, long.first_token)
            if not before or not during:
                raise ServerError(f"the answer of {len(beside.deltas)} pieces ended before the long prompt was read")
            # The first round warms up.
            if number:
                ratios.append(percentile(during, 95) / percentile(before, 95))
                figures.append(
                    {
                        "alone_p95_ms": 1000 * percentile(before, 95),
                        "beside_p95_ms": 1000 * percentile(during, 95),
                        "beside_max_ms": 1000 * max(during),
                        "gaps": len(during),
                        "long_first_token_ms": 1000 * (long.first_token - long.sent),
                        "long_prompt_tokens": long.prompt_tokens,
                    }
                )
        await talks.close()
        await reads.close()
    alone_ms, beside_ms, longest = (
        statistics.median(each[name] for each in figures) for name in ("alone_p95_ms", "beside_p95_ms", "beside_max_ms")
    )
    note = f"{alone_ms:.1f} and {beside_ms:.1f} ms; longest {longest:.0f} ms; the long prompt's first token after "
    note += f"{statistics.median(each['long_first_token_ms'] for each in figures) / 1000:.1f} s"
    name = f"inter-token time (p95) while {figures[0]['long_prompt_tokens']:,} tokens are read beside, of undisturbed"
    return Result([at_most(name, statistics.median(ratios), 2.5, "times", note)], {"rounds": figures})


async def _beside(talks: Caller, reads: Caller, number: int) -> tuple[Outcome, Outcome]:
    chat = talks.start(_talk(number))
    finishing = asyncio.create_task(chat.finish())
    # Some of the answer first, so that it decodes when the long prompt comes.
    await chat.has_answered.wait()
    await asyncio.sleep(0.1)
    long = await reads.ask(
        request(f"{prompts.words(_LONG_WORDS, f'stall/{number}')}\nWhat is this?", priority=BACKGROUND, max_tokens=2)
    )
    return await finishing, long


def _talk(number: int) -> chat_pb2.ChatRequest:
    return request(prompts.subject(number), priority=INTERACTIVE, max_tokens=_ANSWER_TOKENS)


def gaps_during(outcome: Outcome, begin: float, end: float) -> list[float]:
    """Return the gaps between pieces of an answer of which the second came between two moments."""
    pairs = zip(outcome.deltas, outcome.deltas[1:], strict=False)
    return [after - before for before, after in pairs if begin < after <= end]
