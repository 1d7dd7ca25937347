"""A worker process as the controller sees it: one request, one answer, within a time.

Knows the framing of the protocol in `worker.py`, no measurement. Called by `contest.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class EngineError(Exception):
    """An engine could not do what was asked: one line with the reason. `alive` tells whether its process goes on."""

    def __init__(self, reason: str, *, alive: bool) -> None:
        super().__init__(reason)
        self.alive = alive


class EngineProcess:
    """One worker, asleep but while it answers. Ends with the pipe, and so with the controlling process."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: dict[str, str] | None = None) -> None:
        """Start it. log: the file for what its libraries write. Raises OSError when there is no such program."""
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
        assert self._process.stdout is not None
        self._answers = self._process.stdout.fileno()
        os.set_blocking(self._answers, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._answers, selectors.EVENT_READ)
        self._unread = b""

    def ask(self, seconds: float, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer. Raises EngineError; the process is ended unless it is `alive`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure(f"the process ended before {request['call']!r}") from None
        answer = json.loads(self._line(seconds, request["call"]))
        if "error" in answer:
            raise EngineError(str(answer["error"]), alive=True)
        assert isinstance(answer, dict)
        return answer

    def _line(self, seconds: float, call: str) -> bytes:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise self._failure(f"{call!r} took longer than {seconds:g} s")
            if not (part := os.read(self._answers, 1 << 16)):
                raise self._failure(f"the process ended in {call!r}")
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _failure(self, reason: str) -> EngineError:
        code = self.close()
        if code is not None and code < 0:
            reason += f" (signal {-code})"
        elif code:
            reason += f" (exit code {code})"
        return EngineError(reason, alive=False)

    def close(self) -> int | None:
        """End the process; return the exit code that it had by itself, or None."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            # One that has ended its side of the pipe is at its end, or it is still computing and is stopped.
            code = self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            code = None
            self._process.kill()
            self._process.wait()
        self._selector.close()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        return code

    def quit(self) -> None:
        """Let the process end by itself."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b'{"call": "quit"}\n')
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.quit()
