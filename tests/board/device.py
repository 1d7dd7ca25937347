"""A device in the house: the `hearth` program outside of the board, with a home directory of its own.

The client of this clone is installed there as the manual says, from wheels; it knows of the board only what its owner
tells it. Used by `scenario`.
"""

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from machine import Outcome
from transcript import Transcript

ROOT = Path(__file__).resolve().parents[2]


class Answering:
    """An answer that is coming."""

    def __init__(self, process: "subprocess.Popen[bytes]", command: str, transcript: Transcript) -> None:
        self._process = process
        self._command = command
        self._transcript = transcript
        self._began = time.monotonic()
        self._heard = b""

    def wait_for_text(self, seconds: float) -> bool:
        """Return whether the answer began: not if the program ended or the time is over."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if selector.select(seconds):
                self._heard += os.read(self._process.stdout.fileno(), 4096)
        return self._heard != b""

    @property
    def is_running(self) -> bool:
        """Whether the program has not ended."""
        return self._process.poll() is None

    def finish(self, seconds: float) -> Outcome:
        """Wait for the program's end; out of time, end it."""
        try:
            output, errors = self._process.communicate(timeout=seconds)
            exit_code: int | None = self._process.returncode
        except subprocess.TimeoutExpired:
            self._process.kill()
            output, errors = self._process.communicate()
            exit_code = None
        text = (self._heard + output).decode("utf-8", "replace") + errors.decode("utf-8", "replace")
        self._transcript.command("device", self._command, text, exit_code, time.monotonic() - self._began)
        return Outcome(self._command, exit_code, text)


class Device:
    """A computer with a Python and a clone of this repository, and once `install` has been called, with `hearth`."""

    def __init__(self, home: Path, transcript: Transcript) -> None:
        self._transcript = transcript
        self._program = ""
        not_its_own = ("HEARTH", "GRPC_", "XDG_", "PYTHON", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(not_its_own)}
        self._environment = kept | {
            "HOME": str(home),
            # Its `python3` is the one that runs this, which is new enough.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            # What this machine has fetched before need not be fetched again.
            "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR") or str(Path.home() / ".cache/pip"),
            "TERM": "dumb",
            "PYTHONUTF8": "1",
        }

    def install(self, box: str, *, seconds: float = 300.0) -> Outcome:
        """Type what the manual says, in the clone; `hearth` is from then on the one that the shell finds after it."""
        command = ["bash", "-e", "-c", f"{box}\ncommand -v hearth"]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
        )
        outcome = Answering(process, box, self._transcript).finish(seconds)
        if outcome.exit_code == 0:
            self._program = outcome.output.splitlines()[-1]
        return outcome

    def run(self, *words: str, seconds: float = 60.0) -> Outcome:
        """Run `hearth` with these words to its end. The output ends with what it wrote to standard error."""
        with self.begin(*words) as answering:
            return answering.finish(seconds)

    @contextlib.contextmanager
    def begin(self, *words: str) -> Iterator[Answering]:
        """Start `hearth`; in the block it runs, after the block it has ended."""
        process = subprocess.Popen(
            [self._program, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
        )
        try:
            yield Answering(process, f"hearth {' '.join(words)}", self._transcript)
        finally:
            process.kill()
            process.communicate()
