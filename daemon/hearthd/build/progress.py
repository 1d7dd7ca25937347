"""Show how far a build is: a bar on a terminal, a line for each step elsewhere.

Knows nothing of what is done. Writes to standard error only, so that a command's result can be piped. Made by `cli`.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

_BAR_WIDTH: Final = 24
# A terminal over a slow line should not be what a build waits for.
_REDRAW_SECONDS: Final = 0.1


class Progress:
    """Called with a step's name and the share of it that is done, 0 to 1. `close` ends the last step."""

    def __init__(
        self, stream: TextIO, *, is_terminal: bool | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """is_terminal: None asks the stream."""
        self._stream = stream
        self._is_terminal = stream.isatty() if is_terminal is None else is_terminal
        self._clock = clock
        self._step: str | None = None
        self._started = 0.0
        self._drawn = float("-inf")

    def __call__(self, step: str, share: float) -> None:
        """Show that `share` of `step` is done; a new name ends the step before."""
        now = self._clock()
        if step != self._step:
            self.close()
            self._step, self._started, self._drawn = step, now, float("-inf")
            if not self._is_terminal:
                self._stream.write(f"{step} ...\n")
                self._stream.flush()
        if self._is_terminal and (now - self._drawn >= _REDRAW_SECONDS or share >= 1.0):
            self._drawn = now
            self._draw(min(max(share, 0.0), 1.0), now - self._started)

    def close(self) -> None:
        """End the step that is shown, with the time that it took."""
        if self._step is None:
            return
        seconds = self._clock() - self._started
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{self._step}: {_duration(seconds)}\n")
        else:
            self._stream.write(f"{self._step}: done in {_duration(seconds)}\n")
        self._stream.flush()
        self._step = None

    def _draw(self, share: float, seconds: float) -> None:
        done = int(share * _BAR_WIDTH)
        line = f"{self._step}  [{'#' * done}{'.' * (_BAR_WIDTH - done)}] {share:4.0%}  {_duration(seconds)}"
        columns = shutil.get_terminal_size().columns
        self._stream.write(f"\r\x1b[K{line[: max(columns - 1, 1)]}")
        self._stream.flush()


def no_progress(step: str, share: float) -> None:
    """Show nothing."""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
