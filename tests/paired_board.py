"""A board and a device for tests of pairing: real programs, each in directories and homes of its own.

The daemon's model is `FakeRunner`; all else is what people run. `inside`: words to put before a program, so that it
runs in another network.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import hearth_program as program
from hearth._paired import PairedDaemons
from hearthd.access.tokens import make_token_file
from hearthd.pairing.certificate import make_certificate

DAEMON = Path(__file__).with_name("configured_daemon.py")


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


@dataclass
class Board:
    """A machine with a daemon: its configuration, its state and its commands."""

    directory: Path
    port: int
    inside: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HEARTH")}
        places = {
            f"{name.upper()}_DIRECTORY": str(self.directory / name) for name in ("state", "runtime", "configuration")
        }
        return kept | places

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def file(self) -> Path:
        return self.directory / "configuration/hearthd.toml"

    def write(self, text: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        (self.directory / "runtime").mkdir(exist_ok=True)
        self.file.write_text(text)

    def write_usual(self) -> None:
        self.write(
            f'[server]\ntcp = ["127.0.0.1:{self.port}"]\n[tls]\ndirectory = "auto"\n[auth]\ntoken_file = "auto"\n'
        )

    def hearthd(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.inside, sys.executable, "-m", "hearthd", *words],
            capture_output=True, text=True, check=False, timeout=60, env=self.environment,
        )  # fmt: skip

    def prepare(self) -> None:
        """Make what the first `hearthd pair` makes, without which no daemon starts."""
        self.state.mkdir(exist_ok=True)
        make_certificate(self.state / "tls")
        make_token_file(self.state / "tokens")

    def code(self, name: str, *words: str) -> str:
        done = self.hearthd("pair", name, "--address", "127.0.0.1", *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        return done.stdout.strip()


class Running:
    """A board's daemon; `log` is what it has said."""

    def __init__(self, board: Board) -> None:
        self.process = subprocess.Popen(
            [*board.inside, sys.executable, str(DAEMON), str(board.file)],
            stderr=subprocess.PIPE,
            text=True,
            env=board.environment,
        )
        self.log = ""
        self._has_ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self._changed:
                self.log += line
                self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def wait(self, text: str = "serving test-model") -> Running:
        """Return when the daemon has said this."""
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.log or self._has_ended, 60)
            assert text in self.log, self.log
        return self

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._reader.join(30)
        if self.process.stderr:
            self.process.stderr.close()


@dataclass
class Device:
    """A home of its own."""

    home: Path
    inside: list[str] = field(default_factory=list)

    def hearth(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.inside, *program.command(*words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=program.environment(HOME=str(self.home), XDG_CONFIG_HOME="", **changes),
            timeout=60,
            check=False,
        )

    @property
    def daemons(self) -> PairedDaemons:
        return PairedDaemons({"HOME": str(self.home)})
