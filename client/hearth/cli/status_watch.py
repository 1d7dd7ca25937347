"""`hearth status --watch`: the status again and again, until Ctrl-C.

On a terminal it stands in one place and changes; a pipe or a file gets a line for each moment, or a JSON object. A
daemon that goes away is waited for. Called by `status`.
"""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
_LOOK_AGAIN_SECONDS = 0.5


def watch(client: Client, screen: Screen, *, interval: float, as_json: bool) -> int:
    """Show the status each `interval` seconds; return the exit code when Ctrl-C was pressed.

    Raises HearthError if the first call fails, or a later one for good: a token that is not valid any more.
    """
    show: _View = _Objects(screen) if as_json else _InPlace(screen) if screen.can_redraw else _Lines(screen)
    last: DaemonStatus | None = None
    is_away = False
    with _hearing_signals() as bell:
        while not bell.is_interrupted:
            wait = interval
            look = _Look(client, bell)
            bell.wait(lambda: look.is_over, math.inf, show.redraw)  # noqa: B023 - not kept
            if not look.is_over:
                # Interrupted while a daemon does not answer.
                client.close()
                look.end()
                break
            if isinstance(look.error, _PASSING):
                if last is None:
                    raise look.error
                if not is_away:
                    show.tell(f"{look.error}; waiting for it")
                is_away = True
                retry_after = getattr(look.error, "retry_after", None) or 0.0
                wait = max(interval, min(retry_after, _MAX_RETRY_SECONDS))
            elif look.error:
                raise look.error
            elif status := look.status:
                if last and status.uptime_seconds < last.uptime_seconds:
                    show.tell(f"the daemon was restarted, {time.strftime('%H:%M:%S')}")
                elif is_away:
                    show.tell(f"the daemon answers again, {time.strftime('%H:%M:%S')}")
                show.show(client.address, status, rates_between(last, status) if last else None)
                last, is_away = status, False
            bell.wait(lambda: False, wait, show.redraw)
    screen.end_interrupted()
    return _INTERRUPTED


class _View(Protocol):
    """A way to show one status after another, and what no status says."""

    def show(self, address: str, status: DaemonStatus, rates: Rates | None) -> None: ...

    def tell(self, what: str) -> None: ...

    def redraw(self) -> None: ...


class _InPlace:
    """On a terminal: the last status where the one before it stood, with the last remark below."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._lines: list[str] = []
        self._remark = ""

    def show(self, address: str, status: DaemonStatus, rates: Rates | None) -> None:
        self._lines = describe(address, status, rates)
        self.redraw()

    def tell(self, what: str) -> None:
        self._remark = what
        self.redraw()

    def redraw(self) -> None:
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

    def redraw(self) -> None:
        """A line that was written stays."""


class _Objects:
    """An object of JSON for each moment, in a line; remarks go to stderr."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def show(self, address: str, status: DaemonStatus, rates: Rates | None) -> None:
        fields = {"address": address, **asdict(status), "rates": asdict(rates) if rates else None}
        self._screen.write(json.dumps(fields, ensure_ascii=not self._screen.encoding_is_unicode) + "\n")

    def tell(self, what: str) -> None:
        self._screen.error(what)

    def redraw(self) -> None:
        """As above."""


class _Bell:
    """Ends waits: an answer has come, Ctrl-C was pressed, or the terminal has another size.

    threading.Event would deadlock if a signal handler set it in the very thread that waits for it: its lock is not
    reentrant, that of a Condition is.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.is_interrupted = False
        self._is_resized = False

    def ring(self) -> None:
        """Let who waits look again."""
        with self._condition:
            self._condition.notify_all()

    def interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        """The first Ctrl-C ends every wait; a second one interrupts as usual.

        A KeyboardInterrupt could break in anywhere, in the middle of half a screen.
        """
        if self.is_interrupted:
            raise KeyboardInterrupt
        self.is_interrupted = True
        self.ring()

    def resize(self, _signal: int, _frame: FrameType | None) -> None:
        """The terminal has another size."""
        self._is_resized = True
        self.ring()

    def wait(self, has_come: Callable[[], bool], seconds: float, redraw: Callable[[], None]) -> None:
        """Wait until something has come, the time is over, or Ctrl-C. redraw: called when the terminal is resized."""
        deadline = time.monotonic() + seconds
        while not (has_come() or self.is_interrupted) and (left := deadline - time.monotonic()) > 0:
            if self._is_resized:
                self._is_resized = False
                redraw()
            with self._condition:
                # A signal between the look and the wait is heard this much later.
                self._condition.wait(min(left, _LOOK_AGAIN_SECONDS))


class _Look:
    """One question for the status, in a thread of its own: Ctrl-C does not wait for a daemon that hangs."""

    def __init__(self, client: Client, bell: _Bell) -> None:
        self.status: DaemonStatus | None = None
        self.error: Exception | None = None
        self.is_over = False
        self._client = client
        self._bell = bell
        self._thread = threading.Thread(target=self._ask, name="hearth-look", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait a moment for the end of a call that is cancelled."""
        self._thread.join(_LOOK_AGAIN_SECONDS)

    def _ask(self) -> None:
        try:
            self.status = self._client.status()
        except Exception as error:  # noqa: BLE001 - raised where it can be told
            self.error = error
        self.is_over = True
        self._bell.ring()


@contextmanager
def _hearing_signals() -> Iterator[_Bell]:
    """While the block runs, Ctrl-C and new sizes of the terminal ring the bell."""
    bell = _Bell()
    heard: dict[int, Callable[[int, FrameType | None], None]] = {signal.SIGINT: bell.interrupt}
    if size_changed := getattr(signal, "SIGWINCH", None):
        heard[size_changed] = bell.resize
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    try:
        yield bell
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
