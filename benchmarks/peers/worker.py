"""One engine in a process of its own: answers the requests of `contest.py`, one JSON object a line, over pipes.

Knows the protocol and the memory of its own process; the engines stand in the modules beside this one, which run it
with themselves. Standard library and NumPy only, since each engine runs in an environment of its own.

    call      with                                      answers
    load      threads, streams, context, token_ids,     seconds (from opening the model to the first token),
              options (the engine's own)                start_seconds (from the process's start), about
    prefill   token_ids                                 tokens, seconds
    decode    streams, token_ids, steps, budget         tokens (of all streams), seconds
    memory                                              resident_mb, own_mb, file_mb, peak_mb
    quit

Whatever fails answers {"error": "one line"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]


class NotMeasurableError(Exception):
    """The engine's interface does not offer what was asked for."""


class Engine(Protocol):
    """What the benchmark asks of an engine; it decodes greedily, and times nothing itself."""

    def load(self, threads: int, streams: int, context: int, options: dict[str, Any]) -> None:
        """Open the model, with room for `streams` sequences of `context` tokens."""

    def about(self) -> dict[str, Any]:
        """Return versions and settings, for the report."""

    def prepare(self, streams: int, length: int) -> int:
        """Keep at most `length` tokens of each of the first `streams` sequences; return how many each still has.

        Never timed. What the engine cannot cut off it may forget, and return 0.
        """

    def prefill(self, stream: int, token_ids: TokenIds) -> int:
        """Append a prompt, (S,), to one sequence; return the likeliest next token."""

    def prefill_all(self, token_ids: TokenIds) -> list[int] | None:
        """Append (B, S) to the first B sequences, for engines that cannot do one by one; None where `prefill` can."""

    def decode(self, token_ids: list[int]) -> list[int]:
        """Append one token to each of the first sequences, in one batch; return the likeliest next ones."""


def serve(engine: Engine) -> NoReturn:
    """Answer requests until `quit`, or until the pipe ends with the controlling process."""
    # Libraries write to standard output as they like: the protocol gets a descriptor of its own, they get stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if request["call"] == "quit":
            break
        try:
            answer = _answer(engine, request)
        # Whatever it is, it is this engine's result, and the others go on.
        except Exception as error:  # noqa: BLE001
            kind = "" if isinstance(error, NotMeasurableError) else f"{type(error).__name__}: "
            answer = {"error": (kind + str(error).strip().split("\n")[0])[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    sys.stderr.flush()
    # No teardown: some engines' own takes long, or crashes, and has nothing to do with what is measured.
    os._exit(0)


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    call = request["call"]
    if call == "load":
        started = time.perf_counter()
        engine.load(request["threads"], request["streams"], request["context"], request["options"])
        engine.prefill(0, np.asarray(request["token_ids"], np.int64))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "start_seconds": _age(), "about": engine.about()}
    if call == "prefill":
        return _prefill(engine, np.asarray(request["token_ids"], np.int64))
    if call == "decode":
        token_ids = np.asarray(request["token_ids"], np.int64)
        return _decode(engine, request["streams"], token_ids, request["steps"], request["budget"])
    if call == "memory":
        return memory()
    raise ValueError(f"no call {call!r}")


def _prefill(engine: Engine, token_ids: TokenIds) -> dict[str, float]:
    engine.prepare(1, 0)
    started = time.perf_counter()
    engine.prefill(0, token_ids)
    return {"tokens": len(token_ids), "seconds": time.perf_counter() - started}


def _decode(engine: Engine, streams: int, token_ids: TokenIds, steps: int, budget: float) -> dict[str, float]:
    """Bring each sequence to the length of token_ids, untimed, then decode."""
    # The last token of the context is the first that is decoded, so that the first step is like the others.
    wanted = len(token_ids) - 1
    kept = engine.prepare(streams, wanted)
    if kept < wanted:
        # Each stream another text of the same length: an engine must not profit from a shared prefix.
        rows = np.stack([np.roll(token_ids[:wanted], 7 * stream)[kept:] for stream in range(streams)])
        if streams == 1 or engine.prefill_all(rows) is None:
            for stream in range(streams):
                engine.prefill(stream, rows[stream])
    following = engine.decode([int(token_ids[-1])] * streams)
    started = time.perf_counter()
    done = 0
    while done < steps:
        following = engine.decode(following)
        done += 1
        if time.perf_counter() - started > budget:
            break
    return {"tokens": streams * done, "seconds": time.perf_counter() - started}


def memory() -> dict[str, float]:
    """Return this process's resident memory in MB: all, its own (anonymous and shared memory), and mapped files."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) / 1024
    # Mappings that are made with MAP_SHARED and no file count as shared memory; nobody shares them here.
    own = fields["Anonymous"] + fields.get("Pss_Shmem", 0.0)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "resident_mb": fields["Rss"],
        "own_mb": own,
        "file_mb": fields["Rss"] - own,
        "peak_mb": int(peak.split()[1]) / 1024,
    }


def _age() -> float:
    """Return the seconds since this process was started: the interpreter and the imports count."""
    # Field 22 of stat, counted after the name in parentheses, is the start in clock ticks since the machine's.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
