"""A prefix on its way to the disk: copied out chunk by chunk by the inference thread, written in a thread of its own.

Only some chunks are in memory at a time; while the disk is slower than that, the inference thread has nothing to do
here, and is told when it has. Knows no slots. Made by `stored_prefixes`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from hearthd.kv.prefix_file import CHUNK
from hearthd.kv.prefix_store import PrefixStore, StoredPrefix
from hearthd.thread_name import name_this_thread

__all__ = ["Saving"]

_NUM_CHUNKS: Final = 4


def _tell_nobody() -> None:
    pass


class _GivenUpError(Exception):
    """What was to be written is not there any more."""


class Saving:
    """One prefix that is being written. All methods are the inference thread's."""

    def __init__(self, store: PrefixStore, prefix: StoredPrefix, on_room: Callable[[], None]) -> None:
        """on_room: called in the writing thread when a chunk was taken, and at the end."""
        self.prefix = prefix
        self.num_given = 0
        """Tokens whose KV was handed over."""
        self._store = store
        self._on_room = on_room
        # None: there will be no more of them.
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_NUM_CHUNKS)
        self._has_given_up = threading.Event()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._write, name="prefix-write", daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """Whether `give` can be called."""
        return not self._chunks.full()

    @property
    def has_ended(self) -> bool:
        """Whether the file is there, or never will be."""
        return self._has_ended.is_set()

    def give(self, chunk: bytes, num_tokens: int) -> None:
        """Hand over the KV of the next tokens."""
        self._chunks.put_nowait(chunk)
        self.num_given += num_tokens

    @property
    def has_given_up(self) -> bool:
        """Whether nothing is to come of it; the thread may wait for the disk all the same."""
        return self._has_given_up.is_set()

    def leave(self) -> None:
        """Give up, and tell nobody any more: a thread that a disk holds up must not hold a model."""
        self._on_room = _tell_nobody
        self.give_up()

    def give_up(self) -> None:
        """Leave nothing behind. The end is told."""
        self._has_given_up.set()
        with suppress(queue.Full):
            self._chunks.put_nowait(None)

    def wait(self, seconds: float) -> None:
        """Return when the thread has ended, or after so long."""
        self._thread.join(seconds)

    def _write(self) -> None:
        name_this_thread(self._thread.name)
        try:
            self._store.write(self.prefix, self._take())
        except _GivenUpError:
            pass
        finally:
            # Before it is told: whoever is told looks once.
            self._has_ended.set()
            self._on_room()

    def _take(self) -> Iterator[bytes]:
        left = self.prefix.num_tokens
        while left > 0:
            chunk = self._chunks.get()
            if chunk is None or self._has_given_up.is_set():
                raise _GivenUpError
            left -= CHUNK
            yield chunk
            self._on_room()
