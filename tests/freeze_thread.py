"""Freeze one thread of another process, from outside and wherever it is: its other threads go on.

    python3 freeze_thread.py PID [THREAD]

THREAD is the kernel's name of it (`ps -T -p PID`), `inference` if it is left out: the one that runs hearthd's model.
Says `frozen TID` when the thread stands still, and holds it until its own standard input ends or it is killed; then the
thread goes on where it was. Says `gone TID` and ends if the process is ended meanwhile. Needs the right to trace the
process: its user, or root. For a service, `systemctl show --property MainPID --value hearthd` has the PID.

Standard library alone, and no debugger: the tests run it here, and the emulated board does with its own Python.
"""

import ctypes
import os
import sys
import threading
from pathlib import Path

# ptrace(2), waitpid(2): the same numbers on x86-64 and Arm.
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_WALL = 0x40000000


def find_thread(pid: int, name: str) -> int:
    for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda task: int(task.name)):
        if (task / "comm").read_text().strip() == name:
            return int(task.name)
    raise SystemExit(f"process {pid} has no thread {name}; see: ps -T -p {pid}")


def freeze(tid: int) -> None:
    """Stop a thread for as long as this process lives: the kernel lets it go when its tracer is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    for request in (_SEIZE, _INTERRUPT):
        if libc.ptrace(ctypes.c_long(request), ctypes.c_long(tid), None, None):
            raise SystemExit(f"thread {tid} cannot be traced: {os.strerror(ctypes.get_errno())}")
    os.waitpid(tid, _WALL)


def release_at_end_of_input() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    pid, name = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "inference"
    tid = find_thread(pid, name)
    freeze(tid)
    print(f"frozen {tid}", flush=True)
    threading.Thread(target=release_at_end_of_input, daemon=True).start()
    # Somebody must take note of a traced thread's death: until then its process stays, dead, and nobody hears of it.
    while not os.WIFSIGNALED(status := os.waitpid(tid, _WALL)[1]) and not os.WIFEXITED(status):
        pass
    print(f"gone {tid}", flush=True)


if __name__ == "__main__":
    main()
