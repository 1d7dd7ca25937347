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
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn

from hearthd.board.thermal import BoardReading, Sensors
from hearthd.logs import log_incident

__all__ = ["FULL", "MAX_LEVEL", "Governor", "Throttle"]

_logger = logging.getLogger(__name__)

MAX_LEVEL: Final = 3
_POLL_SECONDS: Final = 2.0
# After so long without a word of the sensors the board is judged as one that has none.
_PATIENCE_SECONDS: Final = 30.0
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
        self._patience_seconds = _PATIENCE_SECONDS
        self._has_failed = False
        self._changed = clock() - _DOWN_SECONDS
        self._cool_since: float | None = None
        self.reading = BoardReading()
        """The last one."""
        self.throttle = FULL
        """In force. For any thread to read."""

    async def run(self) -> NoReturn:
        """Look at the board for ever; cancel to end."""
        loop, arrived, is_over = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        def take(reading: BoardReading) -> None:
            self.judge(reading)
            arrived.set()

        def look() -> None:
            while not is_over.is_set():
                reading = self._read()
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(take, reading)
                is_over.wait(self._poll_seconds)

        # A sensor may hang on its bus. A thread of the loop's own would then hold up the daemon's end.
        threading.Thread(target=look, name="sensors", daemon=True).start()
        try:
            while True:
                arrived.clear()
                try:
                    async with asyncio.timeout(self._patience_seconds):
                        await arrived.wait()
                except TimeoutError:
                    self.judge(BoardReading())
        finally:
            is_over.set()

    def _read(self) -> BoardReading:
        try:
            return self._sensors.read()
        except Exception as error:  # noqa: BLE001 - a sensor that cannot be read says nothing
            if not self._has_failed:
                log_incident("the board's sensors cannot be read", error)
            self._has_failed = True
            return BoardReading()

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
