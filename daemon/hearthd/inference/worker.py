"""The inference thread, and the books of who waits for it.

One thread owns the model: it loads it, proves it, and then runs step after step. The event loop decides at once who is
admitted; sequences cross to the thread through a queue, between two steps, and events come back by
`call_soon_threadsafe`, one call for each step. Whoever leaves (cancelled, too late, gone, too slow) is taken out of the
engine before its next step; if its prompt is being read at that moment, that run is stopped in the middle.

Knows no gRPC. Called by `services` (chats) and `server` (life).
"""

import asyncio
import enum
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from hearthd.board.governor import FULL, Throttle
from hearthd.errors import DeadlineTooShortError, EngineCrashedError, HearthdError, NotServingError, QueueFullError
from hearthd.generation.engine import Engine
from hearthd.inference.admission import last_of_longest, retry_seconds, rivals_of
from hearthd.inference.baton import Baton
from hearthd.inference.counts import Counts
from hearthd.inference.model import Model, prove
from hearthd.inference.restraint import Restraint
from hearthd.inference.stream import ChatStream
from hearthd.kv.shared import SharedPrompts
from hearthd.logs import log_incident
from hearthd.priority import Priority
from hearthd.sequences.events import Delta, Event, Failed, Finished
from hearthd.sequences.sequence import Sequence
from hearthd.thread_name import name_this_thread

__all__ = ["State", "Worker"]

# Until a chat that left in the middle of its prompt is out of the engine.
_STOP_AGAIN_SECONDS: Final = 0.05
# A thread whose work can wait looks so often whether the others are done.
_GIVE_WAY_SECONDS: Final = 0.1
# For what is on its way to the disk at the end; `server` waits a little longer for the thread.
_CLOSE_SECONDS: Final = 0.8
# The engine outlives a failed run; one that fails run after run is broken, and a new process may not be.
_MAX_FAILURES_IN_A_ROW: Final = 8


class State(enum.Enum):
    """What the worker can do."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    """Finishes what it has; admits nothing."""
    ENDED = "ended"


class Worker:
    """The inference thread as the event loop sees it. All methods belong to the loop that called `start`."""

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        max_queued: int,
        stream_backlog_bytes: int,
        baton: Baton | None = None,
        throttle: Callable[[], Throttle] = lambda: FULL,
    ) -> None:
        """load: called in the inference thread. baton: held for each step; None if no other model is served."""
        self._load = load
        self._baton = baton or Baton()
        self._throttle = throttle
        self._max_queued = max_queued
        self._stream_backlog_bytes = stream_backlog_bytes
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        # In the order in which they have come.
        self._chats: dict[ChatStream, None] = {}
        self._streams: dict[Sequence, ChatStream] = {}
        self._no_chats = asyncio.Event()
        self._no_chats.set()
        self._model: Model | None = None
        self._must_stop = False
        self._num_failures = 0
        self.state = State.LOADING
        self.counts = Counts()

    async def start(self) -> Model:
        """Load and prove the model. Raises whatever that raises; the thread has ended then."""
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[Model] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        for future in (self._loaded, self._ended):
            # asyncio complains of an error that nobody has asked for; a daemon that is told to stop does not ask.
            future.add_done_callback(lambda done: done.exception())
        self._thread.start()
        model = await asyncio.shield(self._loaded)
        # It would keep the model for ever.
        del self._loaded
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
    def num_slots(self) -> int:
        """Chats that can run at once; none before the model is loaded."""
        return 0 if self._model is None else self._model.engine.num_slots

    @property
    def num_chats(self) -> int:
        """Chats that are admitted and have not ended."""
        return len(self._chats)

    @property
    def engine(self) -> Engine | None:
        """The model's, for figures that any thread may read; None without a model."""
        return None if self._model is None else self._model.engine

    @property
    def sequences(self) -> list[Sequence]:
        """Those of the chats that are admitted and have been handed on. Not counted in `counts` yet."""
        return [chat.sequence for chat in self._chats if chat.sequence is not None]

    @property
    def max_queued(self) -> int:
        """Chats that may wait."""
        return self._max_queued

    def admit(self, priority: Priority = Priority.NORMAL, account: str = "") -> ChatStream:
        """Give a chat a place, or refuse it at once; or refuse one that waits in its stead (`admission`).

        Raises QueueFullError with a time to wait, NotServingError while loading and draining.
        """
        model = self.model
        if self.state is not State.SERVING:
            raise NotServingError("the daemon is shutting down; try again in a few seconds, or ask another one")
        limit = model.engine.num_slots + self._max_queued
        rivals = rivals_of(priority, self._chats)
        if len(rivals) >= limit:
            error = QueueFullError(
                f"the queue is full: {model.engine.num_slots} chats run and {self._max_queued} wait; try again later",
                retry_seconds(model.engine.seconds_until_end),
            )
            giving_way = last_of_longest(rivals, priority, account)
            if giving_way is None:
                self.counts.refused += 1
                raise error
            self._remove(giving_way)
            giving_way.fail(error)
        chat = ChatStream(
            priority, account, max_backlog_bytes=self._stream_backlog_bytes, submit=self._submit, leave=self._leave
        )
        self._chats[chat] = None
        self._no_chats.clear()
        return chat

    async def ping(self) -> None:
        """Return when a no-op has crossed the inference queue; never, if the thread is stuck or dead."""
        crossed = self._loop.create_future()

        def answer() -> None:
            self._call_loop(lambda: None if crossed.done() else crossed.set_result(None))

        self._commands.put(answer)
        await crossed

    def change_limits(self, *, max_queued: int, default_max_tokens: int) -> None:
        """Admit by other limits from the next chat on; those that are admitted stay. Once the model is there."""
        model = self.model
        self._max_queued = max_queued
        sampling = replace(model.default_sampling, max_tokens=default_max_tokens)
        self._model = replace(model, default_sampling=sampling)

    def share_prompts(self, shared: SharedPrompts) -> None:
        """Share these beginnings of prompts, and no others."""
        self._commands.put(lambda: self._engine.share_prompts(shared))

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
        if self._thread.ident is not None:
            await asyncio.wait((self._ended,))

    def stop(self) -> None:
        """Let the thread end after the step that runs now; stop a run in the middle."""
        self._must_stop = True
        self._commands.put(lambda: None)
        if self._model is not None:
            self._model.runner.terminate()

    # On the loop.

    def _submit(self, chat: ChatStream, sequence: Sequence) -> None:
        if self.state is State.ENDED:
            chat.fail(NotServingError("the daemon is shutting down; try again in a few seconds, or ask another one"))
            return
        self._streams[sequence] = chat
        self._commands.put(lambda: self._add(sequence))

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
        model = self._model
        is_removed = threading.Event()

        def remove() -> None:
            model.engine.remove(sequence)
            is_removed.set()

        self._commands.put(remove)
        self._stop_reading(model, sequence, is_removed)

    def _stop_reading(self, model: Model, sequence: Sequence, is_removed: threading.Event) -> None:
        """Stop the run that reads a prompt for nobody, which takes half a second of a board's time.

        More than once: just before a run begins there is nothing to be stopped [M: so it was for 9 cancels of 50].
        Should the run have ended meanwhile, another one is stopped, and the engine runs that again.
        """
        if is_removed.is_set() or self.state is State.ENDED:
            return
        if model.engine.prefilling is sequence:
            model.runner.terminate()
        again = (model, sequence, is_removed)
        self._loop.call_later(_STOP_AGAIN_SECONDS, self._stop_reading, *again)

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

    def _end(self, error: EngineCrashedError | None) -> None:
        self.state = State.ENDED
        for chat in list(self._chats):
            chat.fail(error or NotServingError("the daemon is shutting down; try again in a few seconds"))
        self._streams.clear()
        # Its memory goes back to the system with the last reference to it.
        self._model = None
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    # In the inference thread.

    def _run(self) -> None:
        try:
            model = self._load()
            prove(model, self._baton)
        except BaseException as error:  # noqa: BLE001 - whatever it is, `start` must not wait for ever
            self._call_loop(lambda error=error: self._fail_to_load(error))  # type: ignore[misc]
            return
        self._engine = model.engine
        self._engine.has_others = lambda _: self._baton.has_others(self)
        if self._engine.stored:
            self._engine.stored.on_room = lambda: self._commands.put(lambda: None)
        # After loading: ONNX Runtime's own threads would have inherited the name.
        name_this_thread(self._thread.name)
        restraint = Restraint(model, self._throttle)
        self._call_loop(lambda: self._loaded.set_result(model))
        try:
            while not self._must_stop:
                self._step(restraint)
            self._engine.close(_CLOSE_SECONDS)
        except BaseException as error:  # noqa: BLE001 - nobody may wait for a dead thread
            crash = EngineCrashedError(log_incident("the inference thread crashed", error))
            self._call_loop(lambda: self._end(crash))
        else:
            self._call_loop(lambda: self._end(None))
        finally:
            self._baton.note(self, is_busy=False)
            del self._engine

    def _step(self, restraint: Restraint) -> None:
        self._take_commands()
        self._baton.note(self, is_busy=self._is_asked)
        if self._must_stop or not self._engine.has_work or self._gives_way:
            return
        with self._baton, restraint:
            if self._must_stop:  # while others had their turns
                return
            events = self._engine.step()
        self._baton.note(self, is_busy=self._is_asked)
        self._judge(events)
        if events:
            self._call_loop(lambda: self._deliver(events))

    def _judge(self, events: list[tuple[Sequence, Event]]) -> None:
        """Raise the error of an engine that does nothing but fail."""
        if any(isinstance(event, Delta | Finished) for _, event in events):
            self._num_failures = 0
            return
        errors = [event.error for _, event in events if isinstance(event, Failed)]
        errors = [error for error in errors if not isinstance(error, HearthdError)]
        # A run that fails fails all the answers of its batch, and counts once.
        if errors:
            self._num_failures += 1
            if self._num_failures >= _MAX_FAILURES_IN_A_ROW:
                raise errors[0]

    @property
    def _is_asked(self) -> bool:
        engine = self._engine
        return engine.num_running + engine.num_paused + engine.num_waiting > 0

    @property
    def _gives_way(self) -> bool:
        """Whether nobody waits for what there is to do here, and somebody does for another model."""
        return not self._is_asked and self._baton.has_others(self)

    def _take_commands(self) -> None:
        """Run what the loop has asked for; wait for something to be asked if there is nothing to do."""
        is_idle = not self._engine.has_work
        try:
            self._commands.get(block=is_idle or self._gives_way, timeout=None if is_idle else _GIVE_WAY_SECONDS)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            pass

    def _add(self, sequence: Sequence) -> None:
        try:
            self._engine.add(sequence)
        except HearthdError as error:
            failed = Failed(error)
            self._call_loop(lambda: self._deliver([(sequence, failed)]))

    def _call_loop(self, callback: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: the daemon has gone on without this thread
            self._must_stop = True

    def _fail_to_load(self, error: BaseException) -> None:
        self.state = State.ENDED
        self._loaded.set_exception(error)
        self._ended.set_result(None)
