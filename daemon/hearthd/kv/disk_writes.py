"""What all models of a daemon write into the prefixes' directory: which files at this moment, and how much in a day.

A card wears out by writing, and any caller can think of new prompts: so there is a most of bytes within any 24 hours,
by the monotonic clock, as long as the process lives. And one model's store leaves another one's half-written file
alone, and knows by `file_uses` which files were of use. Knows no tokens. Made by `__main__`, one for the process;
called by `prefix_store`, in any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hearthd.kv.file_uses import FileUses

__all__ = ["DiskWrites"]

_logger = logging.getLogger(__name__)

_HOUR_SECONDS: Final = 3600
_HOURS_OF_A_DAY: Final = 24


@dataclass(slots=True)
class _Write:
    size: int
    """Of the file, once it is whole."""
    left: int
    """Of it, what is not written yet."""


class DiskWrites:
    """The books of what is written. For any thread."""

    def __init__(
        self,
        max_bytes_per_day: int = 0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """max_bytes_per_day: in any 24 hours; 0: no limit. wall_clock: that of the files' times."""
        self.uses = FileUses(wall_clock)
        self._max_bytes_per_day = max_bytes_per_day
        self._clock = clock
        self._changing = threading.Lock()
        self._writes: dict[Path, _Write] = {}
        # Files that are being removed, which is not done under the lock: a disk may hang in it, and no step waits.
        self._removals: set[Path] = set()
        # Bytes by hour: of this one and of the 24 before it, which every 24 hours that end now lie in.
        self._written: dict[int, int] = {}
        self._has_told = False

    @property
    def pending_bytes(self) -> int:
        """Of the files that are being written, once they are whole."""
        with self._changing:
            return sum(write.size for write in self._writes.values())

    def allows(self, size: int) -> bool:
        """Whether a file of so many bytes may be written now. If not, that is told, once until one is written again."""
        with self._changing:
            return self._allows(size)

    def begin(self, path: Path, size: int) -> bool:
        """Set so many bytes aside for a file; False if they are too many, or it is being written or removed already."""
        with self._changing:
            if path in self._writes or path in self._removals or not self._allows(size):
                return False
            self._writes[path] = _Write(size, size)
            self._has_told = False
            return True

    def count(self, path: Path, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Hand on the pieces of a file that has begun, and count them."""
        for piece in pieces:
            with self._changing:
                self._writes[path].left -= len(piece)
                hour = self._forget_old()
                self._written[hour] = self._written.get(hour, 0) + len(piece)
            yield piece

    def end(self, path: Path) -> None:
        """Note that a file is whole, or never will be."""
        with self._changing:
            del self._writes[path]

    def is_writing(self, path: Path) -> bool:
        """Whether a file, or what is to become it, is being written."""
        with self._changing:
            return self._final(path) in self._writes

    def remove(self, path: Path) -> bool:
        """Remove a file unless it is being written, or removed already; return whether it may be gone."""
        final = self._final(path)
        with self._changing:
            if final in self._writes or final in self._removals:
                return False
            self._removals.add(final)
        try:
            with suppress(OSError):
                path.unlink()
            self.uses.forget(path)
        finally:
            with self._changing:
                self._removals.remove(final)
        return True

    @staticmethod
    def _final(path: Path) -> Path:
        return path.with_suffix("") if path.suffix == ".new" else path

    def _allows(self, size: int) -> bool:
        self._forget_old()
        total = sum(self._written.values()) + sum(write.left for write in self._writes.values())
        if not self._max_bytes_per_day or total + size <= self._max_bytes_per_day:
            return True
        if not self._has_told:
            self._has_told = True
            _logger.info(
                "cache.max_bytes_per_day is %d, and %d were written: further prompts' beginnings are stored later",
                self._max_bytes_per_day,
                total,
            )
        return False

    def _forget_old(self) -> int:
        hour = int(self._clock() // _HOUR_SECONDS)
        for each in [each for each in self._written if each < hour - _HOURS_OF_A_DAY]:
            del self._written[each]
        return hour
