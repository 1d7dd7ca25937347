"""A server in a process of its own, as the kernel sees it: its memory, its processor time, its end.

Knows no server in particular. Base of those in `hearth_server` and `llama_server`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_STOP_SECONDS = 30.0
_LOOK_SECONDS = 0.1
# Of one processor: housekeeping, as a daemon's life signs, is less.
_QUIET_SHARE = 0.1


class ServerError(Exception):
    """A server cannot be started, or has ended: one line with the reason."""


def free_port() -> int:
    """Return a port of loopback that nobody has at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class ServerProcess:
    """Started by `start`, ended by `stop` or by leaving its `with` block."""

    def __init__(self, name: str, log: Path) -> None:
        """log: the file for what it says."""
        self.name = name
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and return when it answers. Raises ServerError."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ask it to end, and see to it that it does."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    @property
    def resident_bytes(self) -> int:
        """Its resident set."""
        return int(Path(f"/proc/{self._pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    @property
    def cpu_seconds(self) -> float:
        """Processor time that it has used, all its threads."""
        # proc(5): utime and stime are fields 14 and 15, counted after the name in parentheses.
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_until_quiet(self, patience: float = 20.0) -> None:
        """Return when it hardly computes: what it does after an answer would be measured with whatever comes next."""
        deadline = time.monotonic() + patience
        used = self.cpu_seconds
        while time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            before, used = used, self.cpu_seconds
            if used - before <= _QUIET_SHARE * _LOOK_SECONDS:
                return

    def check_alive(self) -> None:
        """Raise ServerError, with the end of what it said, if the process has ended."""
        if self._process is not None and (code := self._process.poll()) is not None:
            said = self.log.read_text(errors="replace").strip().splitlines()[-3:] or ["nothing"]
            raise ServerError(f"{self.name} ended with {code}; it said: {' / '.join(said)[-300:]}")

    def _spawn(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HEARTH", "NOTIFY", "WATCHDOG", "STATE_", "CACHE_", "RUNTIME_", "PYTHON"))
        }
        with self.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=kept | dict(environment)
                )
            except OSError as error:
                raise ServerError(f"{self.name} cannot be started: {error.strerror or error}") from error

    @property
    def _pid(self) -> int:
        assert self._process is not None, "it was not started"
        return self._process.pid
