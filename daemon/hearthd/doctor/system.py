"""The machine as the checks ask for it: files below a root, programs, free space, the kernel's word on its clock.

One place, so that tests can give another root and other answers. Judges nothing.
"""

import ctypes
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["System"]

_PATIENCE_SECONDS: Final = 5.0
# adjtimex(2): the first field of struct timex selects what is set; 0 sets nothing. The struct is smaller than this.
_TIMEX_BYTES: Final = 512
_TIME_ERROR: Final = 5
_MAX_FILE_BYTES: Final = 2**20


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _is_clock_synchronised() -> bool | None:
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    return None if state < 0 else state != _TIME_ERROR


def _free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


@dataclass(frozen=True, slots=True)
class System:
    """A machine. run: a program's output, None if it is not there or fails."""

    root: Path = Path("/")
    run: Callable[[Sequence[str]], str | None] = _run
    is_clock_synchronised: Callable[[], bool | None] = _is_clock_synchronised
    """None: the kernel does not say."""
    free_bytes: Callable[[Path], int] = _free_bytes

    def path(self, absolute: str) -> Path:
        """Return where a file of this machine stands."""
        return self.root / absolute.lstrip("/")

    def read(self, absolute: str) -> str | None:
        """Return a file's text without the white space around it; None if it cannot be read."""
        try:
            with self.path(absolute).open("rb") as file:
                return file.read(_MAX_FILE_BYTES).decode(errors="replace").strip(" \n\0")
        except OSError:
            return None

    def find(self, pattern: str) -> list[str]:
        """Return the absolute paths that match a pattern, sorted."""
        return sorted(f"/{path.relative_to(self.root)}" for path in self.root.glob(pattern.lstrip("/")))
