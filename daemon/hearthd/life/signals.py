"""SIGTERM, SIGINT and SIGHUP, heard even if the event loop hangs.

Python runs signal handlers between two steps of the main thread, and asyncio's between two turns of its loop: a daemon
whose loop is stuck would hear neither. Here the interpreter's C handler writes the signal's number to a pipe, and a
thread that waits there passes it on and sets the clock for a hard exit. That clock is faulthandler's, a C thread that
does not need the interpreter's lock; it writes where every thread stands before it ends the process. So does SIGABRT,
with which systemd's watchdog ends a daemon that is stuck: files, lines and functions, no values.

SIGHUP asks for the configuration to be read again. Where somebody watches the daemon on a terminal it means what it
always did, that the terminal is gone, and ends the daemon too.

Knows no gRPC. Called by `__main__`.
"""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["HARD_EXIT_CODE", "listen_for_signals"]

HARD_EXIT_CODE: Final = 1
"""faulthandler's; it cannot be chosen."""
_STDIN: Final = 0
_STDERR: Final = 2
_STOP: Final = (signal.SIGTERM, signal.SIGINT)


def listen_for_signals(
    on_stop: Callable[[], object], on_reload: Callable[[], object], *, hard_exit_seconds: float
) -> None:
    """Call on_stop, in another thread, at each signal to stop; end the process that many seconds after the first one.

    on_reload: called likewise, at each SIGHUP.
    To be called in the main thread, once, for the rest of the process's life.
    """
    faulthandler.enable(file=_STDERR)
    stop = (*_STOP, signal.SIGHUP) if os.isatty(_STDIN) else _STOP
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(read_end, True)
    for number in (*_STOP, signal.SIGHUP):
        # Only so that the signal does not end the process; what counts is the byte in the pipe.
        signal.signal(number, lambda _number, _frame: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    arguments = (read_end, stop, on_stop, on_reload, hard_exit_seconds)
    threading.Thread(target=_listen, args=arguments, name="signals", daemon=True).start()


def _listen(
    read_end: int,
    stop: Sequence[int],
    on_stop: Callable[[], object],
    on_reload: Callable[[], object],
    hard_exit_seconds: float,
) -> None:
    is_first = True
    while True:
        numbers = os.read(read_end, 64)
        if signal.SIGHUP in numbers and signal.SIGHUP not in stop:
            on_reload()
        if not any(number in numbers for number in stop):
            continue
        if is_first:
            faulthandler.dump_traceback_later(hard_exit_seconds, exit=True, file=_STDERR)
            is_first = False
        on_stop()
