"""How fast the engine runs a bundle on this machine: prefill, decoding alone and in batches, load, memory.

    .venv/bin/python benchmarks/engine.py [BUNDLE] [--threads N] [--rounds N] [--json]

Every figure is the median over rounds in which all measurements take turns, so that a change of the machine's speed
meets them all. Absolute figures belong to the machine; it is named with them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hearthd import paths
from hearthd.bundle import Bundle
from hearthd.runner import OnnxRunner

CONTEXT = 2_048
DECODE_STEPS = 32


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path, default=paths.model_directory() / "smollm2-135m")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    started = time.perf_counter()
    runner = OnnxRunner.from_bundle(bundle, num_slots=8, context_length=CONTEXT, num_threads=arguments.threads)
    decode(runner, num_streams=1, context=1)
    load_seconds = time.perf_counter() - started

    measurements: dict[tuple[str, int, int], Callable[[], float]] = {}
    for tokens in (64, 512, 1_536):
        measurements["prefill", 1, tokens] = lambda tokens=tokens: prefill(runner, tokens)
    for streams in (1, 2, 4, 8):
        measurements["decode", streams, 64] = lambda streams=streams: decode(runner, streams, 64)
    measurements["decode", 1, 1_536] = lambda: decode(runner, 1, 1_536)
    rates: dict[tuple[str, int, int], list[float]] = {key: [] for key in measurements}
    for _ in range(arguments.rounds + 1):
        for key, measure in measurements.items():
            rates[key].append(measure())
    result = {
        "machine": machine(),
        "model": bundle.manifest.name,
        "threads": arguments.threads,
        "load_seconds": round(load_seconds, 3),
        "peak_resident_mb": peak_resident_mb(),
        "tokens_per_second": [
            # The first round warms up.
            {"what": what, "streams": streams, "tokens": tokens, "median": round(statistics.median(values[1:]), 1),
             "lowest": round(min(values[1:]), 1), "highest": round(max(values[1:]), 1)}
            for (what, streams, tokens), values in rates.items()
        ],
    }  # fmt: skip
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        print_table(result)
    return 0


def prefill(runner: OnnxRunner, num_tokens: int) -> float:
    """Run a prompt in chunks of 64; tokens/s."""
    ids = np.random.default_rng(0).integers(100, runner.vocab_size, (1, num_tokens))
    started = time.perf_counter()
    for start in range(0, num_tokens, 64):
        runner.forward(ids[:, start : start + 64], 0, np.asarray([start], np.int32))
    return num_tokens / (time.perf_counter() - started)


def decode(runner: OnnxRunner, num_streams: int, context: int) -> float:
    """Decode tokens of several streams in one batch; tokens/s of all together."""
    ids = np.full((num_streams, 1), 500)
    started = time.perf_counter()
    for step in range(DECODE_STEPS):
        runner.forward(ids, 0, np.full(num_streams, context + step, np.int32))
    return num_streams * DECODE_STEPS / (time.perf_counter() - started)


def machine() -> str:
    """Name the processor, as the system knows it."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith(("model name", "Model"))]  # fmt: skip
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def peak_resident_mb() -> int:
    """Return the most memory that this process had resident, the mapped weights included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def print_table(result: dict[str, object]) -> None:
    """Print Markdown."""
    print(f"{result['model']} on {result['machine']}, {result['threads']} threads: ", end="")
    print(f"load to first token {result['load_seconds']} s, peak resident {result['peak_resident_mb']} MB\n")
    print("| what | streams | tokens | tokens/s | lowest | highest |\n|---|---|---|---|---|---|")
    rows = result["tokens_per_second"]
    assert isinstance(rows, list)
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    sys.exit(main())
