"""What came of steps, on its way from the inference thread to the event loop: at once, or several steps together.

A message of its own for each token costs the processors, which the model could use, a tenth of a fast answer. So an
answer's first words, its end, and all else that is no part of a text go at once; further words go together, as soon as
the last ones are so long ago as is configured. A model that writes slower than that has each token sent by itself.

Knows no chats and no models. Made by `inference_thread`.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from hearthd.sequences.events import Delta, Event
from hearthd.sequences.sequence import Sequence

__all__ = ["Outbox"]

Events = list[tuple[Sequence, Event]]


class Outbox:
    """Filled in the inference thread, emptied on the event loop."""

    def __init__(self, call_loop: Callable[[Callable[[], object]], None], interval_seconds: float) -> None:
        """call_loop: lets the loop call a function, from the thread.

        interval_seconds: between two deliveries; 0: each delta goes by itself, also if the loop is behind.
        """
        self._call_loop = call_loop
        self._interval_seconds = interval_seconds
        self._events: deque[tuple[Sequence, Event]] = deque()
        # The loop will look by itself. It is put out before the loop looks: what comes later finds it out.
        self._is_awaited = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Events], None]) -> None:
        """deliver: called on the loop with events, each sequence's in their order."""
        self._loop = loop
        self._deliver = deliver

    def send(self, events: Events) -> None:
        """Send what came of a step. In the thread."""
        self._events.extend(events)
        # Each of them, for it is noted who has been heard of.
        are_urgent = [_is_urgent(sequence, event) for sequence, event in events]
        if any(are_urgent) or not self._is_awaited:
            self._call_loop(self._look)

    def flush(self) -> None:
        """Send what is left. In the thread."""
        if self._events:
            self._call_loop(self._look)

    def _look(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._is_awaited = False
        events = [self._events.popleft() for _ in range(len(self._events))]
        if not events:
            return
        if not self._interval_seconds:
            self._deliver(events)
            return
        self._is_awaited = True
        self._timer = self._loop.call_later(self._interval_seconds, self._look)
        self._deliver(_joined(events))


def _is_urgent(sequence: Sequence, event: Event) -> bool:
    """Whether an event is not to wait. Notes that the sequence has been heard of."""
    is_next = isinstance(event, Delta) and sequence.has_spoken
    sequence.has_spoken |= isinstance(event, Delta)
    return not is_next


def _joined(events: Iterable[tuple[Sequence, Event]]) -> Events:
    """Make one delta of those of one sequence that follow each other."""
    joined: Events = []
    last: dict[Sequence, int] = {}
    for sequence, event in events:
        place = last.get(sequence)
        before = None if place is None else joined[place][1]
        if place is not None and isinstance(event, Delta) and isinstance(before, Delta):
            both = Delta(before.text + event.text, before.token_logprobs + event.token_logprobs)
            joined[place] = (sequence, both)
        else:
            last[sequence] = len(joined)
            joined.append((sequence, event))
    return joined
