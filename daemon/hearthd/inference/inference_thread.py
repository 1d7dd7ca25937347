"""The inference thread: it loads a model, proves it, and runs step after step, each when it has the `baton`.

It is told what to do by commands, functions that it calls between two steps and while it waits for its turn. None of
them refers to the model: one that is never taken, since the thread ends, must not keep it. What comes of its steps goes
to the event loop by its `outbox`.

Knows no chats, and of asyncio only the loop and its futures. Made by `worker`, its other half.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from hearthd.board.governor import Throttle
from hearthd.errors import EngineCrashedError, HearthdError
from hearthd.generation.engine import Engine
from hearthd.inference.baton import Baton
from hearthd.inference.model import Model, prove
from hearthd.inference.outbox import Outbox
from hearthd.inference.restraint import Restraint
from hearthd.kv.shared import SharedPrompts
from hearthd.logs import log_incident
from hearthd.priority import Priority
from hearthd.sequences.events import Delta, Event, Failed, Finished
from hearthd.sequences.sequence import Sequence
from hearthd.thread_name import name_this_thread

__all__ = ["InferenceThread"]

# Whoever is more urgent than the one with the baton tells it so that often: a run that is about to begin cannot be
# stopped yet.
_ASK_AGAIN_SECONDS: Final = 0.05
# For what is on its way to the disk at the end; `server` waits a little longer for the thread.
_CLOSE_SECONDS: Final = 0.8
# The engine outlives a failed run; one that fails run after run is broken, and a new process may not be.
_MAX_FAILURES_IN_A_ROW: Final = 8


class InferenceThread:
    """One model's thread. Methods are the event loop's, but where another thread is named."""

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        baton: Baton,
        throttle: Callable[[], Throttle],
        deliver: Callable[[list[tuple[Sequence, Event]]], None],
        interval_seconds: float,
    ) -> None:
        """load: called in the thread. deliver: called on the loop, with what came of steps.

        interval_seconds: how long further words of an answer may wait for more, to be delivered together.
        """
        self._load = load
        self._baton = baton
        self._throttle = throttle
        self._deliver = deliver
        self._outbox = Outbox(self._call_loop, interval_seconds)
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._model: Model | None = None
        self._must_stop = False
        self._num_failures = 0

    @property
    def has_begun(self) -> bool:
        """Whether it was started."""
        return self._thread.ident is not None

    def start(self) -> "tuple[asyncio.Future[Model], asyncio.Future[None]]":
        """Begin. The first result: the model, loaded and proven, or the error of that. The second: the thread's end.

        A thread that cannot load its model ends well; one that an exception ends later, with EngineCrashedError.
        """
        self._loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Model] = self._loop.create_future()
        ended: asyncio.Future[None] = self._loop.create_future()
        for future in (loaded, ended):
            # asyncio complains of an error that nobody has asked for; a daemon that is told to stop does not ask.
            future.add_done_callback(lambda done: done.exception())
        self._loaded, self._ended = loaded, ended
        self._outbox.start(self._loop, self._deliver)
        self._thread.start()
        return loaded, ended

    def tell(self, command: Callable[[], object]) -> None:
        """Let the thread call a function. Any thread."""
        self._commands.put(command)

    def wake(self) -> None:
        """Let the thread see whether it is its turn. Any thread."""
        self.tell(_nothing)

    def make_way(self, priority: Priority) -> None:
        """Stop the run of this moment, if somebody so urgent need not wait for its end. Any thread.

        Should it have ended meanwhile, another one is stopped, and the engine runs that again.
        """
        model = self._model
        if model is not None and model.engine.stops_for(priority):
            model.runner.terminate()

    def stop_reading(self, sequence: Sequence) -> None:
        """Stop the run of this moment, if it reads this sequence's prompt. Any thread."""
        model = self._model
        if model is not None and model.engine.prefilling is sequence:
            model.runner.terminate()

    def stop(self) -> None:
        """Let the thread end after the step that runs now; stop a run in the middle."""
        self._must_stop = True
        self.wake()
        model = self._model
        if model is not None:
            model.runner.terminate()

    # In the thread.

    def _run(self) -> None:
        crash = self._load_and_serve()
        # Last of all: whoever hears of it finds that nothing here holds the model any more.
        if crash is None:
            self._call_loop(self._ended.set_result, None)
        else:
            self._call_loop(self._ended.set_exception, crash)

    def _load_and_serve(self) -> EngineCrashedError | None:
        """Return what ended the thread; None if it was told to end, or has nothing to serve."""
        try:
            model = self._load()
            prove(model, self._turn_of_proof)
        except BaseException as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
            self._call_loop(self._loaded.set_exception, error)
            return None
        finally:
            self._baton.leave(self)
        self._model = model
        # After loading: ONNX Runtime's own threads would have inherited the name.
        name_this_thread(self._thread.name)
        self._call_loop(self._note_loaded, model)
        try:
            self._serve(model)
        except BaseException as error:  # noqa: BLE001 - nobody may wait for a dead thread
            return EngineCrashedError(log_incident("the inference thread crashed", error))
        else:
            return None
        finally:
            self._baton.leave(self)
            self._outbox.flush()
            # Its memory goes back to the system with the last reference to it.
            self._model = None

    def _serve(self, model: Model) -> None:
        engine, restraint = model.engine, Restraint(model, self._throttle)
        engine.has_others = lambda priority: self._baton.has_others(self, priority)
        if engine.stored:
            engine.stored.on_room = self.wake
        while not self._must_stop:
            # Not even a place in line is kept while there is nothing to do.
            self._take_commands(0.0 if engine.has_work else None)
            if self._wait_for_turn(engine):
                with restraint:
                    events = engine.step()
                self._baton.leave(self, engine.urgency)
                self._judge(events)
                if events:
                    self._outbox.send(events)
            else:
                self._baton.leave(self)
        engine.close(_CLOSE_SECONDS)

    def _wait_for_turn(self, engine: Engine) -> bool:
        """Return when the baton is there, and something to do; False if there is nothing to do any more."""
        while engine.has_work and not self._must_stop:
            urgency = engine.urgency
            if self._baton.ask(self, urgency):
                return True
            self._take_commands(None if urgency is None else _ASK_AGAIN_SECONDS)
        return False

    @contextmanager
    def _turn_of_proof(self) -> Iterator[None]:
        """Have the baton for one of the few short steps that prove a model, for which somebody urgent may wait."""
        while not self._baton.ask(self, Priority.INTERACTIVE):
            self._take_commands(_ASK_AGAIN_SECONDS)
        yield
        self._baton.leave(self, Priority.INTERACTIVE)

    def _take_commands(self, wait_seconds: float | None) -> None:
        """Do what was told; if that is nothing, wait so long for something, or for as long as it takes if None."""
        with suppress(queue.Empty):
            self._commands.get(block=wait_seconds != 0, timeout=wait_seconds)()
            while True:
                self._commands.get_nowait()()

    def add(self, sequence: Sequence) -> None:
        """Let the engine have a sequence; what it refuses is delivered as failed. A command of the loop's."""
        assert self._model is not None
        try:
            self._model.engine.add(sequence)
        except HearthdError as error:
            self._outbox.send([(sequence, Failed(error))])

    def remove(self, sequence: Sequence) -> None:
        """Let the engine lose a sequence. A command of the loop's."""
        if self._model is not None:
            self._model.engine.remove(sequence)

    def share_prompts(self, shared: SharedPrompts) -> None:
        """Share these beginnings of prompts, and no others. A command of the loop's."""
        if self._model is not None:
            self._model.engine.share_prompts(shared)

    def _judge(self, events: list[tuple[Sequence, Event]]) -> None:
        """Raise the error of an engine that does nothing but fail."""
        if any(_proves_steps(sequence, event) for sequence, event in events):
            self._num_failures = 0
            return
        errors = [event.error for _, event in events if isinstance(event, Failed)]
        errors = [error for error in errors if not isinstance(error, HearthdError)]
        # A run that fails fails all the answers of its batch, and counts once.
        if errors:
            self._num_failures += 1
            if self._num_failures >= _MAX_FAILURES_IN_A_ROW:
                raise errors[0]

    def _call_loop(self, callback: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop is closed: the daemon has gone on without this thread
            self._must_stop = True

    # On the loop.

    def _note_loaded(self, model: Model) -> None:
        self._loaded.set_result(model)
        # It would keep the model for ever.
        del self._loaded


def _proves_steps(sequence: Sequence, event: Event) -> bool:
    """Whether an event comes of an engine that works. An answer's first token comes with its prompt, not of a step."""
    return isinstance(event, Finished) or (isinstance(event, Delta) and len(sequence.output_ids) > 1)


def _nothing() -> None:
    pass
