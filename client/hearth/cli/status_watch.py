"""`hearth status --watch`: the status again and again, until Ctrl-C.

On a terminal it stands in one place and changes; a pipe or a file gets a line for each moment, or a JSON object. A
daemon that goes away is waited for. Called by `status`.
"""

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Protocol

from hearth._client import Client
from hearth._errors import DeadlineError, InternalError, LimitExceededError, UnavailableError
from hearth._status import DaemonStatus
from hearth.cli.status_lines import Rates, describe, describe_in_a_line, rates_between
from hearth.cli.terminal import Screen, neutralise_line

# What may pass by itself, and is waited for.
_PASSING = (UnavailableError, LimitExceededError, DeadlineError, InternalError)
_INTERRUPTED = 130
# The longest that a daemon may ask to be left in peace without the screen growing old.
_MAX_RETRY_SECONDS = 60.0


def watch(client: Client, screen: Screen, *, interval: float, as_json: bool) -> int:
    """Show the status each `interval` seconds; return the exit code when Ctrl-C was pressed.

    Raises HearthError if the first call fails, or a later one for good: a token that is not valid any more.
    """
    show: _View = _Objects(screen) if as_json else _InPlace(screen) if screen.can_redraw else _Lines(screen)
    last: DaemonStatus | None = None
    is_away = False
    with _noting_interrupt() as interrupted:
        while not interrupted.is_set():
            wait = interval
            try:
                status = client.status()
            except _PASSING as error:
                if last is None:
                    raise
                if not is_away:
                    show.tell(f"{error}; waiting for it")
                is_away = True
                retry_after = getattr(error, "retry_after", None) or 0.0
                wait = max(interval, min(retry_after, _MAX_RETRY_SECONDS))
            else:
                if last and status.uptime_seconds < last.uptime_seconds:
                    show.tell(f"the daemon was restarted, {time.strftime('%H:%M:%S')}")
                elif is_away:
                    show.tell(f"the daemon answers again, {time.strftime('%H:%M:%S')}")
                show.show(client.address, status, rates_between(last, status) if last else None)
                last, is_away = status, False
            interrupted.wait(min(wait, threading.TIMEOUT_MAX))
    screen.end_line()
    return _INTERRUPTED


class _View(Protocol):
    """A way to show one status after another, and what no status says."""

    def show(self, address: str, status: DaemonStatus, rates: Rates | None) -> None: ...

    def tell(self, what: str) -> None: ...


class _InPlace:
    """On a terminal: the last status where the one before it stood, with the last remark below."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._lines: list[str] = []
        self._remark = ""

    def show(self, address: str, status: DaemonStatus, rates: Rates | None) -> None:
        self._lines = describe(address, status, rates)
        self._draw()

    def tell(self, what: str) -> None:
        self._remark = what
        self._draw()

    def _draw(self) -> None:
        remark = [f"{'note':<8}{neutralise_line(self._remark)}"] if self._remark else []
        self._screen.redraw([*self._lines, *remark], shutil.get_terminal_size())


class _Lines:
    """In a pipe: a line for each moment, with its time."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def show(self, _address: str, status: DaemonStatus, rates: Rates | None) -> None:
        self.tell(describe_in_a_line(status, rates))

    def tell(self, what: str) -> None:
        self._screen.write(f"{time.strftime('%H:%M:%S')} {neutralise_line(what)}\n")


class _Objects:
    """An object of JSON for each moment, in a line; remarks go to stderr."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def show(self, address: str, status: DaemonStatus, rates: Rates | None) -> None:
        fields = {"address": address, **asdict(status), "rates": asdict(rates) if rates else None}
        self._screen.write(json.dumps(fields, ensure_ascii=not self._screen.encoding_is_unicode) + "\n")

    def tell(self, what: str) -> None:
        self._screen.error(what)


@contextmanager
def _noting_interrupt() -> Iterator[threading.Event]:
    """While the block runs, the first Ctrl-C sets the event; a second one interrupts as usual.

    A KeyboardInterrupt could break in anywhere, in the middle of gRPC or of half a screen.
    """
    happened = threading.Event()

    def note(_signal: int, _frame: FrameType | None) -> None:
        if happened.is_set():
            raise KeyboardInterrupt
        happened.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield happened
    finally:
        signal.signal(signal.SIGINT, before)
