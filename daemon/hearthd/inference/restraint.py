"""How one inference thread obeys the governor: fewer chats at once, fewer threads, pauses. Around each step.

    with restraint:  # once the baton is there
        engine.step()

The pause that a step owes is made before the next one, so that what it wrote is told without delay. While the baton is
held: another model's step in that time would be as hot. A long step, which reads a prompt, owes more than one pause may
last; the rest is paid later, so that a cancelled chat never waits for long.

No answer changes: neither company nor the number of threads changes a bit of it (tests/test_real_threads.py).

Owned by `inference_thread`, of that thread alone. Knows the engine and the runner of its model.
"""

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from hearthd.board.governor import FULL, Throttle
from hearthd.inference.model import Model
from hearthd.logs import log_incident

__all__ = ["Restraint"]

_logger = logging.getLogger(__name__)

# No cancel and no ping waits longer for it.
_MAX_PAUSE_SECONDS: Final = 0.2
_MAX_DEBT_SECONDS: Final = 2.0
# To change the number of threads loads the graph again. While that lasts nobody gets a token, and the watchdog nothing.
_MAX_LOAD_SECONDS: Final = 5.0
# After that has failed, most likely for want of memory.
_TRY_AGAIN_SECONDS: Final = 60.0


class Restraint:
    """One model's steps."""

    def __init__(
        self,
        model: Model,
        throttle: Callable[[], Throttle],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """throttle: what is in force."""
        self._engine = model.engine
        self._runner = model.runner
        self._throttle = throttle
        self._clock = clock
        self._sleep = sleep
        self._obeyed = FULL
        self._num_threads = model.runner.num_threads
        # When to set the number of threads that is allowed; None if that is done.
        self._change_at: float | None = None
        self._has_failed = False
        self._owed = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        throttle = self._throttle()
        if throttle != self._obeyed:
            self._obey(throttle)
        if self._change_at is not None and self._clock() >= self._change_at:
            self._change_threads()
        if pause := min(self._owed, _MAX_PAUSE_SECONDS):
            self._owed -= pause
            self._sleep(pause)
        self._began = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        took = self._clock() - self._began
        share = self._obeyed.pause_share
        self._owed = min(self._owed + took * share, _MAX_DEBT_SECONDS) if share else 0.0

    def _obey(self, throttle: Throttle) -> None:
        self._obeyed = throttle
        self._engine.limit_running(throttle.max_running(self._engine.num_slots))
        self._change_at = self._clock()

    def _change_threads(self) -> None:
        """Compute with as many threads as are allowed now; if that cannot be, as before, and try again later."""
        self._change_at = None
        num_threads = self._obeyed.num_threads(self._num_threads)
        if num_threads == self._runner.num_threads or self._runner.load_seconds > _MAX_LOAD_SECONDS:
            return
        started = self._clock()
        try:
            self._runner.change_threads(num_threads)
        except Exception as error:  # noqa: BLE001 - the model answers all the same
            self._change_at = self._clock() + _TRY_AGAIN_SECONDS
            if not self._has_failed:
                log_incident(f"the model cannot be loaded for {num_threads} threads; tried again later", error)
            self._has_failed = True
        else:
            self._has_failed = False
            _logger.info("computing with %d threads; the change took %.1f s", num_threads, self._clock() - started)
