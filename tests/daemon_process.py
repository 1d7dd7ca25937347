"""A daemon as a process of its own, and what systemd would hear from it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import grpc

_SCRIPTED = Path(__file__).with_name("serving.py")
_PATIENCE_SECONDS = 60


class DaemonProcess:
    """A daemon under a NOTIFY_SOCKET that is the test's. What it logs accumulates in `log`. A context manager."""

    def __init__(self, command: list[str], directory: Path, **environment: str) -> None:
        self.socket_path = directory / "hearthd.sock"
        self.messages: list[tuple[float, str]] = []
        """Each with the monotonic time at which it was read."""
        self._command = command
        self._log = directory / "log"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # The directory of a test may be too long for a socket's path.
        self._place = tempfile.TemporaryDirectory(prefix="hearth-")
        self._notify.bind(f"{self._place.name}/notify")
        self._environment = {key: value for key, value in os.environ.items() if not key.startswith("HEARTHD_")}
        self._environment |= {"NOTIFY_SOCKET": f"{self._place.name}/notify"} | environment

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stderr=log, env=self._environment, text=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._notify.close()
        self._place.cleanup()

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def hear(self, seconds: float) -> str | None:
        """Return the next message; None if none comes in time, or the daemon has ended."""
        self._notify.settimeout(max(seconds, 0.001))
        with contextlib.suppress(TimeoutError):
            message = self._notify.recv(8192).decode()
            self.messages.append((time.monotonic(), message))
            return message
        return None

    def wait_for(self, word: str) -> str:
        """Return the next message with this word."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            message = self.hear(0.2)
            if message and word in message:
                return message
            assert message or self.process.poll() is None, f"the daemon ended: {self.log}"
        raise AssertionError(f"{word} did not come; the daemon said: {self.log}")

    @contextlib.contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(f"unix:{self.socket_path}") as channel:
            yield channel


def scripted(directory: Path, *flags: str, **environment: str) -> DaemonProcess:
    """Return a daemon with a `FakeRunner`; the configuration in directory/hearthd.toml is its own, if there is one."""
    return DaemonProcess([sys.executable, str(_SCRIPTED), str(directory), *flags], directory, **environment)


def real(directory: Path, models: Path, *before: str, **environment: str) -> DaemonProcess:
    """Return hearthd itself, with the installed models of a directory; `before`: a command that starts it."""
    places = {f"{name}_DIRECTORY": str(directory / name.lower()) for name in ("STATE", "CONFIGURATION")}
    places |= {"RUNTIME_DIRECTORY": str(directory), "HEARTHD_MODEL_DIRECTORY": str(models), "HEARTHD_SERVER_TCP": ""}
    return DaemonProcess([*before, sys.executable, "-m", "hearthd", "serve"], directory, **(places | environment))
