"""How much the daemon holds back so that the board stays cool: a level from 0 to 3, with hysteresis.

The firmware of a board that gets too hot slows down everything at once, and every program on it. Before that, the
daemon steps down by itself: fewer chats at once, then fewer threads too, then pauses between steps as well. One level
at a time, so that a step can take effect before the next; two degrees beyond the limit the next one comes at once. It
steps back when the board has been cool for a while.

Knows no engine: the inference threads look at `Governor.throttle` before each step. Clock and sensors are given. Made
by `observation`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from hearthd.thermal import BoardReading, Sensors

__all__ = ["FULL", "MAX_LEVEL", "Governor", "Throttle"]

_logger = logging.getLogger(__name__)

MAX_LEVEL: Final = 3
_POLL_SECONDS: Final = 2.0
# What a heat sink takes to follow. Down fast, up slowly: to swing between two levels is worse than either.
_DOWN_SECONDS: Final = 10.0
_UP_SECONDS: Final = 30.0
_HYSTERESIS_CELSIUS: Final = 5.0
_URGENT_CELSIUS: Final = 2.0
# At the last level a step is followed by a pause of its own length: half of the heat.
_PAUSE_SHARE: Final = 1.0


@dataclass(frozen=True, slots=True)
class Throttle:
    """What is held back at a level. A worker applies it to its own numbers of slots and threads."""

    level: int = 0

    def max_running(self, num_slots: int) -> int:
        """Chats that may run at once, of so many."""
        return num_slots if self.level < 1 else max(num_slots // 2, 1)

    def num_threads(self, configured: int) -> int:
        """Threads to compute with, of so many."""
        return configured if self.level < 2 else max(configured // 2, 1)

    @property
    def pause_share(self) -> float:
        """How long to pause after a step, as a share of what it took."""
        return _PAUSE_SHARE if self.level >= MAX_LEVEL else 0.0


FULL: Final = Throttle()


class Governor:
    """Watches a board. Of the event loop."""

    def __init__(
        self,
        sensors: Sensors,
        max_celsius: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        poll_seconds: float | None = None,
    ) -> None:
        """max_celsius: 0 to watch, and hold nothing back."""
        self._sensors = sensors
        self._max_celsius = max_celsius
        self._clock = clock
        self._poll_seconds = _POLL_SECONDS if poll_seconds is None else poll_seconds
        self._changed = clock() - _DOWN_SECONDS
        self._cool_since: float | None = None
        self.reading = BoardReading()
        """The last one."""
        self.throttle = FULL
        """In force. For any thread to read."""

    async def run(self) -> NoReturn:
        """Look at the board for ever; cancel to end."""
        while True:
            # A sensor may hang on its bus.
            self.judge(await asyncio.to_thread(self._sensors.read))
            await asyncio.sleep(self._poll_seconds)

    def judge(self, reading: BoardReading) -> None:
        """Take note of a reading, and change the level if it is time to."""
        self.reading = reading
        if not self._max_celsius:
            return
        now, level = self._clock(), self.throttle.level
        beyond = -self._max_celsius if reading.celsius is None else reading.celsius - self._max_celsius
        if beyond >= 0 or reading.flags:
            self._cool_since = None
            if level < MAX_LEVEL and (beyond >= _URGENT_CELSIUS or now - self._changed >= _DOWN_SECONDS):
                self._change(level + 1, now)
        elif beyond > -_HYSTERESIS_CELSIUS:
            self._cool_since = None
        else:
            if self._cool_since is None:
                self._cool_since = now
            if level > 0 and now - max(self._cool_since, self._changed) >= _UP_SECONDS:
                self._change(level - 1, now)

    def _change(self, level: int, now: float) -> None:
        reading, before = self.reading, self.throttle.level
        self.throttle, self._changed = Throttle(level), now
        heat = "unknown" if reading.celsius is None else f"{reading.celsius:.0f} degrees Celsius"
        flags = ", ".join(sorted(flag.name.lower().replace("_", " ") for flag in reading.flags or ()))
        log = _logger.warning if level > before else _logger.info
        log(
            "thermal level %d of %d, was %d: processor %s, limit %g%s",
            level,
            MAX_LEVEL,
            before,
            heat,
            self._max_celsius,
            f"; the firmware reports {flags}" if flags else "",
        )
