"""The audit log's file: one JSON object a line, of bounded size, and never in the way of serving.

Lines go through a bounded queue to a thread that writes them, and writes them through to the disk once a second at
most: a power cut takes the last second. A full or dead disk costs lines, which are counted, and the next line that can
be written says how many; calls go on. At max_bytes the file becomes FILE.1, that one FILE.2, and the oldest goes. A
file that somebody else has moved away (logrotate) is begun anew.

Knows no gRPC, and nothing of what the lines say. Called by `audit`.
"""

import errno
import json
import logging
import os
import queue
import stat
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from hearthd.durable_file import sync_directory
from hearthd.errors import ConfigError

__all__ = ["AuditLog", "check_audit_file"]

_logger = logging.getLogger(__name__)

_MAX_WAITING: Final = 4096
_SYNC_SECONDS: Final = 1.0
_CLOSE_SECONDS: Final = 1.0
# While lines cannot be written, also without new ones: the status tells of it until it is over.
_RETRY_SECONDS: Final = 10.0

Line = Mapping[str, object]


def check_audit_file(path: Path) -> None:
    """Raise ConfigError for a path that can be no audit log; makes none."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, PermissionError):
        # The daemon makes it, and may look where whoever asks may not.
        return
    except OSError as error:
        raise ConfigError(f"audit file {path} cannot be written: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise ConfigError(
            f"audit file {path} cannot be written: it is there and no regular file; give audit.file another path"
        )


class AuditLog:
    """Writes lines to a file of mode 0600. `write` is for any thread and never waits."""

    def __init__(self, path: Path, *, max_bytes: int, num_old_files: int) -> None:
        """max_bytes: of the file, and of each of the old ones. Raises ConfigError if it cannot be written."""
        check_audit_file(path)
        self._path = path
        self._max_bytes = max_bytes
        self._num_old_files = num_old_files
        self._waiting: queue.Queue[Line | None] = queue.Queue(_MAX_WAITING)
        self.num_lost = 0
        """Lines since the start that could not be written."""
        self._num_lost = 0
        self._trouble: str | None = None
        self._descriptor: int | None = None
        self._is_closing = threading.Event()
        try:
            self._open()
        except OSError as error:
            raise ConfigError(f"audit file {path} cannot be written: {error.strerror}") from None
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def find_problem(self) -> str | None:
        """Return that lines are being lost and what helps; None if they are written. Names no path."""
        trouble, num_lost = self._trouble, self._num_lost
        if trouble is None and num_lost == 0:
            return None
        return (
            f"audit.file cannot be written ({trouble or 'the disk does not answer'}), calls go on and {num_lost} lines "
            "are lost so far; make room or put the disk right, `hearthd doctor` helps"
        )

    def write(self, line: Line) -> None:
        """Let a line be written, soon."""
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._num_lost += 1
            self.num_lost += 1

    def close(self) -> None:
        """Write what waits, and end; within two seconds, whatever the disk does."""
        self._is_closing.set()
        try:
            self._waiting.put(None, timeout=_CLOSE_SECONDS)
        except queue.Full:
            return
        self._thread.join(_CLOSE_SECONDS)

    # In the thread.

    def _run(self) -> None:
        is_open = True
        while is_open:
            lines = self._next_lines()
            is_open = None not in lines
            self._write_lines([line for line in lines if line is not None])
            # Those that come meanwhile are written through together: an SD card wears with each time.
            self._is_closing.wait(_SYNC_SECONDS)
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _next_lines(self) -> list[Line | None]:
        """Wait for lines; none if it is time to try again."""
        try:
            lines = [self._waiting.get(timeout=None if self._trouble is None else _RETRY_SECONDS)]
        except queue.Empty:
            return []
        while len(lines) < _MAX_WAITING and not self._waiting.empty():
            lines.append(self._waiting.get())
        return lines

    def _write_lines(self, lines: list[Line]) -> None:
        lost, self._num_lost = self._num_lost, 0
        if lost:
            lines = [{"lost": lost}, *lines]
        written = [json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines]
        try:
            while written:
                descriptor = self._ready()
                room = self._max_bytes - os.fstat(descriptor).st_size
                num = _count_fitting(written, room)
                if num == 0:
                    self._rotate()
                    continue
                _append(descriptor, b"".join(written[:num]))
                del written[:num]
        except OSError as error:
            num_new = len(written) - (1 if lost else 0)
            self._num_lost += lost + num_new
            self.num_lost += max(num_new, 0)
            before, self._trouble = self._trouble, error.strerror or "unknown"
            if before is None:
                _logger.error("audit file %s cannot be written, calls go on: %s", self._path, error.strerror)
        else:
            before, self._trouble = self._trouble, None
            if before is not None:
                _logger.warning("audit file %s is written again", self._path)

    def _ready(self) -> int:
        """Return the descriptor of the file that stands there now. Raises OSError."""
        if self._descriptor is not None:
            try:
                found, ours = os.stat(self._path, follow_symlinks=False), os.fstat(self._descriptor)
            except FileNotFoundError:
                found = None
            if found is not None and (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
                return self._descriptor
            os.close(self._descriptor)
            self._descriptor = None
        return self._open()

    def _open(self) -> int:
        flags = os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self._path, flags, 0o600)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            os.fchmod(descriptor, 0o600)
            if found.st_size and os.pread(descriptor, 1, found.st_size - 1) != b"\n":
                # The power went in the middle of a line.
                os.write(descriptor, b"\n")
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return descriptor

    def _rotate(self) -> None:
        """Let the file become the first of the old ones. A crash in between leaves a gap in the numbers, no more."""
        for number in range(self._num_old_files, 0, -1):
            newer = self._path if number == 1 else self._old(number - 1)
            with suppress(FileNotFoundError):
                newer.replace(self._old(number))
        if self._num_old_files == 0:
            self._path.unlink()
        sync_directory(self._path.parent)

    def _old(self, number: int) -> Path:
        return Path(f"{self._path}.{number}")


def _count_fitting(written: list[bytes], room: int) -> int:
    """Count the lines that fit. No line is longer than an empty file may be: both are bounded."""
    for num, line in enumerate(written):
        room -= len(line)
        if room < 0:
            return num
    return len(written)


def _append(descriptor: int, data: bytes) -> None:
    """Write all of it durably, or nothing. Raises OSError."""
    size = os.fstat(descriptor).st_size
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fdatasync(descriptor)
    except OSError:
        # A full disk takes the first half of a line.
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
