"""SIGTERM and SIGINT, heard even if the event loop hangs.

Python runs signal handlers between two steps of the main thread, and asyncio's between two turns of its loop: a daemon
whose loop is stuck would hear neither. Here the interpreter's C handler writes the signal's number to a pipe, and a
thread that waits there passes it on and sets the clock for a hard exit. That clock is faulthandler's, a C thread that
does not need the interpreter's lock; it writes where every thread stands before it ends the process.

Knows no gRPC. Called by `__main__`.
"""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable
from typing import Final

__all__ = ["HARD_EXIT_CODE", "listen_for_stop"]

HARD_EXIT_CODE: Final = 1
"""faulthandler's; it cannot be chosen."""
_STDERR: Final = 2
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def listen_for_stop(on_stop: Callable[[], object], *, hard_exit_seconds: float) -> None:
    """Call on_stop, in another thread, at each signal; end the process that many seconds after the first one.

    To be called in the main thread, once, for the rest of the process's life.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(read_end, True)
    for number in _SIGNALS:
        # Only so that the signal does not end the process; what counts is the byte in the pipe.
        signal.signal(number, lambda _number, _frame: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(read_end, on_stop, hard_exit_seconds), name="signals", daemon=True).start()


def _listen(read_end: int, on_stop: Callable[[], object], hard_exit_seconds: float) -> None:
    is_first = True
    while True:
        numbers = os.read(read_end, 64)
        if not any(number in numbers for number in _SIGNALS):
            continue
        if is_first:
            faulthandler.dump_traceback_later(hard_exit_seconds, exit=True, file=_STDERR)
            is_first = False
        on_stop()
