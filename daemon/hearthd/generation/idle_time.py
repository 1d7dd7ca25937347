"""What the engine does while nobody asks, a little in each step, for those who come next.

Prompts that the owner shares are brought in, answers are read (only KV that a prompt's run wrote can be reused), and
prefixes are stored. Whoever asks stops what is being read. Knows no sequences. Called by `engine`.
"""

import logging
from collections.abc import Callable

import numpy as np

from hearthd.kv.kv_cache import KVCache, Runner, RunTerminated
from hearthd.scheduling.pace import Pace

__all__ = ["IdleTime"]

_logger = logging.getLogger(__name__)

# Somebody who comes while the disk is waited for is heard that soon.
_DISK_SECONDS = 0.02


class IdleTime:
    """What there is to do."""

    def __init__(self, cache: KVCache, runner: Runner, pace: Pace, chunk: int, clock: Callable[[], float]) -> None:
        """chunk: tokens that are read at a time."""
        self._cache = cache
        self._runner = runner
        self._pace = pace
        self._chunk = chunk
        self._clock = clock
        self.is_reading = False
        """Whether the model runs. For any thread to read."""

    @property
    def has_work(self) -> bool:
        """Whether `use` would do anything."""
        cache = self._cache
        return cache.has_warming or cache.next_unread(self._chunk) is not None or cache.has_saving

    def use(self) -> None:
        """Do the next of it. Raises RunTerminated if `Runner.terminate` stopped it, which has changed nothing then."""
        # One shared prompt is read before the next one comes, which may need its place, and stored if the disk is fast.
        if self._cache.next_unread(self._chunk) is not None:
            self._read()
        elif self._cache.has_saving:
            self._cache.save_some()
        elif self._cache.has_warming:
            self._cache.warm_some(_DISK_SECONDS)

    def _read(self) -> None:
        unread = self._cache.next_unread(self._chunk)
        if unread is None:
            return
        slot, chunk = unread
        if not self._cache.make_room_to_read(slot, len(chunk)):
            return
        past_lengths = np.array([self._cache.num_tokens(slot)], np.int32)
        self.is_reading = True
        try:
            started = self._clock()
            self._runner.forward(np.array([chunk], np.int64), slot, past_lengths)
            self._pace.note_prompt_run(len(chunk), self._clock() - started)
        except RunTerminated:
            raise
        except Exception as error:  # noqa: BLE001 - of nobody's answer; who asks next hears of it
            # Its type alone: a message could quote what was said.
            _logger.warning("an answer could not be read again, and is not cached: %s", type(error).__name__)
            self._cache.forget(slot)
        else:
            self._cache.note_read(slot, len(chunk))
        finally:
            self.is_reading = False
