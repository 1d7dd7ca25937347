"""Ctrl-C while an answer comes: it ends the answer, at a place of our choosing, and nothing else.

A KeyboardInterrupt could break in anywhere, in the middle of gRPC or of a print. Called by `ask` and `chat`.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hearth._client import ChatStream


class Interrupt:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.happened = False


@contextmanager
def closing_on_interrupt(stream: ChatStream) -> Iterator[Interrupt]:
    """While the block runs, the first Ctrl-C closes `stream`; a second one interrupts as usual."""
    interrupt = Interrupt()

    def close(_signal: int, _frame: FrameType | None) -> None:
        if interrupt.happened:
            raise KeyboardInterrupt
        interrupt.happened = True
        stream.close()

    before = signal.signal(signal.SIGINT, close)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
