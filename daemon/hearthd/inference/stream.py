"""One chat on its way from the inference thread to its caller: admitted, submitted, read, ended.

Everything here happens on the event loop. Knows no gRPC. Made by `worker`, used by `services`.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from hearthd.errors import SlowReaderError
from hearthd.priority import Priority
from hearthd.sequences.events import Delta, Event, Failed, Finished
from hearthd.sequences.sequence import Sequence

__all__ = ["ChatStream"]

# What an event costs besides its texts: some objects of the interpreter.
_EVENT_BYTES: Final = 256
_LOGPROB_BYTES: Final = 128


class ChatStream:
    """An admitted chat. Leaving its `with` block ends it, however it is left, and gives its place to another.

    `async for` yields the sequence's events; the last is Finished. An error of the sequence is raised instead.
    """

    def __init__(
        self,
        priority: Priority,
        account: str,
        *,
        max_backlog_bytes: int,
        submit: Callable[["ChatStream", Sequence], None],
        leave: Callable[["ChatStream"], None],
    ) -> None:
        """submit: hands the sequence to the inference thread. leave: takes the chat out of the worker's books."""
        self.priority = priority
        self.account = account
        self._max_backlog_bytes = max_backlog_bytes
        self._submit = submit
        self._leave = leave
        self._backlog: deque[Event] = deque()
        self._backlog_bytes = 0
        self._error: Exception | None = None
        self._arrived = asyncio.Event()
        self._is_over = False
        self.sequence: Sequence | None = None
        self.finished: Finished | None = None
        """How the answer ended, once it has."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._backlog:
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        event = self._backlog.popleft()
        self._backlog_bytes -= _num_bytes(event)
        return event

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come: finished, or failed."""
        return self._is_over

    @property
    def error(self) -> Exception | None:
        """What ended the chat before it finished."""
        return self._error

    @property
    def has_begun(self) -> bool:
        """Whether it has got a slot; what the inference thread does at this moment, one learns later."""
        return self.sequence is not None and self.sequence.admitted is not None

    def submit(self, sequence: Sequence) -> None:
        """Hand the sequence to the inference thread."""
        self.sequence = sequence
        self._submit(self, sequence)

    def push(self, event: Event) -> None:
        """Take the sequence's next event. Afterwards `error` is a SlowReaderError if that was one too many."""
        if self._is_over:
            return
        if isinstance(event, Failed):
            self.fail(event.error)
            return
        self._backlog.append(event)
        self._backlog_bytes += _num_bytes(event)
        if isinstance(event, Finished):
            self.finished = event
            self._is_over = True
        elif self._backlog_bytes > self._max_backlog_bytes:
            self._backlog.clear()
            self.fail(
                SlowReaderError(
                    f"the caller left {self._backlog_bytes} bytes of the answer unread; the limit is "
                    f"{self._max_backlog_bytes}: read faster, or ask for fewer log probabilities"
                )
            )
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """End the chat with an error, which its reader gets after what it has not read yet."""
        if self._is_over:
            return
        self._error = error
        self._is_over = True
        self._arrived.set()


def _num_bytes(event: Event) -> int:
    if not isinstance(event, Delta):
        return _EVENT_BYTES
    num_logprobs = sum(1 + len(logprob.top) for logprob in event.token_logprobs)
    return _EVENT_BYTES + len(event.text.encode()) + _LOGPROB_BYTES * num_logprobs
