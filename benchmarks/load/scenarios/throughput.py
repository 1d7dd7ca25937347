"""What gRPC and Python cost: the same requests to the daemon and to its engine alone, by turns, in one run."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from engine_process import EngineProcess

from load import prompts
from load.bench import Bench
from load.chat import Caller, request
from load.outcome import End
from load.server_process import ServerError
from load.targets import Result, at_least, at_most

STREAMS = 8
_ANSWER_TOKENS = 96
_PAIRS = 4
_ROUNDS = 5
_WORKER = Path(__file__).resolve().parent.parent / "engine_worker.py"
_SECONDS = 180.0


async def run(bench: Bench) -> Result:
    """Measure both with one stream and with eight."""
    # Those over gRPC and those of the engine alone, of each round but the first of each pair, which warms up.
    rates: dict[int, list[tuple[float, float]]] = {1: [], STREAMS: []}
    shares: list[float] = []
    # One process is a few percent faster than another of the same program, by where its memory happens to lie.
    for pair in range(bench.count(_PAIRS)):
        await _compare(bench, pair, rates, shares)
    return _result(rates, statistics.median(shares))


async def _compare(bench: Bench, pair: int, rates: dict[int, list[tuple[float, float]]], shares: list[float]) -> None:
    """Add what a daemon and an engine in a process of its own do by turns. shares: of a processor, the generator's."""
    names = [f"caller-{number}" for number in range(STREAMS)]
    server = bench.server("throughput", slots=STREAMS, callers=names)
    with server, EngineProcess((sys.executable, _WORKER), bench.output / "engine.log") as engine:
        engine.ask(_SECONDS, call="load", model=str(bench.model.resolve()), config=str(server.config))
        callers = [server.caller(name) for name in names]
        max_tokens = bench.count(_ANSWER_TOKENS, least=8)
        for number in range(bench.count(_ROUNDS) + 1):
            for streams, each in rates.items():
                sides = []
                # Each round the other one first.
                for over_grpc in (True, False) if (pair + number) % 2 else (False, True):
                    server.wait_until_quiet()
                    if over_grpc:
                        used = time.process_time()
                        rate, seconds = await _over_grpc(callers[:streams], max_tokens)
                        shares.append((time.process_time() - used) / seconds)
                    else:
                        rate = _alone(engine, streams, max_tokens)
                    sides.append((over_grpc, rate))
                if number:
                    both = dict(sides)
                    each.append((both[True], both[False]))
        for caller in callers:
            await caller.close()
        server.check_alive()


async def _over_grpc(callers: Sequence[Caller], max_tokens: int) -> tuple[float, float]:
    """Return tokens/s of all streams together, and the seconds that it took."""
    started = time.monotonic()
    outcomes = await asyncio.gather(
        *(caller.ask(request(prompts.subject(number), max_tokens=max_tokens)) for number, caller in enumerate(callers))
    )
    seconds = time.monotonic() - started
    if lost := [each.reason for each in outcomes if each.end is not End.ANSWERED]:
        raise ServerError(f"{len(lost)} of {len(callers)} streams were not answered: {lost[0]}")
    return sum(each.completion_tokens for each in outcomes) / seconds, seconds


def _alone(engine: EngineProcess, streams: int, max_tokens: int) -> float:
    requests = [{"content": prompts.subject(number), "max_tokens": max_tokens} for number in range(streams)]
    answer = engine.ask(_SECONDS, call="run", requests=requests)
    return float(answer["tokens"] / answer["seconds"])


def _result(rates: dict[int, list[tuple[float, float]]], generator_share: float) -> Result:
    ratios = {streams: [over / alone for over, alone in each] for streams, each in rates.items()}
    medians = {
        streams: [statistics.median(side) for side in zip(*each, strict=True)] for streams, each in rates.items()
    }
    figures = {
        "rounds": len(ratios[1]),
        "tokens_per_second": {
            str(streams): {"over_grpc": over, "engine_alone": alone} for streams, (over, alone) in medians.items()
        },
        "ratios": {str(streams): each for streams, each in ratios.items()},
        # The generator has the same processors as the daemon: callers elsewhere would not take this share away.
        "generator_share_of_a_processor": generator_share,
    }
    eight, one = medians[STREAMS], medians[1]
    generator = f"the generator took {100 * generator_share:.0f} % of a processor"
    return Result(
        [
            at_least(
                f"{STREAMS} streams over gRPC, of the engine's own rate",
                100 * statistics.median(ratios[STREAMS]),
                95,
                "%",
                f"{eight[0]:,.0f} and {eight[1]:,.0f} tokens/s; {generator}",
            ),
            at_most(
                "one stream: time that gRPC and Python add",
                100 * statistics.median(1 / ratio - 1 for ratio in ratios[1]),
                3,
                "%",
                f"{one[0]:.1f} and {one[1]:.1f} tokens/s",
            ),
        ],
        figures,
    )
