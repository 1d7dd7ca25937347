"""A thread's name as the kernel knows it: `top -H` and `ps -T` show which one works.

Called by `inference_thread`, and by the threads that the inference thread begins, which would have its name.
"""

from contextlib import suppress
from pathlib import Path

__all__ = ["name_this_thread"]


def name_this_thread(name: str) -> None:
    """Name the calling thread. Threads that it begins later inherit the name."""
    with suppress(OSError):
        Path("/proc/thread-self/comm").write_text(name)
