"""Freeze the thread of a process that has worked most, and wait until somebody ends the process.

    python3 freeze_thread.py PID

SIGSTOP would stop all threads at once, and with them the event loop that feeds a watchdog. What a debugger does stops
one: the others run on, as they would beside a thread that hangs. In the daemon the busiest thread is the one that runs
the model. Prints when the thread is frozen and when the process is gone. Runs as root inside of the board, on its own
Python.
"""

import ctypes
import os
import sys
import time

# ptrace(2), linux/ptrace.h
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
WALL = 0x40000000  # __WALL: threads too
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def find_busiest(pid: int) -> int:
    """Return the thread with most processor time, the main one aside."""

    def ticks(thread: str) -> int:
        with open(f"/proc/{pid}/task/{thread}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # utime, stime: proc(5)

    return int(max((name for name in os.listdir(f"/proc/{pid}/task") if name != str(pid)), key=ticks))


def ptrace(request: int, thread: int) -> None:
    """Do what is asked. Raises OSError."""
    if libc.ptrace(request, thread, None, None) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> None:
    """Freeze, tell, wait, tell."""
    pid = int(sys.argv[1])
    thread = find_busiest(pid)
    ptrace(PTRACE_SEIZE, thread)
    ptrace(PTRACE_INTERRUPT, thread)
    os.waitpid(thread, WALL)
    began = time.monotonic()
    print(f"thread {thread} of process {pid} is frozen", flush=True)
    os.waitpid(thread, WALL)
    print(f"ended after {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
