"""Which beginnings of prompts go to the disk and come from there, as the inference thread sees it.

To the disk: a prompt's first message when it has come twice, and what the owner shares with everybody. From
there: whatever is longer than what memory has. Either way chunk by chunk, while threads of their own do what waits for
the disk. Knows slots' books and the runner's KV; no files. Called by `kv_cache`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from hearthd.kv.loading import Loading
from hearthd.kv.prefix_file import CHUNK
from hearthd.kv.prefix_store import PrefixStore, StoredPrefix
from hearthd.kv.runner_protocol import Runner
from hearthd.kv.saving import Saving
from hearthd.kv.slot import Slot
from hearthd.thread_name import name_this_thread

__all__ = ["PUBLIC", "StoredPrefixes"]

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# So long may pass between what a writing thread does last and its end.
_LOOK_SECONDS: Final = 0.05
# First messages that are remembered, as hashes, until they come again; each may have been somebody's only one.
_MAX_SEEN: Final = 1024
# The identity of what the owner shares with everybody; no caller's, which are names.
PUBLIC: Final = "\0public"


@dataclass(slots=True)
class _Incoming:
    loading: Loading
    tokens: list[int]
    num_past: int
    """Positions that the slot has already, and that stay as they are."""
    num_written: int = 0


@dataclass(slots=True)
class _Outgoing:
    saving: Saving
    slot: Slot
    num_cuts: int


class StoredPrefixes:
    """The traffic between slots and a store."""

    def __init__(self, store: PrefixStore, runner: Runner, *, min_tokens: int) -> None:
        """min_tokens: a first message of so many is stored, when it comes again."""
        self.store = store
        self._runner = runner
        self._min_tokens = min_tokens
        self._incoming: dict[Slot, _Incoming] = {}
        self._outgoing: _Outgoing | None = None
        self._wanted: list[Slot] = []
        # Keys of first messages, whether they have come more than once; the last to come at the end.
        self._seen: dict[bytes, bool] = {}
        # Whether the last thread that was wanted could not be had.
        self._lacks_threads = False
        self.on_room: Callable[[], None] = lambda: None
        """Called in another thread when `has_work` may have become true."""

    # From the disk.

    def num_found(self, prompt: Sequence[int], identity: str, num_public: int, most: int) -> int:
        """Return how many tokens of a prompt the disk has, `most` at most."""
        found = self.store.find(prompt, [(identity, most), (PUBLIC, min(num_public, most))], CHUNK)
        return 0 if found is None else found.num_tokens

    def look_for(self, slot: Slot, prompt: Sequence[int], most: int, *, is_new: bool = True) -> None:
        """Begin to load the longest prefix of a prompt, of `most` tokens at most, if that is more than is there.

        is_new: whether the prompt has come now, and not before.
        """
        self.drop(slot)
        if is_new:
            self._note_seen(slot, prompt)
        num_past = len(slot.tokens)
        identities = [(slot.identity, most), (PUBLIC, min(slot.num_public, most))]
        found = self.store.find(prompt, identities, num_past + CHUNK)
        if found is None:
            return
        loading = self._start(partial(Loading, self.store, found))
        if loading is not None:
            self._incoming[slot] = _Incoming(loading, list(prompt[: found.num_tokens]), num_past)

    def fetch(self, slot: Slot, number: int, wait_seconds: float) -> int | None:
        """Write what has come for a slot to its KV; wait so long for more if there is nothing.

        Returns None while more is to come; then the tokens that the slot has from the disk, 0 if it must do without.
        """
        incoming = self._incoming.get(slot)
        if incoming is None:
            return 0
        for chunk in incoming.loading.take(wait_seconds):
            start = incoming.num_written
            size = min(CHUNK, len(incoming.tokens) - start)
            skipped = min(max(incoming.num_past - start, 0), size)
            if skipped < size:
                self._runner.write_kv(number, start, chunk, skipped)
            incoming.num_written += size
            slot.num_loaded = incoming.num_written
        if incoming.loading.result is None:
            return None
        del self._incoming[slot]
        slot.num_loaded = 0
        if not incoming.loading.result:
            return 0
        slot.tokens = incoming.tokens
        slot.num_reusable = len(incoming.tokens)
        self.store.num_hits += 1
        self.store.num_tokens_read += len(incoming.tokens) - incoming.num_past
        return len(incoming.tokens)

    def drop(self, slot: Slot) -> None:
        """Do not wait for what a slot is waiting for."""
        incoming = self._incoming.pop(slot, None)
        if incoming is not None:
            incoming.loading.cancel()
            slot.num_loaded = 0

    # To the disk.

    def consider(self, slot: Slot) -> None:
        """Store a slot's first message when there is time, if it is worth it."""
        if slot not in self._wanted and self._prefix_of(slot) is not None:
            self._wanted.append(slot)

    @property
    def has_work(self) -> bool:
        """Whether `save_some` would do anything."""
        out = self._outgoing
        if out is None:
            return bool(self._wanted)
        if out.saving.has_ended or out.saving.has_given_up:
            return out.saving.has_ended
        is_whole = out.saving.num_given == out.saving.prefix.num_tokens
        return out.slot.num_cuts != out.num_cuts or (not is_whole and out.saving.has_room)

    def save_some(self, slots: Sequence[Slot]) -> None:
        """Hand over a chunk of what is to be stored."""
        out = self._outgoing
        if out is None:
            self._outgoing = out = self._begin()
        if out is None:
            return
        saving, number_of = out.saving, {slot: number for number, slot in enumerate(slots)}
        if saving.has_ended:
            # It has only to tell so.
            saving.wait(_LOOK_SECONDS)
            self._outgoing = None
        elif saving.has_given_up:
            # A disk that hangs gets no second thread.
            return
        elif out.slot.num_cuts != out.num_cuts:
            saving.give_up()
        elif saving.has_room and saving.num_given < saving.prefix.num_tokens:
            start = saving.num_given
            end = min(start + CHUNK, saving.prefix.num_tokens)
            saving.give(self._runner.read_kv(number_of[out.slot], start, end), end - start)

    def finish(self, slots: Sequence[Slot], seconds: float) -> None:
        """Store what is still to be stored, as far as the disk takes it within so long: the model leaves.

        What comes from the disk is not waited for. Afterwards no thread is left but one that a disk holds up.
        """
        for slot in list(self._incoming):
            self.drop(slot)
        end = time.monotonic() + seconds
        moved = threading.Event()
        self.on_room = moved.set
        while (self._wanted or self._outgoing is not None) and (left := end - time.monotonic()) > 0:
            moved.clear()
            if self.has_work:
                self.save_some(slots)
            else:
                moved.wait(min(left, _LOOK_SECONDS))
        self._wanted.clear()
        if self._outgoing is not None:
            self._outgoing.saving.leave()
            self._outgoing.saving.wait(_LOOK_SECONDS)
            self._outgoing = None
        self.on_room = lambda: None
        self._write_down_uses(max(end - time.monotonic(), _LOOK_SECONDS))

    def _write_down_uses(self, seconds: float) -> None:
        thread = threading.Thread(target=_write_down_uses, args=(self.store,), name="prefix-uses", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no memory for one; less is known next time of what was of use
            return
        thread.join(seconds)

    def _tell_room(self) -> None:
        self.on_room()

    def _begin(self) -> _Outgoing | None:
        while self._wanted:
            slot = self._wanted.pop(0)
            prefix = self._prefix_of(slot)
            if prefix is None:
                continue
            saving = self._start(partial(Saving, self.store, prefix, self._tell_room))
            if saving is not None:
                return _Outgoing(saving, slot, slot.num_cuts)
        return None

    def _start(self, make: Callable[[], _T]) -> _T | None:
        """Make what has a thread of its own; None if the system gives no thread, and the disk is done without."""
        try:
            made = make()
        except RuntimeError as error:
            if not self._lacks_threads:
                _logger.warning("prompts' beginnings are neither stored nor loaded for want of a thread: %s", error)
            self._lacks_threads = True
            return None
        self._lacks_threads = False
        return made

    def _note_seen(self, slot: Slot, prompt: Sequence[int]) -> None:
        """Note that a prompt's first message has come, and that what the disk has of it is of use, loaded or not."""
        num_tokens = slot.num_first
        if num_tokens > slot.num_public and num_tokens >= self._min_tokens:
            prefix = StoredPrefix(num_tokens, self.store.key(slot.identity, prompt[:num_tokens]))
            is_stored = self._note_use(prefix)
            came_before = self._seen.pop(prefix.key, None) is not None
            # One that is there may turn out to be damaged.
            self._seen[prefix.key] = came_before or is_stored
            if len(self._seen) > _MAX_SEEN:
                del self._seen[next(iter(self._seen))]
            if is_stored:
                return
        if slot.num_public:
            self._note_use(StoredPrefix(slot.num_public, self.store.key(PUBLIC, prompt[: slot.num_public])))

    def _note_use(self, prefix: StoredPrefix) -> bool:
        is_stored = self.store.has(prefix)
        if is_stored:
            self.store.note_use(prefix)
        return is_stored

    def _prefix_of(self, slot: Slot) -> StoredPrefix | None:
        num_tokens = slot.num_first
        is_public = num_tokens <= slot.num_public
        if not CHUNK <= num_tokens <= slot.num_reusable:
            return None
        identity = PUBLIC if is_public else slot.identity
        prefix = StoredPrefix(num_tokens, self.store.key(identity, slot.tokens[:num_tokens]))
        if self.store.has(prefix) or not (is_public or self._seen.get(prefix.key, False)):
            return None
        return prefix if self.store.takes(num_tokens) else None


def _write_down_uses(store: PrefixStore) -> None:
    name_this_thread("prefix-uses")
    store.write_down_uses()
