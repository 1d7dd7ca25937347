"""Prefixes on disk: the KV of prompts' beginnings that must not be computed again after a restart.

Each is a file, named for the model, its number of tokens and its key, which is a hash of model, identity and token ids.
What is damaged, readable by others or not ours is removed when it is met. The least recently used go when all take more
than their share. A disk that takes nothing costs nobody an answer: it is said once, and tried again later.

Knows no slots and no runner. `find` and its like are for the inference thread and touch no disk; the rest runs in the
threads of `loading` and `saving`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from hearthd.durable_file import replace_file
from hearthd.kv.disk_wait import DiskWait
from hearthd.kv.disk_writes import DiskWrites
from hearthd.kv.prefix_directory import PrefixDirectory
from hearthd.kv.prefix_file import DamagedPrefixError, file_size, is_ours, read_chunks, written

__all__ = ["PrefixStore", "StoredPrefix"]

_logger = logging.getLogger(__name__)

# A disk that was full or broken is left in peace for so long.
_RETRY_SECONDS: Final = 600.0
# A disk that takes nothing for so long hangs; a slow card may need some seconds for a file.
_HANGS_SECONDS: Final = 30.0
# What is left free of a disk: others need it more.
_MARGIN_BYTES: Final = 32 * 2**20
# Of a token id, as it is hashed.
_ID_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """One prefix: of how many tokens, under which key."""

    num_tokens: int
    key: bytes


class PrefixStore:
    """The prefixes of one model in a directory, which other models of the daemon may share."""

    def __init__(
        self,
        directory: Path,
        fingerprint: bytes,
        token_bytes: int,
        *,
        max_bytes: int,
        writes: DiskWrites | None = None,
        margin_bytes: int = _MARGIN_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """fingerprint: of everything that KV depends on beside identity and tokens. token_bytes: of a token's KV.

        writes: the books of all stores of this process that write there.

        A directory that cannot be used is told in one line; the store is empty then, and stays so.
        """
        self._fingerprint = hashlib.sha256(fingerprint).digest()
        self._model = self._fingerprint[:8].hex()
        self._token_bytes = token_bytes
        self._max_bytes = max_bytes
        self._writes = writes or DiskWrites()
        self._directory = PrefixDirectory(directory, self._writes)
        self._margin_bytes = margin_bytes
        self._clock = clock
        self._retry_at = 0.0
        # A thread that has waited for the disk in vain.
        self._hanging: threading.Thread | None = None
        # Of the thread that writes, of which there is one at a time.
        self._writing = DiskWait(clock)
        self._has_told_hanging = False
        # Keys by number of tokens. Threads replace entries; `find` reads.
        self._index: dict[int, frozenset[bytes]] = {}
        self._changing = threading.Lock()
        self._problem: str | None = None
        self.num_hits = 0
        """Prefixes that were read and used."""
        self.num_tokens_read = 0
        """Of them."""
        self.num_saved = 0
        self.num_removed = 0
        """Files that were damaged, foreign or open to others."""
        self._open()

    @property
    def problem(self) -> str | None:
        """What is wrong with the disk, in plain words; None if nothing is. For any thread."""
        return _problem("stored", "the disk hangs") if self._hangs_in_writing else self._problem

    @property
    def stored_bytes(self) -> int:
        """Of all files that are there, as of the last look."""
        return self._directory.stored_bytes

    def find(self, prompt_ids: Sequence[int], identities: Sequence[tuple[str, int]], least: int) -> StoredPrefix | None:
        """Return the longest prefix of a prompt that is stored, of at least so many tokens.

        identities: each with the tokens of the prompt that may be looked for under it.
        """
        most = max((num for _, num in identities), default=0)
        lengths = sorted(num for num, keys in list(self._index.items()) if keys and num <= most)
        if not lengths or not self._can_read:
            return None
        found: StoredPrefix | None = None
        token_bytes = _to_bytes(prompt_ids[: lengths[-1]])
        for identity, limit in identities:
            # Each length's key is the hash of what the shorter one's is, and some tokens more.
            hashed, start = self._hash_of(identity), 0
            for num_tokens in lengths:
                if num_tokens > limit:
                    break
                end = num_tokens * _ID_BYTES
                hashed.update(token_bytes[start:end])
                start = end
                if num_tokens < least or (found is not None and num_tokens <= found.num_tokens):
                    continue
                key = hashed.copy().digest()
                if key in self._index.get(num_tokens, ()):
                    found = StoredPrefix(num_tokens, key)
        return found

    def key(self, identity: str, token_ids: Sequence[int]) -> bytes:
        """Return the name of a prefix."""
        hashed = self._hash_of(identity)
        hashed.update(_to_bytes(token_ids))
        return hashed.digest()

    def _hash_of(self, identity: str) -> hashlib._Hash:
        name = identity.encode()
        return hashlib.sha256(self._fingerprint + len(name).to_bytes(4, "little") + name)

    def has(self, prefix: StoredPrefix) -> bool:
        """Whether a prefix is stored."""
        return prefix.key in self._index.get(prefix.num_tokens, ())

    def note_use(self, prefix: StoredPrefix) -> None:
        """Note that a stored prefix is of use to a prompt, wherever that finds it."""
        self._writes.uses.note(self._path(prefix))

    def takes(self, num_tokens: int) -> bool:
        """Whether a prefix of so many tokens can be stored now, as far as is known."""
        if self._hangs_in_writing:
            if not self._has_told_hanging:
                self._has_told_hanging = True
                self._tell("stored", "the disk hangs")
            return False
        is_rested = self._problem is None or self._clock() >= self._retry_at
        size = file_size(num_tokens, self._token_bytes)
        return is_rested and size <= self._max_bytes and self._writes.allows(size)

    def note_hanging(self, thread: threading.Thread, reason: str = "the disk hangs") -> None:
        """Note that too little comes from the disk to a thread: it is asked for nothing more until that has ended."""
        self._hanging = thread
        self._note_problem("read", reason)

    @property
    def _hangs_in_writing(self) -> bool:
        return self._writing.lasting > _HANGS_SECONDS

    @property
    def _can_read(self) -> bool:
        return self._hanging is None or (self._clock() >= self._retry_at and not self._hanging.is_alive())

    # In the threads of `loading` and `saving`.

    def read(self, prefix: StoredPrefix) -> Iterator[bytes]:
        """Yield the KV of a prefix, chunk by chunk. Raises DamagedPrefixError or OSError, and forgets it then."""
        path = self._path(prefix)
        try:
            yield from read_chunks(path, prefix.key, prefix.num_tokens, self._token_bytes)
        except DamagedPrefixError as error:
            _logger.warning("a stored prefix is damaged (%s) and was removed", error)
            self.num_removed += 1
            self._writes.remove(path)
            self._forget(prefix)
            raise
        except OSError:
            self._forget(prefix)
            raise
        if self._hanging is not None and self._can_read:
            self._hanging = self._problem = None
        self._writes.uses.note(path)
        self._writes.uses.write_down()

    def write(self, prefix: StoredPrefix, chunks: Iterable[bytes]) -> None:
        """Store a prefix. A disk that does not take it is told once; whatever `chunks` raises leaves nothing behind."""
        size, path = file_size(prefix.num_tokens, self._token_bytes), self._path(prefix)
        if not self._writes.begin(path, size):
            return
        self._writing.begin()
        try:
            self._make_room()
            status = os.statvfs(self._directory.path)
            if status.f_bavail * status.f_frsize < size + self._margin_bytes:
                raise OSError(None, "the disk is nearly full")
            pieces = written(prefix.key, prefix.num_tokens, self._token_bytes, self._writing.writing(chunks))
            replace_file(path, self._writes.count(path, pieces))
        except OSError as error:
            self._note_problem("stored", error.strerror)
            return
        finally:
            self._writing.end()
            self._has_told_hanging = False
            self._writes.end(path)
        self._problem = None
        self.num_saved += 1
        self._remember(prefix)

    def write_down_uses(self) -> None:
        """Tell the disk which prefixes were of use, for the next process."""
        self._writes.uses.write_down()

    def _open(self) -> None:
        try:
            self._directory.open()
            for file in self._directory.files():
                is_mine = file.model == self._model
                is_whole = not is_mine or file.status.st_size == file_size(file.num_tokens, self._token_bytes)
                if file.is_half or not is_ours(file.status) or not is_whole:
                    self.num_removed += self._writes.remove(file.path)
                elif is_mine:
                    self._remember(StoredPrefix(file.num_tokens, file.key))
            self._make_room()
        except OSError as error:
            self._note_problem("stored", error.strerror)
        if self.num_removed:
            _logger.warning("%d files of stored prefixes were damaged or not ours, and were removed", self.num_removed)

    def _note_problem(self, what: str, reason: str | None) -> None:
        self._retry_at = self._clock() + _RETRY_SECONDS
        if self._problem is None:
            self._tell(what, reason)
        self._problem = _problem(what, reason)

    def _tell(self, what: str, reason: str | None) -> None:
        _logger.warning("prefixes cannot be %s in %s: %s", what, self._directory.path, reason)

    def _make_room(self) -> None:
        """Keep within the limit. Raises OSError."""
        for file in self._directory.make_room(self._max_bytes):
            if file.model == self._model:
                self._forget(StoredPrefix(file.num_tokens, file.key))

    def _path(self, prefix: StoredPrefix) -> Path:
        return self._directory.file_of(self._model, prefix.num_tokens, prefix.key)

    def _remember(self, prefix: StoredPrefix) -> None:
        with self._changing:
            self._index[prefix.num_tokens] = self._index.get(prefix.num_tokens, frozenset()) | {prefix.key}

    def _forget(self, prefix: StoredPrefix) -> None:
        with self._changing:
            self._index[prefix.num_tokens] = self._index.get(prefix.num_tokens, frozenset()) - {prefix.key}


def _problem(what: str, reason: str | None) -> str:
    return (
        f"cache.directory: prompts' beginnings cannot be {what} ({reason}); answers are right all the same, and "
        "slower after a restart"
    )


def _to_bytes(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, np.int32).tobytes()
