"""A stored prefix on its way into a slot: read and checked in a thread of its own, written by the inference thread.

Only some chunks are in memory at a time, and a disk that hangs or trickles holds up nobody: the prompt is read after
all. Knows no slots. Made by `stored_prefixes`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from hearthd.kv.disk_wait import DiskWait
from hearthd.kv.prefix_file import DamagedPrefixError
from hearthd.kv.prefix_store import PrefixStore, StoredPrefix
from hearthd.thread_name import name_this_thread

__all__ = ["Loading"]

_NUM_CHUNKS: Final = 4
# A disk from which nothing comes for so long will not be faster than the model.
_PATIENCE_SECONDS: Final = 2.0
# And in all so much more for each token: of the default model, a card with 10 MB/s takes half of it.
_PATIENCE_SECONDS_A_TOKEN: Final = 0.002


class Loading:
    """One prefix that is being read. All methods are the inference thread's."""

    def __init__(self, store: PrefixStore, prefix: StoredPrefix, clock: Callable[[], float] = time.monotonic) -> None:
        self.prefix = prefix
        self._store = store
        # Then True if all of them were right, False if not.
        self._chunks: queue.Queue[bytes | bool] = queue.Queue(_NUM_CHUNKS)
        self._is_cancelled = threading.Event()
        # The disk's time alone: what comes while steps of others run is there in time.
        self._wait = DiskWait(clock)
        self._wait.begin()
        self.result: bool | None = None
        """Whether what was taken is right, once that is known."""
        self._thread = threading.Thread(target=self._read, name="prefix-read", daemon=True)
        self._thread.start()

    def take(self, wait_seconds: float) -> Iterator[bytes]:
        """Yield the chunks that are there, in their order; wait so long for the first of them."""
        while self.result is None:
            try:
                item = self._chunks.get(timeout=wait_seconds) if wait_seconds > 0 else self._chunks.get_nowait()
            except queue.Empty:
                self._lose_patience()
                return
            wait_seconds = 0.0
            if isinstance(item, bool):
                self.result = item
            else:
                yield item

    def _lose_patience(self) -> None:
        most = _PATIENCE_SECONDS + self.prefix.num_tokens * _PATIENCE_SECONDS_A_TOKEN
        if self._wait.lasting > _PATIENCE_SECONDS:
            self._store.note_hanging(self._thread)
        elif self._wait.total > most:
            self._store.note_hanging(self._thread, "the disk is slower than the model")
        else:
            return
        self.cancel()

    def cancel(self) -> None:
        """Let the thread end."""
        self._is_cancelled.set()
        # It may be waiting for room.
        with suppress(queue.Empty):
            while True:
                self._chunks.get_nowait()
        if self.result is None:
            self.result = False

    def _read(self) -> None:
        name_this_thread(self._thread.name)
        is_right = True
        try:
            for chunk in self._wait.reading(self._store.read(self.prefix)):
                self._put(chunk)
                if self._is_cancelled.is_set():
                    return
        except (OSError, DamagedPrefixError):
            is_right = False
        self._put(is_right)

    def _put(self, item: bytes | bool) -> None:
        while not self._is_cancelled.is_set():
            try:
                self._chunks.put(item, timeout=0.1)
            except queue.Full:
                continue
            return
