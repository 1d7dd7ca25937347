"""`hearthd bench`: reads arguments, lets `suite` measure, prints a table, or with --json exactly one object.

Progress goes to standard error, where that is a terminal. Errors are raised; `__main__` turns them into a line and an
exit code, and calls `add_parser`. Imports what needs ONNX Runtime only when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hearthd.configuration.config import load_config

if TYPE_CHECKING:
    from hearthd.bundles.bundle import Bundle
    from hearthd.configuration.config import Config

__all__ = ["add_parser"]

_ROUNDS, _QUICK_ROUNDS = 5, 2
# For each of some twenty: about a minute for all on a server's processor, some minutes on a board.
_BUDGET_SECONDS, _QUICK_BUDGET_SECONDS = 20.0, 0.8
_MAX_THREADS = 256


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench` to a program's commands; the parsed arguments have `run`, which returns the exit code."""
    summary = "measure how fast a model runs on this machine, and what its memory allows"
    bench = subparsers.add_parser(
        "bench",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Slots and chunks are those of the configuration. Each "
        f"measurement may take {_BUDGET_SECONDS:g} s over all rounds; what would take longer is left out, and said.",
    )
    bench.add_argument(
        "model",
        nargs="?",
        metavar="NAME|DIRECTORY",
        help="an installed model, or a path to one, with a slash (default: the configuration's model.name)",
    )
    bench.add_argument("--threads", type=_threads, metavar="N", help="default: the configuration's engine.threads")
    bench.add_argument("--rounds", type=_rounds, metavar="N", help=f"that count, beside the first (default: {_ROUNDS})")
    bench.add_argument(
        "--quick", action="store_true", help=f"{_QUICK_ROUNDS} rounds, {_QUICK_BUDGET_SECONDS:g} s for each measurement"
    )
    bench.add_argument("--json", action="store_true", help="write one JSON object to standard output")
    bench.add_argument("--config", type=Path, metavar="FILE", help="TOML file, as for `serve`")
    bench.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from hearthd.bench.result import to_markdown, to_object
    from hearthd.bench.suite import Plan, measure_bundle
    from hearthd.board.machine import Machine

    config = load_config(arguments.config)
    bundle = _open(arguments.model or config.model.name, config)
    plan = Plan(
        num_threads=arguments.threads or config.engine.num_threads,
        context_length=config.engine.context_length,
        # All that is measured of a prompt is measured alone.
        chunk=min(config.engine.solo_prefill_chunk, config.engine.context_length),
        rounds=arguments.rounds or (_QUICK_ROUNDS if arguments.quick else _ROUNDS),
        budget_seconds=_QUICK_BUDGET_SECONDS if arguments.quick else _BUDGET_SECONDS,
    )
    with _Progress(sys.stderr) as progress:
        measured = measure_bundle(bundle, plan, progress)
    result: dict[str, Any] = to_object(bundle, Machine.here(), measured)
    print(json.dumps(result, indent=2) if arguments.json else to_markdown(result))
    return 0


def _open(model: str, config: Config) -> Bundle:
    from hearthd.bundles.bundle import Bundle
    from hearthd.bundles.store import Store

    if os.sep in model:
        return Bundle.open(Path(model).absolute())
    return Store(config.model.directory).open(model)


def _threads(text: str) -> int:
    return _whole(text, _MAX_THREADS)


def _rounds(text: str) -> int:
    return _whole(text, 1_000)


def _whole(text: str, most: int) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from 1 to {most}")
    return int(text)


class _Progress:
    """One line on a terminal that says what is being measured; nothing elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_shown = stream.isatty()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            self._write("")

    def __call__(self, step: str, share: float) -> None:
        if self._is_shown:
            self._write(f"{share:4.0%}  {step}")

    def _write(self, line: str) -> None:
        self._stream.write(f"\r\x1b[K{line[: max(shutil.get_terminal_size().columns - 1, 1)]}")
        self._stream.flush()
