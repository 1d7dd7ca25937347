"""All measurements of `hearthd bench`: what is measured, in which order, and what does not fit the machine's memory.

Knows no terminal, no command line and no form of output. Called by `cli`; `result` makes an object of what comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from hearthd.bench.bandwidth import MIN_BUFFER_BYTES, ReadBandwidth, make_buffer
from hearthd.bench.fresh import FreshProcess
from hearthd.bench.runs import MAX_STEPS, FittedRuns
from hearthd.bench.traffic import StepTraffic
from hearthd.bench.turns import Figure, Measurement, take_turns
from hearthd.board.machine import available_bytes
from hearthd.bundles.bundle import Bundle
from hearthd.errors import BenchError
from hearthd.runtime.runner import OnnxRunner

__all__ = ["SHORT_CONTEXT", "Decode", "Fill", "Load", "Measured", "Plan", "Prefill", "Read", "measure_bundle"]

Report = Callable[[str, float], None]

PROMPTS = (32, 64, 128, 256, 512, 1_024, 2_048)
SHORT_CONTEXT = 64
DECODES = (
    (1, SHORT_CONTEXT),
    (2, SHORT_CONTEXT),
    (4, SHORT_CONTEXT),
    (8, SHORT_CONTEXT),
    (1, 512),
    (1, 1_024),
    (1, 2_000),
)
_SLOTS = max(streams for streams, _ in DECODES)


@dataclass(frozen=True, slots=True)
class Plan:
    """budget_seconds: that each measurement may take over all rounds. rounds: that count, beside one that warms up."""

    num_threads: int
    context_length: int
    chunk: int
    rounds: int
    budget_seconds: float


@dataclass(frozen=True, slots=True)
class Load:
    """Seconds to the first token, in a process of its own."""

    def __str__(self) -> str:
        return "load to first token"


@dataclass(frozen=True, slots=True)
class Fill:
    """The memory of a process whose one slot is full."""

    def __str__(self) -> str:
        return "memory with a full slot"


@dataclass(frozen=True, slots=True)
class Prefill:
    """Tokens/s of a prompt."""

    tokens: int

    def __str__(self) -> str:
        return f"prefill of {self.tokens:,} tokens"


@dataclass(frozen=True, slots=True)
class Decode:
    """Tokens/s of all streams together."""

    streams: int
    context: int
    threads: int

    def __str__(self) -> str:
        return f"decode of {self.streams} at {self.context:,} tokens, threads: {self.threads}"


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes/s of reading memory."""

    threads: int

    def __str__(self) -> str:
        return f"read bandwidth, threads: {self.threads}"


Key = Load | Fill | Prefill | Decode | Read


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures and the reasons of what was left out, by what was measured; decode steps in one go; memory by `fresh`."""

    plan: Plan
    traffic: StepTraffic
    buffer_bytes: int
    context_length: int
    figures: dict[Key, Figure]
    left_out: dict[Key, str]
    num_steps: dict[Decode, int]
    fresh: dict[str, Any]


def measure_bundle(bundle: Bundle, plan: Plan, report: Report) -> Measured:
    """Measure all of it. report: called with a step and the share of it that is done.

    Raises BenchError if the memory does not suffice.
    """
    traffic = StepTraffic.of_model(bundle.model_path)
    context_length = min(plan.context_length, bundle.manifest.context_length)
    buffer_bytes = max(traffic.weight_bytes, MIN_BUFFER_BYTES)
    # Two runners, each with its weights mapped and perhaps packed a second time; their KV, that of a prompt being read
    # in float32 besides; the buffer.
    kv = traffic.kv_bytes_per_position * (5 * context_length + (_SLOTS + 1) * (SHORT_CONTEXT + MAX_STEPS))
    check_room(3 * traffic.weight_bytes + kv + buffer_bytes, available_bytes())
    # Before this process loads the model too: a small board has not the memory for both.
    fresh = FreshProcess(bundle.path, num_threads=plan.num_threads, context_length=context_length, chunk=plan.chunk)
    figures, left_out = _measure_fresh(fresh, plan, report)
    num_steps: dict[Decode, int] = {}
    with ExitStack() as stack:
        runs = _load_runs(bundle, plan)
        measurements = _measurements(runs, plan, buffer_bytes, stack)
        found, reasons = take_turns(measurements, rounds=plan.rounds, budget_seconds=plan.budget_seconds, report=report)
        for threads, each in runs.items():
            num_steps |= {Decode(*key, threads): steps for key, steps in each.num_steps.items()}
    return Measured(
        plan=plan,
        traffic=traffic,
        buffer_bytes=buffer_bytes,
        context_length=context_length,
        figures=figures | found,
        left_out=left_out | reasons,
        num_steps=num_steps,
        fresh=fresh.found,
    )


def check_room(needed: int, available: int) -> None:
    """Raise BenchError unless the memory is there: a machine that swaps measures its disk."""
    if needed > available:
        raise BenchError(
            f"measuring this model takes up to {needed / 1e6:,.0f} MB of memory, and {available / 1e6:,.0f} MB are "
            "available; stop the daemon meanwhile (`systemctl stop hearthd`), and what else can be spared"
        )


def _measure_fresh(fresh: FreshProcess, plan: Plan, report: Report) -> tuple[dict[Key, Figure], dict[Key, str]]:
    load: list[Measurement[Key]] = [Measurement(Load(), fresh.load_seconds)]
    figures, left_out = take_turns(load, rounds=plan.rounds, budget_seconds=plan.budget_seconds, report=report)
    # A part of the load's rounds tells what it takes to fill a slot; that is done once.
    fill: list[Measurement[Key]] = [Measurement(Fill(), fresh.fill, fresh.expected_fill)]
    _, reasons = take_turns(fill, rounds=0, budget_seconds=plan.budget_seconds, report=report)
    return figures, left_out | reasons


def _load_runs(bundle: Bundle, plan: Plan) -> dict[int, FittedRuns]:
    """Load the model with the threads that were asked for, and with one thread; return both by threads."""
    return {
        threads: FittedRuns(
            OnnxRunner.from_bundle(bundle, num_slots=slots, context_length=plan.context_length, num_threads=threads),
            chunk=plan.chunk,
            rounds=plan.rounds,
            budget_seconds=plan.budget_seconds,
        )
        for threads, slots in {1: 1, plan.num_threads: _SLOTS}.items()
    }


def _measurements(
    runs: dict[int, FittedRuns], plan: Plan, buffer_bytes: int, stack: ExitStack
) -> list[Measurement[Key]]:
    chosen = runs[plan.num_threads]
    measurements: list[Measurement[Key]] = [
        Measurement(Prefill(tokens), partial(chosen.prefill, tokens), partial(chosen.expected_prefill, tokens))
        for tokens in PROMPTS
    ]
    buffer = make_buffer(buffer_bytes)
    for threads, each in runs.items():
        # A share is of two figures: they are taken one after the other.
        reading = stack.enter_context(ReadBandwidth(buffer, threads))
        decode = partial(each.decode, 1, SHORT_CONTEXT)
        measurements += [
            Measurement(Decode(1, SHORT_CONTEXT, threads), decode),
            Measurement(Read(threads), reading.measure),
        ]
    measurements += [
        Measurement(Decode(streams, context, plan.num_threads), partial(chosen.decode, streams, context))
        for streams, context in DECODES
        if (streams, context) != (1, SHORT_CONTEXT)
    ]
    return measurements
