"""Engines take turns, measurement by measurement, round by round; only one computes at a time.

Knows the protocol's requests and what to do when an engine fails; no particular engine, no output. Called by
`../compare.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_process import EngineError, EngineProcess
from figures import Figure, Samples

# Seconds more than a measurement that loading may take: it is done a few times only, and an emulated board is slow.
_LOAD_PATIENCE = 60.0
_MEMORY_FIGURES = ("resident", "own", "file")


@dataclass(frozen=True, slots=True)
class Contestant:
    """One engine in one setting.

    peer: whose settings are compared with each other, so that each figure is compared with the best of them.
    refused: why it cannot take part, "" if it can.
    """

    name: str
    title: str
    peer: str
    command: tuple[str | Path, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and how.

    contexts: of one stream. streams: decoded at once, each with short_context tokens. steps: tokens decoded by each
    stream. budget: seconds that one measurement may take.
    """

    prompts: tuple[int, ...] = (32, 128, 512, 1024, 2048)
    contexts: tuple[int, ...] = (64, 512, 1024, 2000)
    streams: tuple[int, ...] = (2, 4, 8)
    short_context: int = 64
    steps: int = 32
    threads: int = 2
    rounds: int = 5
    budget: float = 60.0
    slot: int = 2048

    @property
    def figures(self) -> list[Figure]:
        """All lines of the table, in its order."""
        return [
            *(Figure("prefill", 1, tokens) for tokens in self.prompts),
            *(Figure("decode", 1, tokens) for tokens in sorted(self.contexts)),
            *(Figure("decode", streams, self.short_context) for streams in self.streams),
            *self.start_figures,
        ]

    @property
    def turns(self) -> list[Figure]:
        """What is asked of a loaded engine, in the order of asking."""
        rates = [figure for figure in self.figures if figure.unit == "tokens/s"]
        # The longest context first: its KV serves the shorter ones too, and need not be computed again.
        return sorted(rates, key=lambda figure: (figure.what != "prefill", figure.streams, -figure.tokens))

    @property
    def start_figures(self) -> list[Figure]:
        """What a fresh process of each round gives."""
        memory = [Figure(what, 1, tokens) for tokens in (0, self.slot) for what in _MEMORY_FIGURES]
        return [Figure("load"), Figure("start"), *memory]

    @property
    def context(self) -> int:
        """The longest sequence that is reached: a context and the tokens decoded after it."""
        longest = max(self.slot, *self.prompts, *self.contexts, self.short_context)
        return longest + self.steps + 32


def token_ids(number: int, vocab_size: int) -> list[int]:
    """Return the same random tokens for everyone; the first hundred ids may be control tokens."""
    generator = random.Random(0)
    return [generator.randrange(100, vocab_size) for _ in range(number)]


class Contest:
    """One run: all contestants, all rounds."""

    def __init__(
        self,
        contestants: Sequence[Contestant],
        plan: Plan,
        *,
        vocab_size: int,
        logs: Path,
        report: Callable[[str], None],
    ) -> None:
        """logs: a directory for what the engines' libraries say. report: is told of each round."""
        self.plan = plan
        self.samples = Samples()
        self.about: dict[str, Any] = {}
        self._contestants = contestants
        self._logs = logs
        self._report = report
        self._token_ids = token_ids(plan.context, vocab_size)
        self._engines: dict[str, EngineProcess] = {}
        for contestant in contestants:
            if contestant.refused:
                self._give_up(contestant, contestant.refused)

    def run(self) -> None:
        """Measure. What fails is in `samples.missing`, with the reason; nothing is raised for it."""
        try:
            for number in range(self.plan.rounds + 1):
                self._report(f"round {number} of {self.plan.rounds}" + (", to warm up" if not number else ""))
                for figure in self.plan.turns:
                    for contestant in self._in_turn(number):
                        self._measure(contestant, figure)
                for contestant in self._in_turn(number):
                    self._start_anew(contestant)
        finally:
            for engine in self._engines.values():
                engine.quit()

    def _in_turn(self, number: int) -> list[Contestant]:
        """All, each round from another one on, so that nobody always comes after the same neighbour."""
        first = number % len(self._contestants)
        return [*self._contestants[first:], *self._contestants[:first]]

    def _measure(self, contestant: Contestant, figure: Figure) -> None:
        name = contestant.name
        if (name, figure) in self.samples.missing:
            return
        budget = self.plan.budget
        try:
            engine = self._engine(contestant)
            token_ids = self._token_ids[: figure.tokens]
            if figure.what == "prefill":
                answer = engine.ask(budget, call="prefill", token_ids=token_ids)
            else:
                # Before it decodes it may have to read what it decodes after, which is not timed.
                answer = engine.ask(
                    2 * budget,
                    call="decode",
                    streams=figure.streams,
                    token_ids=token_ids,
                    steps=self.plan.steps,
                    budget=budget / 2,
                )
        except EngineError as error:
            self.samples.fail(name, figure, str(error))
            if not error.alive:
                self._engines.pop(name, None)
        else:
            self.samples.add(name, figure, answer["tokens"] / answer["seconds"])

    def _engine(self, contestant: Contestant) -> EngineProcess:
        """Return the contestant's process; start it if it has none, or lost it."""
        if contestant.name not in self._engines:
            engine = self._spawn(contestant)
            streams = max((1, *self.plan.streams))
            try:
                answer = self._load(engine, contestant, streams)
            except EngineError as error:
                if error.alive:
                    engine.quit()
                self._give_up(contestant, f"cannot be loaded: {error}")
                raise EngineError(f"cannot be loaded: {error}", alive=False) from error
            self.about[contestant.name] = answer["about"]
            self._engines[contestant.name] = engine
        return self._engines[contestant.name]

    def _spawn(self, contestant: Contestant) -> EngineProcess:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment |= {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
        try:
            return EngineProcess(contestant.command, self._logs / f"{contestant.name}.log", environment)
        except OSError as error:
            reason = f"cannot be started: {error.strerror or error}"
            self._give_up(contestant, reason)
            raise EngineError(reason, alive=False) from error

    def _load(self, engine: EngineProcess, contestant: Contestant, streams: int) -> dict[str, Any]:
        return engine.ask(
            _LOAD_PATIENCE + self.plan.budget,
            call="load",
            threads=self.plan.threads,
            streams=streams,
            context=self.plan.context if streams > 1 else self.plan.slot,
            options=contestant.options,
            token_ids=self._token_ids[:16],
        )

    def _start_anew(self, contestant: Contestant) -> None:
        """Take load time and memory of a process that has done nothing else."""
        figures = self.plan.start_figures
        if (contestant.name, figures[0]) in self.samples.missing:
            return
        values: dict[Figure, float] = {}
        try:
            with self._spawn(contestant) as engine:
                loaded = self._load(engine, contestant, 1)
                values[Figure("load")], values[Figure("start")] = loaded["seconds"], loaded["start_seconds"]
                for tokens in (0, self.plan.slot):
                    if tokens:
                        # One token less than the slot has: the answer's first token has to fit as well.
                        prompt = self._token_ids[: tokens - 1]
                        engine.ask(self.plan.budget, call="prefill", token_ids=prompt)
                    memory = engine.ask(self.plan.budget, call="memory")
                    values |= {Figure(what, 1, tokens): memory[f"{what}_mb"] for what in _MEMORY_FIGURES}
        except EngineError as error:
            for figure in figures:
                if figure not in values:
                    self.samples.fail(contestant.name, figure, str(error))
        for figure, value in values.items():
            if (contestant.name, figure) not in self.samples.missing:
                self.samples.add(contestant.name, figure, value)

    def _give_up(self, contestant: Contestant, reason: str) -> None:
        for figure in self.plan.figures:
            if (contestant.name, figure) not in self.samples.missing:
                self.samples.fail(contestant.name, figure, reason)
