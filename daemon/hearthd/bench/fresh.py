"""A model loaded in a process of its own: the time to its first token, and the memory that it then has.

    python -m hearthd.bench.fresh DIRECTORY --threads N --context N --chunk N [--fill]

That process loads what the daemon loads, engine and tokenizer with one slot, and lets it answer with one token; the
rest of the daemon, gRPC, is not in it. Prints one JSON object. `FreshProcess` starts it and reads that; `suite` calls.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hearthd.errors import BenchError, HearthdError

__all__ = ["FreshProcess"]

# What is run before memory is read: a prompt and an answer of ordinary lengths.
PROMPT_TOKENS = 256
ANSWER_TOKENS = 32


class FreshProcess:
    """Loads a model again and again, each time in a new process. `found`: all that the last one said."""

    def __init__(self, directory: Path, *, num_threads: int, context_length: int, chunk: int) -> None:
        # -P: a file of the working directory must not be taken for a module.
        self._command = [sys.executable, "-P", "-m", "hearthd.bench.fresh", str(directory.resolve())]
        self._command += ["--threads", str(num_threads), "--context", str(context_length), "--chunk", str(chunk)]
        self.found: dict[str, Any] = {}

    def load_seconds(self) -> float:
        """Load the model once; returns the seconds from opening its directory to its first token."""
        self._run([])
        return float(self.found["load_seconds"])

    def expected_fill(self) -> float:
        """Seconds that filling the slot to its end will take."""
        return float(self.found["prefill_seconds_per_token"]) * int(self.found["context_length"])

    def fill(self) -> float:
        """Load it once more and fill the slot: `found` then has `full_slot` as well. Returns resident bytes."""
        self._run(["--fill"])
        return float(self.found["full_slot"]["total"])

    def _run(self, options: list[str]) -> None:
        done = subprocess.run([*self._command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise BenchError(f"the model cannot be loaded in a process of its own: {said[-1] if said else 'no reason'}")
        self.found |= json.loads(done.stdout)


def main() -> int:
    """Load, answer, and say what that took."""
    parser = argparse.ArgumentParser(prog="hearthd.bench.fresh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--chunk", type=int, required=True)
    parser.add_argument("--fill", action="store_true")
    arguments = parser.parse_args()
    try:
        json.dump(_load(arguments), sys.stdout)
    except HearthdError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _load(arguments: argparse.Namespace) -> dict[str, Any]:
    # Before the clock starts: what Python takes to import its packages is no property of the model.
    from hearthd.bench import measure
    from hearthd.board.machine import ResidentSet
    from hearthd.bundles.bundle import Bundle
    from hearthd.configuration.config import Config, EngineConfig, ModelConfig
    from hearthd.inference.model import load_model, prove
    from hearthd.runtime import runner  # noqa: F401 - brings ONNX Runtime

    directory: Path = arguments.directory
    config = Config(
        model=ModelConfig(directory=directory.parent, name=directory.name),
        engine=EngineConfig(
            slots=1, context_length=arguments.context, threads=arguments.threads, prefill_chunk=arguments.chunk
        ),
    )
    started = time.perf_counter()
    model = load_model(Bundle.open(directory), config)
    loaded = time.perf_counter()
    prove(model)
    first_token = time.perf_counter()
    found: dict[str, Any] = {"load_seconds": first_token - started, "without_first_token_seconds": loaded - started}
    found["loaded"] = {"tokens": 1} | asdict(ResidentSet.of_this_process(directory))
    context = model.runner.context_length
    prompt = min(PROMPT_TOKENS, context // 2)
    answer = min(ANSWER_TOKENS, context - prompt)
    found["context_length"] = context
    found["prefill_seconds_per_token"] = measure.prefill(model.runner, prompt, chunk=arguments.chunk) / prompt
    measure.decode(model.runner, 1, prompt, num_steps=answer)
    # As the daemon does a little later.
    model.runner.give_back_prompt(0)
    found["used"] = {"tokens": prompt + answer} | asdict(ResidentSet.of_this_process(directory))
    if arguments.fill:
        measure.prefill(model.runner, context - 1, chunk=arguments.chunk)
        measure.decode(model.runner, 1, context - 1, num_steps=1)
        model.runner.give_back_prompt(0)
        found["full_slot"] = {"tokens": context} | asdict(ResidentSet.of_this_process(directory))
    return found


if __name__ == "__main__":
    sys.exit(main())
