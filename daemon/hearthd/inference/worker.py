"""One model as the event loop sees it: who is admitted, who waits for an answer, and what becomes of them.

The loop decides at once who is admitted. Sequences cross to the inference thread between two of its steps, and events
come back. Whoever leaves (cancelled, too late, gone, too slow) is taken out of the engine before its next step; if its
prompt is being read at that moment, that run is stopped in the middle. So is a run that a newcomer need not wait for.

Knows no gRPC. Called by `services` (chats) and `models` (life).
"""

import asyncio
import enum
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

from hearthd.board.governor import FULL, Throttle
from hearthd.errors import DeadlineTooShortError, EngineCrashedError, NotServingError, QueueFullError
from hearthd.generation.engine import Engine
from hearthd.inference.admission import last_of_longest, retry_seconds, rivals_of
from hearthd.inference.baton import Baton
from hearthd.inference.counts import Counts
from hearthd.inference.inference_thread import InferenceThread
from hearthd.inference.model import Model
from hearthd.inference.stream import ChatStream
from hearthd.kv.shared import SharedPrompts
from hearthd.priority import Priority
from hearthd.sequences.events import Event, Failed, Finished
from hearthd.sequences.sequence import Sequence

__all__ = ["State", "Worker"]

# Until the thread has heard what a run is stopped for.
_STOP_AGAIN_SECONDS: Final = 0.05


class State(enum.Enum):
    """What the worker can do."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    """Finishes what it has; admits nothing."""
    ENDED = "ended"


class Worker:
    """A model, its thread and its chats. All methods belong to the loop that called `start`."""

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        max_queued: int,
        stream_backlog_bytes: int,
        stream_interval_seconds: float = 0.0,
        baton: Baton | None = None,
        throttle: Callable[[], Throttle] = lambda: FULL,
    ) -> None:
        """load: called in the inference thread. baton: held for each step; None if no other model is served.

        stream_interval_seconds: how long further words of an answer may wait for more; 0: each token goes by itself.
        """
        self._thread = InferenceThread(
            load,
            baton=baton or Baton(),
            throttle=throttle,
            deliver=self._deliver,
            interval_seconds=stream_interval_seconds,
        )
        self._max_queued = max_queued
        self._stream_backlog_bytes = stream_backlog_bytes
        # In the order in which they have come.
        self._chats: dict[ChatStream, None] = {}
        self._streams: dict[Sequence, ChatStream] = {}
        self._no_chats = asyncio.Event()
        self._no_chats.set()
        self._model: Model | None = None
        self.state = State.LOADING
        self.counts = Counts()

    async def start(self) -> Model:
        """Load and prove the model. Raises whatever that raises; the thread has ended then."""
        self._loop = asyncio.get_running_loop()
        loaded, self._ended = self._thread.start()
        # Before anybody else hears of it.
        self._ended.add_done_callback(self._end)
        model = await asyncio.shield(loaded)
        # It may have been told to stop meanwhile, and have ended before this is heard of.
        if self.state is not State.ENDED:
            self._model = model
        if self.state is State.LOADING:
            self.state = State.SERVING
        return model

    @property
    def model(self) -> Model:
        """The model. Raises NotServingError until it is loaded and proven."""
        if self._model is None:
            doing = "shutting down" if self.state is State.ENDED else "still loading the model"
            raise NotServingError(f"the daemon is {doing}; try again in a few seconds")
        return self._model

    @property
    def loaded(self) -> Model | None:
        """The model; None until it is loaded and proven, and once it has gone. Any thread may ask."""
        return self._model

    @property
    def is_admitting(self) -> bool:
        """Whether chats are admitted."""
        return self.state is State.SERVING

    @property
    def num_slots(self) -> int:
        """Chats that can run at once; none without a model."""
        model = self._model
        return 0 if model is None else model.engine.num_slots

    @property
    def num_chats(self) -> int:
        """Chats that are admitted and have not ended."""
        return len(self._chats)

    @property
    def engine(self) -> Engine | None:
        """The model's, for figures that any thread may read; None without a model."""
        model = self._model
        return None if model is None else model.engine

    @property
    def sequences(self) -> list[Sequence]:
        """Those of the chats that are admitted and have been handed on. Not counted in `counts` yet."""
        return [chat.sequence for chat in self._chats if chat.sequence is not None]

    @property
    def max_queued(self) -> int:
        """Chats that may wait."""
        return self._max_queued

    def require_room(self, priority: Priority, account: str) -> None:
        """Refuse a chat at once that `admit` would refuse; nothing is changed. Raises as `admit` does."""
        self._find_room(priority, account)

    def admit(self, priority: Priority = Priority.NORMAL, account: str = "") -> ChatStream:
        """Give a chat a place, or refuse it at once; or refuse one that waits in its stead (`admission`).

        Raises QueueFullError with a time to wait, NotServingError while loading and draining.
        """
        giving_way = self._find_room(priority, account)
        if giving_way is not None:
            self._remove(giving_way)
            giving_way.fail(self._queue_full())
        chat = ChatStream(
            priority, account, max_backlog_bytes=self._stream_backlog_bytes, submit=self._submit, leave=self._leave
        )
        self._chats[chat] = None
        self._no_chats.clear()
        return chat

    def _find_room(self, priority: Priority, account: str) -> ChatStream | None:
        """Return the chat that would give its place to a new one; None if there is a place anyway."""
        model = self.model
        if self.state is not State.SERVING:
            raise _shutting_down()
        rivals = rivals_of(priority, self._chats)
        if len(rivals) < model.engine.num_slots + self._max_queued:
            return None
        giving_way = last_of_longest(rivals, priority, account)
        if giving_way is None:
            self.counts.refused += 1
            raise self._queue_full()
        return giving_way

    def _queue_full(self) -> QueueFullError:
        engine = self.model.engine
        return QueueFullError(
            f"the queue is full: {engine.num_slots} chats run and {self._max_queued} wait; try again later",
            retry_seconds(engine.seconds_until_end),
        )

    async def ping(self) -> None:
        """Return when a no-op has crossed the inference queue; never, if the thread is stuck or dead."""
        crossed = self._loop.create_future()

        def answer() -> None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(lambda: None if crossed.done() else crossed.set_result(None))

        # It stops no run: what is read while nobody asks would never be done.
        self._thread.tell(answer)
        await crossed

    def change_limits(self, *, max_queued: int, default_max_tokens: int) -> None:
        """Admit by other limits from the next chat on; those that are admitted stay. Once the model is there.

        Nothing if it has gone: nobody is admitted any more.
        """
        self._max_queued = max_queued
        model = self._model
        if model is None:
            return
        sampling = replace(model.default_sampling, max_tokens=default_max_tokens)
        self._model = replace(model, default_sampling=sampling)

    def share_prompts(self, shared: SharedPrompts) -> None:
        """Share these beginnings of prompts, and no others."""
        self._tell(partial(self._thread.share_prompts, shared), partial(self._thread.make_way, Priority.BACKGROUND))

    def begin_drain(self) -> None:
        """Admit no more chats."""
        if self.state is not State.ENDED:
            self.state = State.DRAINING

    async def wait_until_idle(self) -> None:
        """Return when no admitted chat is left."""
        await self._no_chats.wait()

    def fail_chats(self, error: Exception) -> None:
        """End every chat with an error, as fast as the thread can be reached."""
        for chat in list(self._chats):
            self._remove(chat)
            chat.fail(error)

    async def wait_until_ended(self) -> None:
        """Return when the thread has ended; raise EngineCrashedError if an exception ended it."""
        await asyncio.shield(self._ended)

    async def wait_until_gone(self) -> None:
        """Return when the thread has ended, however it did, or if it never began."""
        if self._thread.has_begun:
            await asyncio.wait((self._ended,))

    def stop(self) -> None:
        """Let the thread end after the step that runs now; stop a run in the middle. Nobody is admitted any more."""
        self.begin_drain()
        self._thread.stop()

    # On the loop.

    def _submit(self, chat: ChatStream, sequence: Sequence) -> None:
        if self.state is State.ENDED:
            chat.fail(_shutting_down())
            return
        self._streams[sequence] = chat
        self._tell(partial(self._thread.add, sequence), partial(self._thread.make_way, sequence.priority))

    def _leave(self, chat: ChatStream) -> None:
        if chat.finished is not None:
            self.counts.finished += 1
        elif isinstance(chat.error, DeadlineTooShortError | QueueFullError):
            self.counts.refused += 1
        elif chat.error is not None:
            self.counts.failed += 1
        elif chat.sequence is not None:
            self.counts.cancelled += 1
        if chat.sequence is not None and chat.sequence.admitted is not None:
            self._count_tokens(chat.sequence)
        self._remove(chat)
        self._chats.pop(chat, None)
        if not self._chats:
            self._no_chats.set()

    def _count_tokens(self, sequence: Sequence) -> None:
        self.counts.prompt_tokens += len(sequence.prompt_ids)
        self.counts.cached_prompt_tokens += sequence.num_cached
        self.counts.prompt_tokens_from_disk += sequence.num_from_disk
        self.counts.completion_tokens += len(sequence.output_ids)
        self.counts.drafted_tokens += sequence.num_drafted
        self.counts.accepted_tokens += sequence.num_accepted

    def _remove(self, chat: ChatStream) -> None:
        sequence = chat.sequence
        if sequence is None or self._streams.pop(sequence, None) is None or self._model is None:
            return
        self._tell(partial(self._thread.remove, sequence), partial(self._thread.stop_reading, sequence))

    def _tell(self, command: Callable[[], None], hurry: Callable[[], None]) -> None:
        """Give the thread a command. hurry: stops the run that it need not wait for, which takes up to a second.

        More than once: just before a run begins there is nothing to be stopped [M: so it was for 9 cancels of 50].
        Should the run have ended meanwhile, another one is stopped, and the engine runs that again.
        """
        is_taken = threading.Event()

        def take() -> None:
            command()
            is_taken.set()

        def hurry_until_taken() -> None:
            if not is_taken.is_set() and self.state is not State.ENDED:
                hurry()
                self._loop.call_later(_STOP_AGAIN_SECONDS, hurry_until_taken)

        self._thread.tell(take)
        hurry_until_taken()

    def _deliver(self, events: list[tuple[Sequence, Event]]) -> None:
        for sequence, event in events:
            chat = self._streams.get(sequence)
            if chat is None:
                continue  # it left while the step ran
            chat.push(event)
            if isinstance(event, Finished | Failed):
                del self._streams[sequence]
            elif chat.has_ended:  # too slow
                self._remove(chat)

    def _end(self, ended: "asyncio.Future[None]") -> None:
        self.state = State.ENDED
        crash = ended.exception()
        for chat in list(self._chats):
            chat.fail(crash if isinstance(crash, EngineCrashedError) else _shutting_down())
        self._streams.clear()
        # Its memory goes back to the system with the last reference to it.
        self._model = None


def _shutting_down() -> NotServingError:
    return NotServingError("the daemon is shutting down; try again in a few seconds, or ask another one")
