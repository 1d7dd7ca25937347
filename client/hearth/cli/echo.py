"""The terminal's echo, off while an answer comes, so that what is typed meanwhile does not mix into it.

It is not lost: the next prompt shows and takes it. Only the echo changes; Ctrl-C stays what it is. Called by `chat`.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# These end or stop the program where it stands, without a `finally`.
_LEAVING = ("SIGHUP", "SIGQUIT", "SIGTERM", "SIGTSTP")


@contextmanager
def without_echo() -> Iterator[None]:
    """While the block runs, the terminal does not echo. Does nothing if standard input is none. Main thread only."""
    if os.name != "posix" or not sys.stdin.isatty():
        yield
        return
    echo = _Echo(sys.stdin.fileno())

    def leave(number: int, _frame: FrameType | None) -> None:
        echo.restore()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        # Reached after a stop only, when the program goes on.
        signal.signal(number, leave)
        if is_running:
            echo.switch_off()

    is_running = True
    # What is ignored, as by nohup, stays so.
    numbers = [number for name in _LEAVING if (number := getattr(signal, name, None))]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, leave)
        echo.switch_off()
        yield
    finally:
        is_running = False
        echo.restore()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class _Echo:
    """The echo of the terminal behind a descriptor."""

    def __init__(self, descriptor: int) -> None:
        import termios

        self._termios = termios
        self._descriptor = descriptor
        self._was_on = False

    def switch_off(self) -> None:
        """Turn it off, and remember whether it was on."""
        if self._set(False):
            self._was_on = True

    def restore(self) -> None:
        """Make it what it was."""
        if self._was_on and self._set(True):
            self._was_on = False

    def _set(self, is_on: bool) -> bool:
        """Set it. Returns whether it changed."""
        # A terminal that has gone needs no echo.
        with suppress(OSError, self._termios.error):
            # In the background, the terminal is another program's to set; trying would stop this one.
            if os.tcgetpgrp(self._descriptor) != os.getpgrp():
                return False
            attributes = self._termios.tcgetattr(self._descriptor)
            if bool(attributes[3] & self._termios.ECHO) == is_on:
                return False
            attributes[3] ^= self._termios.ECHO
            # What was typed already stays: not TCSAFLUSH.
            self._termios.tcsetattr(self._descriptor, self._termios.TCSANOW, attributes)
            return True
        return False
