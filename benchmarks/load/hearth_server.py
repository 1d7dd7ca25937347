"""A daemon to load: hearthd itself, on a port and with a configuration of its own that are gone afterwards.

Called by the scenarios. Knows the configuration file and the notification protocol of systemd, nothing of chats.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from hearthd.access.tokens import create_token
from load.chat import Caller
from load.server_process import ServerError, ServerProcess, free_port

# A board takes a while to check and load a model.
_READY_SECONDS = 180.0
MAX_QUEUED = 16
COMMAND = (sys.executable, "-m", "hearthd", "serve", "--config")


class HearthServer(ServerProcess):
    """hearthd. Its state outlives `stop` and `start`, until `remove` or the end of the `with` block."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        threads: int,
        slots: int,
        context_length: int = 2048,
        callers: Sequence[str] = ("caller",),
        command: Sequence[str] = COMMAND,
        each_token: bool = False,
        settings: str = "",
    ) -> None:
        """model: an installed model's directory. callers: who get a token each.

        command: what takes the configuration's path and is a daemon. each_token: a message for each, as steps give
        them. settings: more of the configuration, TOML.
        """
        super().__init__("hearthd", log)
        # A short path: that of a Unix socket has at most 107 bytes.
        self._directory = Path(tempfile.mkdtemp(prefix="hearth."))
        self._command = command
        self._port = free_port()
        token_file = self._directory / "tokens"
        self._tokens = {name: create_token(token_file, name) for name in callers}
        self._config = self._directory / "hearthd.toml"
        self._config.write_text(
            f'[server]\nunix_socket = ""\ntcp = ["{self.address}"]\nmax_connections = 256\ndrain_grace_seconds = 2\n'
            f"{'stream_interval_ms = 0' if each_token else ''}\n"
            f'[auth]\ntoken_file = "{token_file}"\n'
            f'[model]\ndirectory = "{model.resolve().parent}"\nname = "{model.resolve().name}"\n'
            f"[engine]\nslots = {slots}\ncontext_length = {context_length}\nthreads = {threads}\n"
            f"[limits]\nmax_queued = {MAX_QUEUED}\n{settings}"
        )

    def __enter__(self) -> Self:
        try:
            return super().__enter__()
        except BaseException:
            self.remove()
            raise

    def __exit__(self, *error: object) -> None:
        self.stop()
        self.remove()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self._port}"

    @property
    def config(self) -> Path:
        """Its configuration file."""
        return self._config

    def caller(self, name: str) -> Caller:
        """Return one of the callers. Raises KeyError for another name."""
        return Caller(name, self.address, self._tokens[name])

    def start(self) -> None:
        """Start it and return when it has told that it is ready."""
        place = self._directory / "notify"
        place.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(place))
            environment = {
                "STATE_DIRECTORY": str(self._directory / "state"),
                "CACHE_DIRECTORY": str(self._directory / "cache"),
                "NOTIFY_SOCKET": str(place),
                "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            }
            for name in ("state", "cache"):
                (self._directory / name).mkdir(mode=0o700, exist_ok=True)
            self._spawn([*self._command, self._config], environment)
            try:
                self._wait_until_ready(notify)
            except BaseException:
                self.stop()
                raise

    def _wait_until_ready(self, notify: socket.socket) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        notify.settimeout(0.2)
        while time.monotonic() < deadline:
            try:
                if b"READY=1" in notify.recv(8192):
                    return
            except TimeoutError:
                self.check_alive()
        raise ServerError(f"{self.name} was not ready after {_READY_SECONDS:g} s; see {self.log}")

    def remove(self) -> None:
        """Remove all that it kept."""
        shutil.rmtree(self._directory, ignore_errors=True)
