"""Boards' lives in minutes: install, pair, chat, freeze, stop, pull the plug; on a Pi 5's processor and a Pi 4's.

    python scenario.py [--cpu cortex-a76 ...] [--packages DIRECTORY]

Each step is a check of the real thing: real packages on a real systemd, a client outside that comes in over the
network. Prints a table, and exits with 1 if a step failed; the rest of that board's steps are left out then. Everything
that was typed and answered goes to .cache/board/. The seconds are those of an emulated processor on a shared machine:
they say what a step costs the tests and nothing of a board. Started by `make board`.
"""

import argparse
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from device import Device
from image import Image, cache_directory, prepare
from life import LIFE, Life, StepError
from machine import Board, BoardError
from packages import add_newer, build_packages
from transcript import Transcript

# Raspberry Pi 5 and 4.
CPUS = ("cortex-a76", "cortex-a72")
DAEMON_PORT = 50051
# Some 10 minutes where nothing else runs.
MAX_SECONDS_PER_BOARD = 3000


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a step."""

    step: str
    seconds: float
    result: str
    is_good: bool

    def __str__(self) -> str:
        return f"{self.step:<58}{self.seconds:>8.1f}  {'' if self.is_good else 'FAILED: '}{self.result}"


def live(cpu: str, image: Image, packages: Path, transcript: Transcript) -> bool:
    """Run all steps on one board, and print a row for each; return whether all were good."""
    print(f"\n{cpu:<58}{'seconds':>8}  result", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="hearth-device-") as home,
        Board(cpu, image, packages, transcript, forwarded_port=DAEMON_PORT) as board,
    ):
        life = Life(board, Device(Path(home), transcript), transcript)
        for title, step in LIFE:
            transcript.heading(title)
            began = time.monotonic()
            try:
                result, is_good = step(life), True
            except (StepError, BoardError) as error:
                result, is_good = str(error), False
            row = Row(title, time.monotonic() - began, result, is_good)
            transcript.note(str(row))
            print(row, flush=True)
            if not is_good:
                life.explain()
                return False
    return True


def main() -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(description="Live through a year on emulated boards.")
    parser.add_argument("--cpu", action="append", metavar="NAME", help=f"qemu's name; by default {' and '.join(CPUS)}")
    parser.add_argument(
        "--packages", type=Path, metavar="DIRECTORY", help="with .deb files; those of this clone if not given"
    )
    arguments = parser.parse_args()
    # So that the board's context ends, and qemu with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"board: not done after {MAX_SECONDS_PER_BOARD} s"))
    cache = cache_directory()
    image = prepare(cache)
    packages = arguments.packages.resolve() if arguments.packages else build_packages(cache / "packages")
    add_newer(packages)
    results = []
    for cpu in arguments.cpu or CPUS:
        signal.alarm(MAX_SECONDS_PER_BOARD)
        transcript = Transcript(cache, cpu)
        results.append(live(cpu, image, packages, transcript))
        print(f"transcript: {transcript.path}")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
