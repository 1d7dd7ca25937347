"""A daemon in a process of its own, with `FakeRunner` in place of the model, for faults that need a process to strike.

    fake_daemon.py DIRECTORY JSON      sections of the configuration that differ; "runner": options of FakeRunner;
                                       "fail": an exception for the first forward after the proof

It says READY to systemd, here the test, like any other. If its runner is gated, each line of standard input says how
many forwards may pass.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fakes import FakeRunner
from hearth import Client
from hearthd.__main__ import run_server
from hearthd.configuration.config import Config
from hearthd.inference.model import Model
from hearthd.logs import configure_logging
from serving import PROOF_FORWARDS, make_config, make_model, make_runner

READY_SECONDS = 30


class FakeDaemon:
    """The process, as a test sees it. Ended with its `with` block."""

    def __init__(
        self,
        directory: Path,
        *,
        allowed: int = 0,
        wrapper: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        """allowed: forwards of a gated runner. wrapper: a program that starts it. options: sections, and `runner`."""
        self.socket = directory / "hearthd.sock"
        self.log = directory / "daemon.log"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.suppress(FileNotFoundError):
            (directory / "notify").unlink()
        self._notify.bind(str(directory / "notify"))
        self._notify.settimeout(READY_SECONDS)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, __file__, str(directory), json.dumps(options, default=str)],
                stdin=subprocess.PIPE,
                stderr=log,
                env=os.environ
                | {"NOTIFY_SOCKET": str(directory / "notify"), "PYTHONPATH": os.pathsep.join(sys.path)}
                | (environment or {}),
            )
        self.allow(allowed)
        self.tcp = ""
        """Its address, once `wait_until_ready` has returned."""

    def __enter__(self) -> Self:
        try:
            return self.wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()
        self._notify.close()

    def wait_until_ready(self) -> Self:
        self.tcp = self.wait_for("READY=1").rpartition(" ")[2].strip()
        return self

    def wait_for(self, word: str) -> str:
        """Return systemd's next message with this word."""
        deadline = time.monotonic() + READY_SECONDS
        while word not in (message := self._notify.recv(4096).decode()):
            assert time.monotonic() < deadline, f"it did not say {word}: {self.log.read_text()}"
        return message

    def says(self, word: str, *, within_seconds: float) -> bool:
        """Whether systemd hears a message with this word."""
        deadline = time.monotonic() + within_seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._notify], [], [], left)[0]:
                return False
            if word in self._notify.recv(4096).decode():
                return True
        return False

    def allow(self, count: int) -> None:
        """Let so many forwards of a gated runner pass."""
        assert self.process.stdin
        self.process.stdin.write(f"{count}\n".encode())
        self.process.stdin.flush()

    def client(self, address: str | None = None, **options: Any) -> Client:
        return Client(address or f"unix://{self.socket}", **options)

    @property
    def port(self) -> int:
        return int(self.tcp.rpartition(":")[2])

    @property
    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 1e6

    @property
    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def wait_for_descriptors(self, count: int, seconds: float = 20.0) -> None:
        """Return when no more than so many are open."""
        deadline = time.monotonic() + seconds
        while (now := self.num_descriptors) > count:
            assert time.monotonic() < deadline, f"{now} descriptors are open, {count} are meant"
            with self.client() as client:
                client.status()


def obey(runner: FakeRunner) -> None:
    for line in sys.stdin:
        runner.allow(int(line))
    runner.open_gate()


def fail_after_proof(runner: FakeRunner, failure: str) -> None:
    runner.wait_for_forwards(PROOF_FORWARDS)
    runner.fail_next = getattr(builtins, failure)()


def main(directory: Path, options: dict[str, Any]) -> int:
    configure_logging("info")
    runner = make_runner(**options.pop("runner", {}))
    threading.Thread(target=obey, args=(runner,), daemon=True).start()
    for section, key in (("auth", "token_file"), ("tls", "certificate"), ("tls", "key")):
        if options.get(section, {}).get(key):
            options[section][key] = Path(options[section][key])
    failure = options.pop("fail", None)
    config = make_config(directory, **options)

    def load(_: Config) -> Model:
        model = make_model(runner)
        if failure:
            threading.Thread(target=fail_after_proof, args=(runner, failure), daemon=True).start()
        return model

    return run_server(config, load)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stderr.flush()
    # As hearthd itself does.
    os._exit(code)
