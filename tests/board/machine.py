"""One emulated board: power on, run commands in it, reach its port from outside, pull the plug.

qemu-system-aarch64 emulates a named processor with two cores and 1 GB. The board has one wire, a network in which it
can be called and can call nobody, and a stick with the files that a test brings. Commands go to the agent that `image`
put into it. A board ends with its context, however that ends: qemu is killed by its own process id, and the kernel
kills it if this process dies without a word.

Knows nothing of Hearth. Used by `scenario`.
"""

import json
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from image import Image
from transcript import Transcript

NUM_CPUS: Final = 2
MEMORY_MB: Final = 1024
BOOT_SECONDS: Final = 300.0
# Beyond a command's own time: for the agent to kill it and to say so.
_ANSWER_SECONDS: Final = 30.0


class BoardError(Exception):
    """The board does not do what it was told."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command came to. exit_code: None if its time was over."""

    command: str
    exit_code: int | None
    output: str


class Board:
    """A board that is off at first. A context manager: what it needs is gone afterwards, its disk too."""

    def __init__(self, cpu: str, image: Image, stick: Path, transcript: Transcript, *, forwarded_port: int) -> None:
        """cpu: qemu's name. stick: a directory whose files are on the stick. forwarded_port: inside of the board."""
        self._cpu = cpu
        self._image = image
        self._transcript = transcript
        self._forwarded_port = forwarded_port
        self._scratch = Path(tempfile.mkdtemp(prefix="hearth-board-"))
        self._disk = self._scratch / "disk.img"
        self._stick = self._scratch / "stick.img"
        self._socket_path = self._scratch / "agent"
        self._process: subprocess.Popen[bytes] | None = None
        self._agent: socket.socket | None = None
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port: int = server.getsockname()[1]
            """Where `forwarded_port` is reached on this machine's loopback while the board is on; it stays the same."""
        subprocess.run(["cp", "--sparse=always", str(image.disk), str(self._disk)], check=True)
        _make_stick(stick, self._stick)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pull_plug()
        shutil.rmtree(self._scratch)

    def boot(self) -> None:
        """Power on; return when the agent answers."""
        assert self._process is None, "the board is on"
        self._socket_path.unlink(missing_ok=True)
        with self._transcript.console.open("ab") as console:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for this process, which then pulls the plug
            )
        self._agent = self._connect()
        self.run("true", user="root", seconds=BOOT_SECONDS)

    def run(self, command: str, *, user: str = "pi", seconds: float = 60.0) -> Outcome:
        """Run a command as a person's shell would; return what came of it, whatever it was.

        Raises BoardError if the board itself does not answer, or is off.
        """
        if self._agent is None:
            raise BoardError("the board is off")
        began = time.monotonic()
        request = {"command": command, "user": user, "seconds": seconds}
        answer = self._exchange(json.dumps(request).encode() + b"\n", seconds + _ANSWER_SECONDS)
        outcome = Outcome(command, **json.loads(answer))
        self._transcript.command(user, outcome.command, outcome.output, outcome.exit_code, time.monotonic() - began)
        return outcome

    def pull_plug(self) -> None:
        """Take the power away: nothing that was not on the disk yet will ever be."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _command(self) -> list[str]:
        drives = [(self._disk, "off"), (self._stick, "on")]
        return [
            "qemu-system-aarch64",
            *("-M", "virt", "-cpu", self._cpu, "-smp", str(NUM_CPUS), "-m", str(MEMORY_MB)),
            *("-accel", "tcg,thread=multi"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd)),
            *("-append", "root=LABEL=board rw console=ttyAMA0 panic=-1"),
            # unsafe: what the board has flushed is in this machine's page cache, which outlives qemu, and no plug is
            # pulled here. What the board itself has not written yet is lost either way.
            *(
                word
                for number, (path, readonly) in enumerate(drives)
                for word in (
                    *("-drive", f"file={path},format=raw,if=none,id=d{number},readonly={readonly},cache=unsafe"),
                    *("-device", f"virtio-blk-pci,drive=d{number}"),
                )
            ),
            # restrict: no way out of the board, neither to this machine nor beyond it. Calls from here come in.
            "-netdev",
            f"user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:{self._forwarded_port}",
            *("-device", "virtio-net-pci,netdev=n0,romfile="),
            *("-device", "virtio-rng-pci"),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,path={self._socket_path},server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=hearth.board"),
        ]

    def _connect(self) -> socket.socket:
        """Connect to the agent's wire, which qemu makes early in its life; what is sent waits for the agent."""
        assert self._process is not None
        agent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        deadline = time.monotonic() + 30.0
        while True:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                agent.connect(str(self._socket_path))
                return agent
            # qemu says nothing when it listens; its end is the only event that there is.
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(0.1)
                raise BoardError(f"qemu ended with code {code}; its words are in {self._transcript.console}")
            if time.monotonic() > deadline:
                raise BoardError("qemu does not open the agent's socket")

    def _exchange(self, request: bytes, seconds: float) -> bytes:
        assert self._agent is not None
        deadline = time.monotonic() + seconds
        answer = b""
        try:
            self._agent.settimeout(seconds)
            self._agent.sendall(request)
            while not answer.endswith(b"\n"):
                self._agent.settimeout(max(0.1, deadline - time.monotonic()))
                piece = self._agent.recv(1 << 16)
                if not piece:
                    raise BoardError(f"the board went down; its console is in {self._transcript.console}")
                answer += piece
        except TimeoutError:
            raise BoardError(
                f"the board does not answer within {seconds:.0f} s; its console is in {self._transcript.console}"
            ) from None
        return answer


def _make_stick(directory: Path, path: Path) -> None:
    """Write a directory to a disk image labelled `stick`, with room for its metadata."""
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    with path.open("wb") as file:
        file.truncate((size * 11 // 10 + (32 << 20)) >> 20 << 20)
    command = [
        "/usr/sbin/mkfs.ext4",
        "-q",
        "-F",
        "-L",
        "stick",
        "-E",
        "root_owner=0:0",
        "-d",
        str(directory),
        str(path),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
