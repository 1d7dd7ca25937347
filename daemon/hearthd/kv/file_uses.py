"""When each stored file was last of use: exact while the process lives, and over restarts to the hour.

A use is most often one of memory, and the disk hears nothing of it; but who goes first when a card is full is judged by
use. So uses are noted here, and a file's time of change tells them to the next process. It is written to the card once
an hour and file at most, and only by threads that are about to write or read there anyway, or at the end. A power cut
loses what was noted since.

Knows no tokens. By the clock on the wall, since times of change outlive the process. Made by `disk_writes`, one for all
models; called in any thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

__all__ = ["FileUses"]

_HOUR_SECONDS: Final = 3600.0


class FileUses:
    """Times of last use, by file. For any thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """clock: that of the files' times."""
        self._clock = clock
        self._changing = threading.Lock()
        self._used: dict[Path, float] = {}
        # Those of them that the disk has not been told.
        self._noted: set[Path] = set()

    def note(self, path: Path) -> None:
        """Note that a file, or what stands in memory as well, is of use now. Touches no disk."""
        with self._changing:
            self._used[path] = self._clock()
            self._noted.add(path)

    def last(self, path: Path, changed: float) -> float:
        """Return when a file was last of use. changed: when it was changed, as the disk says."""
        return max(changed, self._used.get(path, changed))

    def forget(self, path: Path) -> None:
        """Note that a file is gone."""
        with self._changing:
            self._used.pop(path, None)
            self._noted.discard(path)

    def write_down(self) -> None:
        """Tell the disk what was noted, where that makes an hour of difference; if it does not take it, no more."""
        with self._changing:
            noted = {path: self._used[path] for path in self._noted}
            self._noted.clear()
        for path, used in noted.items():
            try:
                # An hour in the future is a clock that has been set back since: such a file would stay for ever.
                if abs(used - path.stat(follow_symlinks=False).st_mtime) >= _HOUR_SECONDS:
                    os.utime(path, (used, used), follow_symlinks=False)
            except FileNotFoundError:
                self.forget(path)
            except OSError:
                continue
