"""Text on a terminal, and in a pipe: what a model or a daemon wrote must be read, never obeyed.

Knows nothing of chats. Called by the commands and by `__main__`.
"""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

# Control characters would move the cursor, set the window's title, or answer for the person at the keyboard. Newline
# and tab may stay. The rest is shown as cat -v shows it.
_VISIBLE = {code: f"^{chr(code + 64)}" for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {127: "^?"} | {code: f"\\x{code:02x}" for code in range(128, 160)}
_VISIBLE_IN_LINE = _VISIBLE | {ord("\n"): " ", ord("\t"): " "}


def neutralise(text: str) -> str:
    """Make control characters visible, all but newline and tab."""
    return text.translate(_VISIBLE)


def neutralise_line(text: str) -> str:
    """Make control characters visible, and one line of it."""
    return text.translate(_VISIBLE_IN_LINE)


class Screen:
    """Where a command writes: answers to stdout, remarks to stderr."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._is_terminal = self._out.isatty()
        self._takes_notes = self._err.isatty()
        self._is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "dumb") == "dumb"
        self._at_line_start = True
        self._num_redrawn = 0
        self._redrawn_size: os.terminal_size | None = None

    def write(self, text: str) -> None:
        """Write a piece of an answer at once. A pipe or a file gets the very text."""
        if text:
            self._out.write(neutralise(text) if self._is_terminal else text)
            self._out.flush()
            self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Begin a new line unless that is where the text is."""
        if not self._at_line_start:
            self.write("\n")

    def end_interrupted(self) -> None:
        """Begin a new line after a Ctrl-C, which a terminal echoes."""
        self.write("\n" if self._is_terminal else "")
        self.end_line()

    def note(self, text: str) -> None:
        """Tell the person at the terminal; nobody if stderr is none."""
        if self._takes_notes:
            self.end_line()
            line = neutralise_line(text)
            self._err.write(f"{line}\n" if self._is_plain else f"\x1b[2m{line}\x1b[0m\n")
            self._err.flush()

    def error(self, text: str) -> None:
        """Tell what went wrong where the program goes on."""
        self.end_line()
        self._err.write(f"hearth: {neutralise_line(text)}\n")
        self._err.flush()

    @property
    def can_redraw(self) -> bool:
        """Whether what was written can be written over: a terminal that knows how to move its cursor."""
        return self._is_terminal and os.environ.get("TERM", "dumb") != "dumb"

    def redraw(self, lines: Sequence[str], size: os.terminal_size) -> None:
        """Write lines over those of the last time. What the terminal has no room for is left out."""
        shown = [neutralise_line(line)[: size.columns] for line in lines[: max(size.lines - 1, 1)]]
        up = f"\x1b[{self._num_redrawn}A" if self._num_redrawn else ""
        if self._redrawn_size not in (None, size):
            # Many terminals have wrapped the lines anew: nobody knows where they begin.
            up = "\x1b[H\x1b[2J"
        self._redrawn_size = size
        # Each line is cleared behind its end, then all below the last.
        self._out.write(up + "".join(f"\r{line}\x1b[K\n" for line in shown) + "\x1b[J")
        self._out.flush()
        self._num_redrawn = len(shown)
        self._at_line_start = True

    @property
    def encoding_is_unicode(self) -> bool:
        """Whether stdout can hold any character."""
        return (self._out.encoding or "").lower().replace("-", "").startswith("utf")
