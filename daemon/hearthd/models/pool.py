"""All configured models: who asks for one gets it loaded, and has it for as long as it is needed.

    async with pool.using(entry) as worker: ...

waits until the model is loaded, as long as it may take; in the block nobody takes it away. A caller who leaves stops
waiting, and a load that nobody waits for any more is not begun. One that fails is told to those who wait for it and to
those who come in the next seconds; then it is tried again. The default model is loaded first, before the daemon says
READY: without it there is no daemon.

Knows no gRPC. Of the event loop. Called by `services` (use) and `server` (life).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from hearthd.board.governor import FULL, Throttle
from hearthd.configuration.config import Config, ModelOptions
from hearthd.errors import ConfigError, DeadlineTooShortError, HearthdError, NotServingError, QueueFullError
from hearthd.inference.counts import Counts
from hearthd.inference.model import Model
from hearthd.inference.worker import State, Worker
from hearthd.models.bell import Bell
from hearthd.models.entry import Entry
from hearthd.models.facts import ModelFacts
from hearthd.models.residents import Residents
from hearthd.sequences.events import Queued

__all__ = ["ModelPool"]

# A chat that finds too many before it comes again after this long.
_RETRY_SECONDS: Final = 1.0


class ModelPool:
    """Every model that the daemon serves."""

    def __init__(
        self,
        config: Config,
        load: Callable[[Config], Model],
        survey: Callable[[Config], ModelFacts] | None = None,
        throttle: Callable[[], Throttle] = lambda: FULL,
    ) -> None:
        """load: called in a model's inference thread. survey: says what is known of it before, in another thread.

        Both get the configuration as that model has it. Without a survey no model's size is known before it is loaded.
        """
        self._config = config
        self._entries = {name: _entry(config, name) for name in config.model_names}
        self.changed = Bell()
        """Rings when a model is waited for, loaded, no longer used, about to leave, gone, or failed."""
        self._residents = Residents(config, load, survey, self.changed, throttle)
        self.state = State.LOADING
        """Of the daemon: it serves when the default model has been proven."""

    # What there is.

    @property
    def default(self) -> Entry:
        """The model of requests that name none."""
        return self._entries[self._config.model.name]

    @property
    def entries(self) -> list[Entry]:
        """All models, the default one first."""
        return list(self._entries.values())

    @property
    def workers(self) -> list[Worker]:
        """The inference threads of the models that are loaded, and of those that leave for as long as they are there.

        The last thing of a model that leaves is its memory's return: then its thread has no model any more.
        """
        return [worker for worker in self._threads if worker.loaded is not None]

    @property
    def num_chats(self) -> int:
        """Chats that are admitted to any model and have not ended."""
        return sum(worker.num_chats for worker in self.workers)

    @property
    def num_running(self) -> int:
        """Those of them that can run at once."""
        return sum(min(worker.num_chats, worker.num_slots) for worker in self.workers)

    @property
    def max_running(self) -> int:
        """Chats that can run at once, of all models that are loaded; before, as configured for the default one."""
        slots = sum(worker.num_slots for worker in self.workers)
        return slots or self._config.for_model(self._config.model.name).engine.slots

    @property
    def max_queued(self) -> int:
        """Chats that may wait for a slot of each model."""
        return self._config.limits.max_queued

    @property
    def counts(self) -> Counts:
        """Of all models since the start."""
        return sum((worker.counts for worker in self._threads), self._residents.retired)

    @property
    def _threads(self) -> list[Worker]:
        return [entry.worker for entry in self._residents.entries if entry.worker is not None]

    def health(self) -> dict[str, bool]:
        """Return for each model whether a chat with it can begin, though it may have to be loaded first."""
        return {entry.name: entry.failure is None for entry in self.entries}

    def find_problem(self) -> str | None:
        """Return which models cannot be loaded; None if there is none."""
        failed = [entry.name for entry in self.entries if entry.failure is not None]
        return f"cannot be loaded: {', '.join(failed)}; the journal says why" if failed else None

    # Using them.

    def find(self, name: str) -> Entry | None:
        """Return a model by its name; None if there is none."""
        return self._entries.get(name)

    def require_loaded(self) -> None:
        """Raise NotServingError until the default model is there."""
        if self.state is State.LOADING:
            raise NotServingError("the daemon is still loading the model; try again in a few seconds")

    @asynccontextmanager
    async def using(
        self,
        entry: Entry,
        tell: Callable[[Queued], Awaitable[None]] | None = None,
        seconds_left: float | None = None,
    ) -> AsyncIterator[Worker]:
        """Have a model: loaded, and not unloaded before the block ends.

        tell: hears once, if it is not loaded yet, of the wait. seconds_left: until the caller's deadline.
        Raises NotServingError if it cannot be loaded, or not in time, QueueFullError if too many wait for that,
        DeadlineTooShortError if it would not be loaded before the deadline.
        """
        self.require_loaded()
        if not entry.is_usable:
            self._check_deadline(entry, seconds_left)
            await self._wait_until_usable(entry, tell)
        worker = entry.worker
        assert worker is not None
        entry.stop_idling()
        entry.num_users += 1
        entry.last_used = time.monotonic()
        try:
            yield worker
        finally:
            entry.num_users -= 1
            entry.last_used = time.monotonic()
            if not entry.num_users:
                self._residents.rest(entry)

    def _check_deadline(self, entry: Entry, seconds_left: float | None) -> None:
        seconds = self._residents.seconds_until_loaded(entry)
        if seconds_left is not None and seconds is not None and seconds > seconds_left:
            # Or those who never have the time would never get it.
            self._residents.expect(entry)
            raise DeadlineTooShortError(
                f"{entry.name} has to be loaded first, which takes about {seconds:.1f} s, and the deadline is in "
                f"{max(seconds_left, 0.0):.1f} s: give more time, or ask a model that is loaded; `hearth models` lists "
                "them"
            )

    async def _wait_until_usable(self, entry: Entry, tell: Callable[[Queued], Awaitable[None]] | None) -> None:
        known, seconds = entry.failure, self._config.models.max_wait_seconds
        if known is not None and time.monotonic() < known.retry_at:
            raise NotServingError(known.text, retry_after_seconds=None)
        most = self._config.for_model(entry.name).engine.slots + self.max_queued
        if entry.num_waiting >= most:
            raise QueueFullError(
                f"the queue is full: {most} chats wait for {entry.name} to be loaded; try again later", _RETRY_SECONDS
            )
        entry.num_waiting += 1
        self.changed.ring()
        try:
            async with asyncio.timeout(seconds):
                if tell is not None:
                    await tell(Queued(entry.num_waiting - 1, entry.load_seconds))
                while not entry.is_usable:
                    if entry.failure is not None and entry.failure is not known:
                        raise NotServingError(entry.failure.text, retry_after_seconds=None)
                    if entry.is_removed:
                        raise NotServingError(
                            f"{entry.name} is not served any more; `hearth models` lists what is",
                            retry_after_seconds=None,
                        )
                    if self.state is not State.SERVING:
                        raise NotServingError(
                            "the daemon is shutting down; try again in a few seconds, or ask another one"
                        )
                    self._residents.bring(entry)
                    await self.changed.wait()
        except TimeoutError:
            raise NotServingError(
                f"{entry.name} could not be loaded within models.max_wait_seconds, {seconds:g}; try again later, or "
                "ask another model",
                retry_after_seconds=None,
            ) from None
        finally:
            entry.num_waiting -= 1
            self.changed.ring()

    # The configuration.

    def change_limits(self, *, max_queued: int, default_max_tokens: int) -> None:
        """Admit by other limits from the next chat on; those that are admitted stay."""
        limits = replace(self._config.limits, max_queued=max_queued, default_max_tokens=default_max_tokens)
        self._config = self._residents.config = replace(self._config, limits=limits)
        for worker in self.workers:
            worker.change_limits(max_queued=max_queued, default_max_tokens=default_max_tokens)

    def change_shared_prompts(self, config: Config) -> None:
        """Share the beginnings of prompts that a configuration, its policy and its roles say, and no others."""
        cache = replace(self._config.cache, shared_prompts=config.cache.shared_prompts)
        self._config = replace(self._config, cache=cache, policy=config.policy, roles=config.roles)
        self._residents.config = self._config
        for worker in self.workers:
            self._residents.share_prompts(worker)

    def change_models(self, config: Config) -> None:
        """Serve the models that a configuration names, each as it says; but the default one stays as it is.

        One that is not named any more, or otherwise than before, goes when its users have done.
        """
        old = self._config
        new = replace(old, models=config.models, model_options=config.model_options)
        self._config = self._residents.config = new
        before = self._entries
        self._entries = {name: before.get(name) or _entry(new, name) for name in new.model_names}
        for name in before.keys() - self._entries.keys():
            before[name].is_removed = True
            self._residents.dismiss(before[name])
        for name, entry in self._entries.items():
            if entry is self.default:
                continue
            fresh = _entry(new, name)
            entry.keep, entry.idle_seconds = fresh.keep, fresh.idle_seconds
            is_new, is_other = name not in before, new.for_model(name).engine != old.for_model(name).engine
            if is_new or is_other:
                self._residents.renew(entry)
            elif not entry.num_users:
                self._residents.rest(entry)
        self._residents.keep_within_budget()
        self.changed.ring()

    # The daemon's life.

    async def start(self) -> Model:
        """Load and prove the default model; raise whatever that raises. The others come when they are asked for."""
        self._residents.crashed = asyncio.get_running_loop().create_future()
        # asyncio complains of an error that nobody has asked for; a daemon that is told to stop does not ask.
        self._residents.crashed.add_done_callback(lambda done: done.cancelled() or done.exception())
        await self._residents.look_at(self.default)
        for entry in self.entries[1:]:
            try:
                await self._residents.look_at(entry)
            except HearthdError as error:
                self._residents.note_failure(entry, error)
        self._check_kept()
        model = await self._residents.load(self.default)
        if self.state is State.LOADING:
            self.state = State.SERVING
        for entry in self.entries:
            if entry.keep and entry.failure is None:
                self._residents.bring(entry)
        return model

    def _check_kept(self) -> None:
        """Raise ConfigError if the models that are never unloaded do not fit the budget."""
        limit = self._config.models.max_bytes
        kept = sum(entry.memory_bytes for entry in self.entries if entry.keep)
        if limit and kept > limit:
            raise ConfigError(
                f"models.max_bytes is {limit}, and the models that are kept in memory take {kept}; raise it, or "
                f"{self._residents.how_to_need_less}"
            )

    async def ping(self) -> None:
        """Return when a no-op has crossed the queue of every loaded model; never, if one of their threads is stuck."""
        await asyncio.gather(*map(_ping, self.workers))

    def begin_drain(self) -> None:
        """Admit no more chats, and load no more models."""
        self.state = State.DRAINING
        self._residents.is_closed = True
        for worker in self.workers:
            worker.begin_drain()
        self.changed.ring()

    async def wait_until_idle(self) -> None:
        """Return when no admitted chat is left. After `begin_drain`."""
        for worker in self.workers:
            await worker.wait_until_idle()

    def fail_chats(self, error: Exception) -> None:
        """End every chat with an error."""
        for worker in self.workers:
            worker.fail_chats(error)

    async def wait_until_crashed(self) -> None:
        """Raise the EngineCrashedError of the first model whose thread an exception ended. One ends the daemon."""
        assert self._residents.crashed is not None
        await asyncio.shield(self._residents.crashed)

    def stop(self) -> None:
        """Let all threads end after the step that runs now; stop runs in the middle."""
        self.state = State.ENDED
        self._residents.is_closed = True
        for worker in self._residents.alive:
            worker.stop()
        self.changed.ring()

    async def wait_until_gone(self) -> None:
        """Return when all threads have ended."""
        await self._residents.wait_until_gone()


def _entry(config: Config, name: str) -> Entry:
    options = config.model_options.get(name, ModelOptions())
    keep = name == config.model.name if options.keep is None else options.keep
    return Entry(name, keep=keep, idle_seconds=options.idle_seconds)


async def _ping(worker: Worker) -> None:
    """Ping a thread that may be on its way out: one that has ended is not stuck."""
    ping, ended = asyncio.ensure_future(worker.ping()), asyncio.ensure_future(worker.wait_until_gone())
    try:
        await asyncio.wait((ping, ended), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in (ping, ended):
            each.cancel()
