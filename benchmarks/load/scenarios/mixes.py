"""Whether company changes an answer: random mixes of arrivals, cancels, shared beginnings and priorities.

Every conversation is answered alone first, by a daemon with one slot and to a caller who asks nothing else, so that no
cache helps. Then callers share a daemon: each greedy answer must have the same tokens, each one that was cancelled the
first of them.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from hearth.v1 import chat_pb2
from load import prompts
from load.arrivals import BACKGROUND, INTERACTIVE, NORMAL
from load.bench import Bench
from load.chat import PRIORITIES, Caller, request
from load.outcome import End, Outcome
from load.server_process import ServerError
from load.targets import Result, at_most

_MIXES = 500
_CALLERS = 3
_SYSTEMS = 3
_QUESTIONS = 12
_TOKENS = (6, 10, 14)
_SPREAD_SECONDS = 0.2
_CANCELLED_SHARE = 0.25


@dataclass(slots=True)
class Tally:
    """How the answers compare."""

    whole: int = 0
    cancelled: int = 0
    from_cache: int = 0
    different: list[str] = field(default_factory=list)
    """Conversation and place of the first token that is another one."""
    other_bits: int = 0
    """Answers of the same tokens, whose log probabilities are not the same to the last bit."""
    lost: list[str] = field(default_factory=list)

    def compare(self, name: str, alone: Outcome, beside: Outcome) -> None:
        """Compare an answer with the same one alone."""
        if beside.end not in (End.ANSWERED, End.CANCELLED):
            self.lost.append(beside.reason)
            return
        is_whole = beside.end is End.ANSWERED
        wanted = alone.tokens if is_whole else alone.tokens[: len(beside.tokens)]
        is_same_text = alone.text == beside.text if is_whole else alone.text.startswith(beside.text)
        self.whole += is_whole
        self.cancelled += not is_whole
        self.from_cache += beside.cached_tokens > 0
        ids, wanted_ids = [token for token, _ in beside.tokens], [token for token, _ in wanted]
        if ids != wanted_ids or not is_same_text:
            pairs = enumerate(zip(ids, wanted_ids, strict=False))
            shorter = min(len(ids), len(wanted_ids))
            place = next((place for place, (one, other) in pairs if one != other), shorter)
            self.different.append(f"{name} at token {place}")
        elif beside.tokens != wanted:
            self.other_bits += 1


def conversations(seed: int) -> dict[str, chat_pb2.ChatRequest]:
    """Return requests that share beginnings: few system prompts, and earlier turns that others have asked as well."""
    made = {}
    for number in range(_QUESTIONS):
        for place in range(_SYSTEMS):
            system = prompts.words((0, 40, 150)[place % 3], f"{seed}/system/{place}")
            first = prompts.question(8 + 5 * (number % 4), f"{seed}/{number}")
            tokens = _TOKENS[number % len(_TOKENS)]
            turns = [(first, prompts.words(20, f"{seed}/answer/{number}"))] if number % 2 else []
            asked = prompts.subject(number) if turns else first
            made[f"{number}/{place}"] = request(asked, system=system, turns=turns, max_tokens=tokens, with_tokens=True)
    return made


async def run(bench: Bench) -> Result:
    """Answer all alone, then in company, and compare."""
    asked = conversations(bench.seed)
    alone = await _alone(bench, asked)
    names = [f"caller-{number}" for number in range(_CALLERS)]
    tally = Tally()
    total = bench.count(_MIXES)
    with bench.server("mixes", callers=names) as server:
        callers = [server.caller(name) for name in names]
        for number in range(total):
            chance = random.Random(f"{bench.seed}/mix/{number}")
            for name, outcome in await _mix(callers, asked, chance):
                tally.compare(name, alone[name], outcome)
            if number % 100 == 99:
                bench.say(f"mixes: {number + 1} of {total}, {len(tally.different)} differences")
        server.check_alive()
        for caller in callers:
            await caller.close()
    note = (
        f"{tally.whole:,} whole and {tally.cancelled:,} cancelled answers, {tally.from_cache:,} of them after a cached "
    )
    note += f"beginning; log probabilities differ in {tally.other_bits}"
    if tally.different:
        note += f"; {'; '.join(tally.different[:5])}"
    figures = {
        "mixes": total,
        "conversations": len(asked),
        "whole": tally.whole,
        "cancelled": tally.cancelled,
        "after_a_cached_beginning": tally.from_cache,
        "different": tally.different,
        "different_log_probabilities": tally.other_bits,
        "lost": tally.lost,
    }
    return Result(
        [
            at_most(
                f"answers that differ from the same ones alone, in {total} mixes", len(tally.different), 0, "", note
            ),
            at_most("answers that were lost meanwhile", len(tally.lost), 0, "", ", ".join(sorted(set(tally.lost)))),
        ],
        figures,
    )


async def _alone(bench: Bench, asked: dict[str, chat_pb2.ChatRequest]) -> dict[str, Outcome]:
    names = {name: f"alone-{number}" for number, name in enumerate(asked)}
    found = {}
    with bench.server("mixes-alone", slots=1, callers=list(names.values())) as server:
        for name, what in asked.items():
            caller = server.caller(names[name])
            found[name] = await caller.ask(what)
            await caller.close()
            if found[name].end is not End.ANSWERED:
                raise ServerError(f"alone, {name} was not answered: {found[name].reason}")
            if found[name].cached_tokens:
                raise ServerError(f"alone, {name} was not read whole: {found[name].cached_tokens} tokens were cached")
    return found


async def _mix(
    callers: list[Caller], asked: dict[str, chat_pb2.ChatRequest], chance: random.Random
) -> list[tuple[str, Outcome]]:
    async def one(caller: Caller, what: chat_pb2.ChatRequest, delay: float, patience: float) -> Outcome:
        await asyncio.sleep(delay)
        chat = caller.start(what)
        reading = asyncio.create_task(chat.finish())
        await asyncio.wait((reading,), timeout=patience)
        if not reading.done():
            chat.cancel()
        return await reading

    started = []
    async with asyncio.TaskGroup() as tasks:
        for _ in range(chance.randint(2, 6)):
            name = chance.choice(list(asked))
            what = chat_pb2.ChatRequest()
            what.CopyFrom(asked[name])
            what.priority = PRIORITIES[chance.choice((INTERACTIVE, NORMAL, BACKGROUND))]
            is_cancelled = chance.random() < _CANCELLED_SHARE
            patience = chance.uniform(0, 2 * _SPREAD_SECONDS) if is_cancelled else 120.0
            delay = chance.uniform(0, _SPREAD_SECONDS)
            task = tasks.create_task(one(chance.choice(callers), what, delay, patience))
            started.append((name, task))
    return [(name, task.result()) for name, task in started]
