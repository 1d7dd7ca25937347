"""The directory of stored prefixes: what is in it, who may look, and what goes when all take more than their share.

A file is named for the model, its number of tokens and its key; one of another name is left alone. Whoever sees names
and times can tell when something was asked, and how much: so the directory is its owner's alone.

Knows no tokens and no KV. Every call but `path` waits for the disk. Called by `prefix_store`.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hearthd.kv.disk_writes import DiskWrites

__all__ = ["PrefixDirectory", "StoredFile"]

_logger = logging.getLogger(__name__)

_NAME: Final = re.compile(r"([0-9a-f]{16})-([0-9]{1,7})-([0-9a-f]{64})\.kv(\.new)?")
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file, as its name and the disk say."""

    path: Path
    status: os.stat_result
    model: str
    num_tokens: int
    key: bytes
    is_half: bool
    """Whether it is still being written, or was left so."""


class PrefixDirectory:
    """A directory that all models of a daemon share."""

    def __init__(self, path: Path, writes: DiskWrites) -> None:
        self.path = path
        self._writes = writes
        self.stored_bytes = 0
        """Of all files that are there, as of the last `make_room`."""

    def open(self) -> None:
        """Make the directory. One that others may look into is closed, or told of. Raises OSError."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self.path.stat()
        if not status.st_mode & _OTHERS:
            return
        reason = None
        if status.st_uid != os.geteuid():
            reason = "it is another user's"
        elif not all(_NAME.fullmatch(name) for name in os.listdir(self.path)):
            # Somebody may need it as it is, such as /tmp.
            reason = "there are other files in it"
        mode = stat.S_IMODE(status.st_mode)
        if reason is None:
            self.path.chmod(0o700)
            _logger.info("cache.directory %s was open to others (mode %04o), and is not any more", self.path, mode)
        else:
            _logger.warning(
                "cache.directory %s is open to others (mode %04o), and stays so since %s: they can see how long "
                "prompts are, and when they came; name a directory of its own",
                self.path,
                mode,
                reason,
            )

    def file_of(self, model: str, num_tokens: int, key: bytes) -> Path:
        """Return the file of a prefix, whether it is there or not."""
        return self.path / f"{model}-{num_tokens}-{key.hex()}.kv"

    def files(self) -> Iterator[StoredFile]:
        """Yield what is there. Raises OSError."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                found = _NAME.fullmatch(entry.name)
                if found is None:
                    continue
                with suppress(FileNotFoundError):  # it was another daemon's
                    status = entry.stat(follow_symlinks=False)
                    num_tokens, key = int(found[2]), bytes.fromhex(found[3])
                    yield StoredFile(Path(entry.path), status, found[1], num_tokens, key, found[4] is not None)

    def make_room(self, max_bytes: int) -> list[StoredFile]:
        """Remove the least recently used until all are within the limit, with what is being written; return them.

        Raises OSError.
        """
        self._writes.uses.write_down()
        files = [file for file in self.files() if not self._writes.is_writing(file.path)]
        files.sort(key=lambda file: self._writes.uses.last(file.path, file.status.st_mtime))
        total = sum(file.status.st_size for file in files) + self._writes.pending_bytes
        gone = []
        for file in files:
            if total <= max_bytes:
                break
            self._writes.remove(file.path)
            total -= file.status.st_size
            gone.append(file)
        self.stored_bytes = total
        return gone
