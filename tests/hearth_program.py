"""The `hearth` program as a person has it: in a pipe, and on a terminal of its own (a pty with job control)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

CLIENT = Path(__file__).resolve().parent.parent / "client"
# Takes the pty for its controlling terminal, so that a typed Ctrl-C is a SIGINT; then becomes the program. A shell's
# background job ignores SIGINT and SIGQUIT, nohup's SIGHUP, and so would all that they start.
_TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "signal.signal(signal.SIGQUIT, signal.SIG_DFL); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def environment(**changes: str) -> dict[str, str]:
    """The program's environment: none of this machine's own settings for it."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HEARTH_", "GRPC_", "XDG_RUNTIME"))
    }
    # Where nobody is paired with anything.
    kept["XDG_CONFIG_HOME"] = "/nonexistent"
    return kept | {"PYTHONPATH": str(CLIENT), "TERM": "dumb", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": ""} | changes


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "hearth", *arguments]


def run(*arguments: str, stdin: bytes | None = None, **changes: str) -> subprocess.CompletedProcess[bytes]:
    """Run it to its end. Without `stdin`, its input is empty."""
    return subprocess.run(
        command(*arguments),
        input=stdin or b"",
        capture_output=True,
        env=environment(**changes),
        timeout=60,
        check=False,
    )


class Terminal:
    """The program on a pty; what it shows accumulates in `shown`."""

    def __init__(self, *arguments: str, **changes: str) -> None:
        self._main, inner = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *command(*arguments)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment(**changes),
            start_new_session=True,
        )
        os.close(inner)
        self.shown = ""
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)

    def resize(self, *, lines: int, columns: int) -> None:
        """Make the window another size, which the program hears of."""
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def interrupt(self, expected: str) -> None:
        """Press Ctrl-C until `expected` comes.

        CPython's readline loses a signal that comes between an echo and its select() (it looks for signals only after
        EINTR). A person is never that quick, and would press again.
        """
        for seconds in (1, 2, 4, 8):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.expect(expected, seconds)
                return
        raise AssertionError(f"Ctrl-C did not bring {expected!r}")

    def expect(self, text: str, seconds: float = 20) -> str:
        """Read until `text` comes after what was expected before. Returns what stood between."""
        deadline = time.monotonic() + seconds
        while (found := self.shown.find(text, self._seen)) < 0:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(
                    f"waited for {text!r}; after what was expected before came {self.shown[self._seen :]!r}"
                )
        between = self.shown[self._seen : found]
        self._seen = found + len(text)
        return between

    def wait(self) -> int:
        """Read to the end; the exit code."""
        deadline = time.monotonic() + 20
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(20)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._main], [], [], max(seconds, 0))[0]:
            return False
        try:
            data = os.read(self._main, 65536)
        except OSError:
            # EIO: the program, the last one with the inner end, is gone.
            return False
        self.shown += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)
