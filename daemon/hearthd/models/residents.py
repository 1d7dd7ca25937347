"""The models in memory: how one comes, who makes room for it, how one goes.

    come    one at a time, in the order of asking: look at the bundle, make room, load and prove in its own thread
    room    `models.max_bytes`; what has no room takes that of others (`room` chooses them)
    go      nobody new may use it, its users finish, its thread ends, and its memory is given back to the system

Who waits, and for what, `pool` knows, whose other half this is. Of the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from hearthd.board.governor import Throttle
from hearthd.configuration.config import Config
from hearthd.errors import ConfigError, HearthdError, NotServingError
from hearthd.inference.baton import Baton
from hearthd.inference.counts import Counts
from hearthd.inference.model import Model
from hearthd.inference.shared_prompts import encode_shared_prompts
from hearthd.inference.worker import Worker
from hearthd.kv.shared import SharedPrompts
from hearthd.logs import log_incident
from hearthd.models import heap
from hearthd.models.bell import Bell
from hearthd.models.entry import Entry, Failure
from hearthd.models.facts import ModelFacts, facts_of
from hearthd.models.room import choose_leaving

__all__ = ["Residents"]

_logger = logging.getLogger(__name__)

# After a load that failed: a disk that is gone is not asked again by each of many callers.
_PAUSE_SECONDS: Final = 10.0


class Residents:
    """Every model that is loaded, or on its way in or out."""

    def __init__(
        self,
        config: Config,
        load: Callable[[Config], Model],
        survey: Callable[[Config], ModelFacts] | None,
        changed: Bell,
        throttle: Callable[[], Throttle],
    ) -> None:
        """load: called in a model's inference thread. survey: in another one. Both get the model's own configuration.

        changed: rung at whatever somebody may wait for.
        """
        self.config = config
        """In force. `pool` exchanges it."""
        self.entries: list[Entry] = []
        """Those that are loaded, also such as are no longer configured and have not left yet."""
        self.alive: list[Worker] = []
        """All inference threads, also those of models that are not proven yet."""
        self.retired = Counts()
        """Of the models that have left."""
        self.is_closed = False
        """Nothing is loaded any more."""
        self.crashed: asyncio.Future[None] | None = None
        """Fails with the error of the first thread that an exception ended."""
        self._load = load
        self._survey = survey
        self._changed = changed
        self._baton = Baton()
        self._throttle = throttle
        # The fastest load of any model so far.
        self._seconds_per_byte: float | None = None
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    # Coming.

    def bring(self, entry: Entry) -> None:
        """Let a model be loaded in its turn, unless it is loaded or on its way."""
        if entry.bringing is None and not entry.is_usable:
            entry.bringing = self._spawn(self._load_in_turn(entry))

    def expect(self, entry: Entry) -> None:
        """Let a model be loaded for those who may come again, unless others would have to leave for it."""
        is_refused = entry.failure is not None and time.monotonic() < entry.failure.retry_at
        if not is_refused and not entry.is_usable and self._fits(entry):
            entry.is_expected = True
            self.bring(entry)

    async def _load_in_turn(self, entry: Entry) -> None:
        try:
            if not await self._try_to_load(entry):
                # Not before the error has gone, which refers to what was loaded so far.
                await asyncio.to_thread(heap.let_go)
        finally:
            entry.bringing, entry.is_expected = None, False
            self._changed.ring()

    async def _try_to_load(self, entry: Entry) -> bool:
        """Load a model in its turn, if somebody wants it still. Returns whether that did not fail."""
        try:
            # A load needs more memory than what it leaves, and all cores.
            async with self._turn:
                # One that is leaving must have gone before it can come again; it may also have been asked to stay.
                while entry.worker is not None and self._is_missing(entry):
                    self.part_with(entry)
                    await self._changed.wait()
                if self._is_missing(entry):
                    await self.look_at(entry)
                    await self._make_room(entry)
                if self._is_missing(entry):
                    engine = self.config.for_model(entry.name).engine
                    await self.load(entry)
                    if entry.is_removed:
                        self.dismiss(entry)
                    elif self.config.for_model(entry.name).engine != engine:
                        self.renew(entry)  # before anybody has it
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            self.note_failure(entry, error)
            return False
        return True

    def _is_missing(self, entry: Entry) -> bool:
        return self._is_wanted(entry) and not entry.is_usable

    def _is_wanted(self, entry: Entry) -> bool:
        if self.is_closed or entry.is_removed:
            return False
        return entry.num_waiting > 0 or entry.keep or (entry.is_expected and self._fits(entry))

    def _fits(self, entry: Entry) -> bool:
        """Whether there is room for a model that is not in memory."""
        limit = self.config.models.max_bytes
        return not limit or entry.memory_bytes + sum(each.memory_bytes for each in self.entries) <= limit

    async def look_at(self, entry: Entry) -> None:
        """Find out what is known of a model before it is loaded. Raises what the survey raises."""
        if self._survey is not None:
            entry.facts = await asyncio.to_thread(self._survey, self.config.for_model(entry.name))

    async def load(self, entry: Entry) -> Model:
        """Load and prove a model. Raises whatever that raises."""
        before = self.config
        entry.loading_since = started = time.monotonic()
        config = before.for_model(entry.name)
        _logger.info("loading %s", entry.name)
        worker = Worker(
            partial(self._load, config),
            max_queued=config.limits.max_queued,
            stream_backlog_bytes=config.server.stream_backlog_bytes,
            stream_interval_seconds=config.server.stream_interval_ms / 1000,
            baton=self._baton,
            throttle=self._throttle,
        )
        self.alive.append(worker)
        try:
            model = await worker.start()
        except Exception:
            # It holds what it has loaded until its end.
            await worker.wait_until_gone()
            self.alive.remove(worker)
            raise
        finally:
            entry.loading_since = None
        entry.facts, entry.worker, entry.failure = facts_of(model, entry.memory_bytes), worker, None
        entry.num_loads += 1
        self.entries.append(entry)
        # They may have changed meanwhile.
        limits = self.config.limits
        worker.change_limits(max_queued=limits.max_queued, default_max_tokens=limits.default_max_tokens)
        if self.config is not before:
            self.share_prompts(worker)
        if self.is_closed:
            worker.begin_drain()
        self._spawn(self._watch(worker))
        seconds = time.monotonic() - started
        entry.load_seconds = min(seconds, entry.load_seconds or seconds)
        if model.size_bytes:
            pace = seconds / model.size_bytes
            self._seconds_per_byte = min(pace, self._seconds_per_byte or pace)
        _logger.info(
            "serving %s: %d slots, context %d, %d waiting at most; loaded in %.1f s",
            model.name,
            model.engine.num_slots,
            model.engine.context_length,
            worker.max_queued,
            seconds,
        )
        self.rest(entry)
        return model

    def seconds_until_loaded(self, entry: Entry) -> float | None:
        """Return when a model that is not in memory would be there if its load began now, or goes on; None: unknown.

        As long as its fastest load; if there was none, by its size, at the pace of the fastest load so far. Who is
        loaded before it, or has to leave for it, is not counted.
        """
        seconds = entry.load_seconds
        if seconds is None and entry.facts is not None and self._seconds_per_byte is not None:
            seconds = entry.facts.size_bytes * self._seconds_per_byte
        if seconds is None or entry.worker is not None:
            return None
        since = entry.loading_since
        return seconds if since is None else max(seconds - (time.monotonic() - since), 0.0)

    def share_prompts(self, worker: Worker) -> None:
        """Let a model share the beginnings of prompts that the configuration in force says, and no others."""
        self._spawn(self._share_prompts(worker))

    async def _share_prompts(self, worker: Worker) -> None:
        try:
            shared, made_from = SharedPrompts(), None
            # It may change while this is at work.
            while made_from is not self.config:
                made_from = self.config
                shared = await asyncio.to_thread(encode_shared_prompts, made_from, worker.model.tokenizer)
            worker.share_prompts(shared)
        except NotServingError:
            pass  # it has left meanwhile
        except HearthdError as error:
            _logger.warning("the prompts of before are shared: %s", error)

    def note_failure(self, entry: Entry, error: Exception) -> None:
        """Remember, for those who ask next, that a model cannot be loaded; tell the journal why."""
        if isinstance(error, HearthdError):
            # Its words only: a handler may keep what it gets, and the error holds what was loaded so far.
            _logger.error("%s cannot be loaded: %s", entry.name, str(error))
            why = "the daemon's journal says why"
        else:
            why = f"incident {log_incident(f'{entry.name} cannot be loaded', error)}, see the daemon's journal"
        text = f"{entry.name} cannot be loaded now: {why}; it is tried again at a request after {_PAUSE_SECONDS:g} s"
        entry.failure = Failure(text, time.monotonic() + _PAUSE_SECONDS)

    async def _watch(self, worker: Worker) -> None:
        try:
            await worker.wait_until_ended()
        except Exception as error:  # noqa: BLE001 - handed on
            if self.crashed is not None and not self.crashed.done():
                self.crashed.set_exception(error)

    def renew(self, entry: Entry) -> None:
        """Find out what is known of a model that is new, or configured otherwise; let what is loaded of it go."""
        entry.failure = None
        self.dismiss(entry)
        self._spawn(self._renew(entry))

    async def _renew(self, entry: Entry) -> None:
        try:
            await self.look_at(entry)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            self.note_failure(entry, error)
        else:
            if entry.keep and not self.is_closed:
                self.bring(entry)
        self._changed.ring()

    # Making room.

    async def _make_room(self, entry: Entry) -> None:
        """Let others go until a model fits the budget, or nobody waits for it any more."""
        while self._is_wanted(entry) and not self._fits(entry):
            # Each time: a reload may have changed it all.
            limit = self.config.models.max_bytes
            kept = sum(other.memory_bytes for other in self.entries if other.is_kept)
            leaving = choose_leaving(other for other in self.entries if not other.is_kept)
            if leaving is None or kept + entry.memory_bytes > limit:
                raise ConfigError(
                    f"it takes {entry.memory_bytes} bytes, beside {kept} of models that are kept in memory; "
                    f"models.max_bytes is {limit}: raise it, or {self.how_to_need_less}"
                )
            was_leaving = leaving.is_leaving
            self.part_with(leaving)
            while leaving.worker is not None and self._is_wanted(entry):
                await self._changed.wait()
            # Nobody waits for its room any more. What has been told to end ends.
            if not was_leaving and not leaving.must_go and leaving.worker is not None and leaving.worker.is_admitting:
                leaving.is_leaving = False
                self._changed.ring()

    def keep_within_budget(self) -> None:
        """Let go what a budget that was lowered has no room for; what is used now, when its users have done."""
        limit = self.config.models.max_bytes
        staying = [entry for entry in self.entries if not entry.is_leaving]
        while limit and sum(entry.memory_bytes for entry in staying) > limit:
            leaving = choose_leaving(entry for entry in staying if not entry.is_kept)
            if leaving is None:
                return
            staying.remove(leaving)
            self.part_with(leaving)

    @property
    def how_to_need_less(self) -> str:
        """What makes models smaller in memory, as a remedy."""
        if self.config.engine.kv_bytes:
            return "lower engine.kv_bytes, which each of them may take for its conversations"
        return "give the models fewer slots or a shorter context_length"

    # Going.

    def rest(self, entry: Entry) -> None:
        """Note that nobody uses a model now."""
        self._changed.ring()
        entry.stop_idling()
        if entry.idle_seconds and not entry.keep and entry.worker is not None:
            entry.idle_timer = asyncio.get_running_loop().call_later(entry.idle_seconds, self._part_if_idle, entry)

    def _part_if_idle(self, entry: Entry) -> None:
        if entry.is_usable and not entry.num_users and not entry.keep:
            self.part_with(entry)

    def part_with(self, entry: Entry) -> None:
        """Let a model go when those who use it have done; nobody new may use it. No effect on one that is not there."""
        if entry.worker is None:
            return
        if not entry.is_leaving:
            entry.is_leaving = True
            self._changed.ring()
        if entry.parting is None:
            entry.parting = self._spawn(self._unload(entry, entry.worker))

    def dismiss(self, entry: Entry) -> None:
        """Let a model go, if it is there, as `part_with`; nothing lets it stay."""
        entry.must_go = entry.worker is not None
        self.part_with(entry)

    async def _unload(self, entry: Entry, worker: Worker) -> None:
        try:
            while entry.num_users and entry.is_leaving:
                await self._changed.wait()
            if not entry.is_leaving:
                return
            worker.stop()
            await worker.wait_until_gone()
            # In a thread: a collection takes as long as many tokens, and so does giving memory back. Nobody gets the
            # room before.
            await asyncio.to_thread(heap.let_go)
            self.alive.remove(worker)
            self.entries.remove(entry)
            self.retired += worker.counts
            entry.worker = None
            _logger.info("%s is unloaded", entry.name)
        finally:
            entry.parting, entry.is_leaving, entry.must_go = None, False, False
            self._changed.ring()

    # Ending.

    async def wait_until_gone(self) -> None:
        """Return when all threads have ended and nothing is on its way any more. After `Worker.stop` of all."""
        for worker in self.alive:
            await worker.wait_until_gone()
        for entry in self.entries:
            entry.stop_idling()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
