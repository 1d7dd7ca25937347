"""Several models in one daemon: who is loaded when, who leaves for whom, and what those hear who wait."""

import asyncio
import random
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from hearthd.configuration.config import ModelOptions
from hearthd.errors import (
    BundleError,
    ConfigError,
    DeadlineTooShortError,
    EngineCrashedError,
    NotServingError,
    QueueFullError,
)
from hearthd.inference.worker import State
from hearthd.models.entry import Failure, ModelState
from hearthd.models.pool import ModelPool
from hearthd.models.room import choose_leaving
from hearthd.scheduling.chunks import ChunkSizes
from hearthd.scheduling.pace import Pace
from hearthd.sequences.events import Queued
from serving import NAME, asynchronous
from several_models import MODEL_BYTES, Shelf, ask, chat, entry, pooling, sequence, several_config, until


def states(pool: ModelPool) -> dict[str, ModelState]:
    return {each.name: each.state for each in pool.entries}


# Loading.


@asynchronous
async def test_a_model_is_loaded_when_it_is_asked_for_and_stays(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "other")) as (pool, shelf):
        assert states(pool) == {NAME: ModelState.LOADED, "other": ModelState.LOADABLE}
        assert shelf.loads == [NAME]
        first = await ask(pool, "other")
        assert states(pool)["other"] is ModelState.LOADED
        assert await ask(pool, "other") == first
        assert shelf.loads == [NAME, "other"]


@asynchronous
async def test_models_answer_in_turn_and_at_once_as_they_do_alone(tmp_path: Path) -> None:
    names, lengths = (NAME, "a", "b"), range(4, 12)
    alone = {}
    for name in names:
        async with pooling(several_config(tmp_path, "a", "b")) as (pool, _):
            for length in lengths:
                alone[name, length] = await ask(pool, name, length, 20)
    assert len(set(alone.values())) == len(alone), "models that answer alike prove nothing"
    async with pooling(several_config(tmp_path, "a", "b", slots=3)) as (pool, _):
        in_turn = {(name, length): await ask(pool, name, length, 20) for length in lengths for name in names}
        assert in_turn == alone
        keys = [key for key in alone if key[1] < 8]
        together = await asyncio.gather(*(ask(pool, name, length, 20) for name, length in keys))
        assert dict(zip(keys, together, strict=True)) == {key: alone[key] for key in keys}
        assert pool.counts.finished == 24 + 12


@asynchronous
async def test_many_who_ask_for_a_model_that_is_not_there_cause_one_load(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "other", slots=4)) as (pool, shelf):
        answers = await asyncio.gather(*(ask(pool, "other") for _ in range(6)))
        assert len(set(answers)) == 1
        assert shelf.loads == [NAME, "other"]


@asynchronous
async def test_the_default_model_answers_while_another_one_is_loaded(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "other")) as (pool, shelf):
        is_open = shelf.close("other")
        waiting = asyncio.create_task(ask(pool, "other"))
        await shelf.wait_for_load()
        assert states(pool)["other"] is ModelState.LOADING
        assert await ask(pool, NAME)
        await pool.ping()
        assert not waiting.done()
        is_open.set()
        assert await waiting


@asynchronous
async def test_a_model_that_is_kept_is_loaded_without_being_asked_for(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "other", keep=True, idle_seconds=0.01)) as (pool, _):
        await until(pool, lambda: states(pool)["other"] is ModelState.LOADED)
        await ask(pool, "other")
        assert entry(pool, "other").idle_timer is None


# Failing.


@asynchronous
async def test_a_failed_load_is_told_to_all_who_wait_and_tried_again_after_a_pause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with pooling(several_config(tmp_path, "other")) as (pool, shelf):
        shelf.failing["other"] = BundleError("/models/other/model.data is damaged")
        is_open = shelf.close("other")
        waiting = [asyncio.create_task(ask(pool, "other")) for _ in range(3)]
        await shelf.wait_for_load()
        is_open.set()
        told = {str(error) for error in await asyncio.gather(*waiting, return_exceptions=True)}
        assert told == {
            "other cannot be loaded now: the daemon's journal says why; it is tried again at a request after 10 s"
        }
        assert "other cannot be loaded: /models/other/model.data is damaged" in caplog.text
        assert states(pool)["other"] is ModelState.FAILED
        assert pool.find_problem() == "cannot be loaded: other; the journal says why"
        # In the pause nobody tries.
        with pytest.raises(NotServingError, match="cannot be loaded now"):
            await ask(pool, "other")
        assert shelf.loads == [NAME, "other"]
        # After it the next one does, and hears of a new failure.
        _end_pause(pool)
        with pytest.raises(NotServingError, match="cannot be loaded now"):
            await ask(pool, "other")
        assert shelf.loads == [NAME, "other", "other"]
        _end_pause(pool)
        shelf.failing.clear()
        assert await ask(pool, "other")
        assert pool.find_problem() is None
        assert pool.counts.refused == 0


def _end_pause(pool: ModelPool) -> None:
    other = entry(pool, "other")
    assert other.failure is not None
    other.failure = Failure(other.failure.text, 0.0)


@asynchronous
async def test_a_fault_while_loading_is_told_by_an_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with pooling(several_config(tmp_path, "other")) as (pool, shelf):
        shelf.failing["other"] = OSError("canary")
        with pytest.raises(NotServingError, match=r"incident [0-9a-f]+, see the daemon's journal") as caught:
            await ask(pool, "other")
        assert str(caught.value).partition("incident ")[2].split(",")[0] in caplog.text
        assert "canary" not in caplog.text + str(caught.value)
        assert await ask(pool, NAME)


@asynchronous
async def test_a_bundle_that_cannot_be_read_at_the_start_is_a_warning_and_ends_nothing(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.failing["other's bundle"] = BundleError("gone")
    async with pooling(several_config(tmp_path, "other"), shelf) as (pool, _):
        assert states(pool) == {NAME: ModelState.LOADED, "other": ModelState.FAILED}
        assert await ask(pool, NAME)
        shelf.failing.clear()
        _end_pause(pool)
        assert await ask(pool, "other")


@asynchronous
async def test_a_default_model_that_does_not_load_raises_its_own_error(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.failing[NAME] = BundleError("model.data is damaged")
    pool = ModelPool(several_config(tmp_path, "other"), shelf.load, shelf.survey)
    with pytest.raises(BundleError, match=r"model\.data is damaged"):
        await pool.start()
    pool.stop()
    await pool.wait_until_gone()


@asynchronous
async def test_a_crash_of_any_models_thread_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pooling(several_config(tmp_path, "other")) as (pool, _):
        crashing = asyncio.create_task(pool.wait_until_crashed())
        async with pool.using(entry(pool, "other")) as worker:

            def crash() -> list[object]:
                raise RuntimeError("canary")

            monkeypatch.setattr(worker.model.engine, "step", crash)
            with pytest.raises(EngineCrashedError) as told:
                await chat(worker)
        with pytest.raises(EngineCrashedError) as caught:
            await crashing
        assert caught.value.incident == told.value.incident


# Waiting.


@asynchronous
async def test_who_leaves_stops_waiting_and_the_others_go_on(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "other")) as (pool, shelf):
        is_open = shelf.close("other")
        leaving, staying = (asyncio.create_task(ask(pool, "other")) for _ in range(2))
        await shelf.wait_for_load()
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        assert entry(pool, "other").num_waiting == 1
        is_open.set()
        assert await staying
        assert entry(pool, "other").num_users == entry(pool, "other").num_waiting == 0


@asynchronous
async def test_a_load_that_nobody_waits_for_any_more_is_not_begun(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "a", "b")) as (pool, shelf):
        is_open = shelf.close("a")
        first, second = asyncio.create_task(ask(pool, "a")), asyncio.create_task(ask(pool, "b"))
        await shelf.wait_for_load()
        await until(pool, lambda: entry(pool, "b").num_waiting)
        second.cancel()
        await asyncio.wait([second])
        is_open.set()
        assert await first
        await until(pool, lambda: entry(pool, "b").bringing is None)
        assert shelf.loads == [NAME, "a"]
        assert states(pool)["b"] is ModelState.LOADABLE


@asynchronous
async def test_the_wait_for_a_model_is_bounded(tmp_path: Path) -> None:
    config = several_config(tmp_path, "other")
    object.__setattr__(config.models, "max_wait_seconds", 0.02)
    async with pooling(config) as (pool, shelf):
        is_open = shelf.close("other")
        with pytest.raises(NotServingError, match=r"within models\.max_wait_seconds, 0\.02; try again later"):
            await ask(pool, "other")
        is_open.set()
        await until(pool, lambda: states(pool)["other"] is ModelState.LOADED)
        assert await ask(pool, "other")


@asynchronous
async def test_a_deadline_before_the_load_would_be_done_is_refused_at_once(tmp_path: Path) -> None:
    # A refusal begins a load where there is room: none at first.
    config = several_config(tmp_path, "other", "new", max_bytes=MODEL_BYTES, idle_seconds=0.01)
    async with pooling(config) as (pool, shelf):
        # A default model of 2,000 bytes was loaded in 4 s.
        pool._residents._seconds_per_byte = 4.0 / 2000
        with pytest.raises(DeadlineTooShortError) as caught:
            async with pool.using(entry(pool, "other"), seconds_left=3.9):
                pass
        assert str(caught.value) == (
            "other has to be loaded first, which takes about 4.0 s, and the deadline is in 3.9 s: give more time, or "
            "ask a model that is loaded; `hearth models` lists them"
        )
        assert entry(pool, "other").bringing is None
        object.__setattr__(config.models, "max_bytes", 0)
        # Nobody who has the time, or no deadline, is sent away, nor anybody whose model is there.
        async with (
            pool.using(entry(pool, "other"), seconds_left=4.1),
            pool.using(entry(pool, "other"), seconds_left=0.1),
        ):
            pass
        async with pool.using(entry(pool, "new")):
            pass
        for _ in range(2):
            await shelf.wait_for_load()
        await until(pool, lambda: states(pool)["other"] is ModelState.LOADABLE)
        # What its own fastest load has taken is better known.
        entry(pool, "other").load_seconds = 9.0
        object.__setattr__(config.models, "max_bytes", MODEL_BYTES)
        with pytest.raises(DeadlineTooShortError, match=r"takes about 9\.0 s"):
            async with pool.using(entry(pool, "other"), seconds_left=8.0):
                pass
        object.__setattr__(config.models, "max_bytes", 0)
        # And what has passed of a load that goes on, is not waited for.
        is_open = shelf.close("other")
        waiting = asyncio.create_task(ask(pool, "other"))
        await shelf.wait_for_load()
        entry(pool, "other").loading_since = time.monotonic() - 2.0
        in_time = asyncio.create_task(ask(pool, "other", seconds_left=7.5))
        with pytest.raises(DeadlineTooShortError, match=r"takes about [67]\.\d s"):
            await ask(pool, "other", seconds_left=6.0)
        is_open.set()
        assert await waiting == await in_time


@asynchronous
async def test_a_model_that_nobody_has_the_time_to_wait_for_comes_where_nobody_has_to_leave(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "a", "b", max_bytes=2 * MODEL_BYTES)) as (pool, shelf):
        a, b = entry(pool, "a"), entry(pool, "b")
        for each in (a, b):
            each.load_seconds = 40.0  # from a cold disk
        with pytest.raises(DeadlineTooShortError):
            await ask(pool, "a", seconds_left=30.0)
        await until(pool, lambda: a.is_usable and a.bringing is None)
        assert await ask(pool, "a", seconds_left=30.0)
        # The fastest load is what the next one is reckoned to take.
        assert a.load_seconds < 30.0
        with pytest.raises(DeadlineTooShortError):
            await ask(pool, "b", seconds_left=30.0)
        assert (b.bringing, b.is_expected, a.is_usable) == (None, False, True)
        assert await ask(pool, "b")
        assert not a.is_usable
        assert shelf.loads == [NAME, "a", "b"]


@asynchronous
async def test_those_who_wait_for_a_load_are_a_bounded_queue(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "other", slots=1)) as (pool, shelf):
        is_open = shelf.close("other")
        # One slot, and limits.max_queued of two.
        waiting = [asyncio.create_task(ask(pool, "other")) for _ in range(3)]
        await shelf.wait_for_load()
        await until(pool, lambda: entry(pool, "other").num_waiting == 3)
        with pytest.raises(QueueFullError, match="3 chats wait for other to be loaded") as caught:
            await ask(pool, "other")
        assert caught.value.retry_after_seconds == 1.0
        is_open.set()
        assert all(await asyncio.gather(*waiting))


@asynchronous
async def test_draining_ends_the_wait_for_a_load_and_lets_chats_finish(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.gated.add(NAME)
    async with pooling(several_config(tmp_path, "other"), shelf) as (pool, _):
        shelf.close("other")
        running = asyncio.create_task(ask(pool, NAME))
        waiting = asyncio.create_task(ask(pool, "other"))
        await shelf.wait_for_load()
        pool.begin_drain()
        with pytest.raises(NotServingError, match="shutting down"):
            await waiting
        assert not running.done()
        shelf.runners[NAME].open_gate()
        assert await running
        await pool.wait_until_idle()
        with pytest.raises(NotServingError, match="shutting down"):
            await ask(pool, "other")


@asynchronous
async def test_a_model_that_is_loaded_too_late_is_ended_with_the_others(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "other")) as (pool, shelf):
        is_open = shelf.close("other")
        waiting = asyncio.create_task(ask(pool, "other"))
        await shelf.wait_for_load()
        pool.begin_drain()
        pool.stop()
        with pytest.raises(NotServingError, match="shutting down"):
            await waiting
        is_open.set()
        await pool.wait_until_gone()
        assert pool.state is State.ENDED
        assert [each.worker and each.worker.state for each in pool.entries] == [State.ENDED] * 2
        assert pool.workers == []


# Leaving.


@asynchronous
async def test_an_idle_model_is_unloaded_and_comes_again(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "other", idle_seconds=0.01)) as (pool, shelf):
        first = await ask(pool, "other")
        await until(pool, lambda: states(pool)["other"] is ModelState.LOADABLE)
        assert [worker.model.name for worker in pool.workers] == [NAME]
        # What it has counted stays.
        assert pool.counts.finished == 1
        assert await ask(pool, "other") == first
        assert shelf.loads == [NAME, "other", "other"]
        assert pool.counts.finished == 2


@asynchronous
async def test_a_model_in_use_is_not_idle(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.gated.add("other")
    async with pooling(several_config(tmp_path, "other", idle_seconds=0.001), shelf) as (pool, _):
        running = asyncio.create_task(ask(pool, "other"))
        await until(pool, lambda: pool.num_chats)
        fired = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, fired.set)
        await fired.wait()
        assert entry(pool, "other").is_usable
        shelf.runners["other"].open_gate()
        assert await running
        await until(pool, lambda: states(pool)["other"] is ModelState.LOADABLE)


@asynchronous
async def test_the_default_model_stays_unless_the_configuration_lets_it_go(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, NAME, idle_seconds=0.01)) as (pool, _):
        assert await ask(pool, NAME)
        assert entry(pool).idle_timer is None
    async with pooling(several_config(tmp_path, NAME, idle_seconds=0.01, keep=False)) as (pool, shelf):
        await until(pool, lambda: states(pool)[NAME] is ModelState.LOADABLE)
        assert await ask(pool, NAME)
        assert shelf.loads == [NAME, NAME]


@asynchronous
async def test_room_is_made_by_the_idle_model_that_was_used_least_recently(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "a", "b", "c", max_bytes=3 * MODEL_BYTES)) as (pool, _):
        await ask(pool, "a")
        await ask(pool, "b")
        await ask(pool, "a")
        await ask(pool, "c")
        assert [each.name for each in pool.entries if each.state is ModelState.LOADED] == [NAME, "a", "c"]
        await ask(pool, "b")
        assert [each.name for each in pool.entries if each.state is ModelState.LOADED] == [NAME, "b", "c"]


@asynchronous
async def test_a_busy_model_is_not_taken_away_for_another_one(tmp_path: Path) -> None:
    async with (
        pooling(several_config(tmp_path, "a", "b", "c", max_bytes=3 * MODEL_BYTES)) as (pool, _),
        pool.using(entry(pool, "a")) as worker,
    ):
        await ask(pool, "b")
        # "a" was used before "b", and is busy: so "b" goes.
        await ask(pool, "c")
        assert states(pool)["a"] is ModelState.LOADED
        assert states(pool)["b"] is ModelState.LOADABLE
        assert await chat(worker)


@asynchronous
async def test_two_busy_models_that_do_not_fit_together_take_turns_and_none_starves(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "a", "b", max_bytes=2 * MODEL_BYTES)) as (pool, shelf):
        async with pool.using(entry(pool, "a")) as worker:
            wanting = asyncio.create_task(ask(pool, "b"))
            await until(pool, lambda: entry(pool, "a").is_leaving)
            # Who comes for "a" now waits until "b" has had its turn.
            later = asyncio.create_task(ask(pool, "a"))
            await until(pool, lambda: entry(pool, "a").num_waiting)
            answer = await chat(worker)
        assert await later == answer
        assert await wanting
        assert shelf.loads == [NAME, "a", "b", "a"]


@asynchronous
async def test_a_model_stays_when_nobody_waits_for_its_room_any_more(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "a", "b", max_bytes=2 * MODEL_BYTES)) as (pool, shelf):
        async with pool.using(entry(pool, "a")) as worker:
            wanting = asyncio.create_task(ask(pool, "b"))
            await until(pool, lambda: entry(pool, "a").is_leaving)
            wanting.cancel()
            await until(pool, lambda: entry(pool, "a").is_usable)
            answer = await chat(worker)
        assert await ask(pool, "a") == answer
        assert shelf.loads == [NAME, "a"]


@pytest.mark.parametrize("keep", [True, False])
@asynchronous
async def test_a_model_that_is_configured_otherwise_while_it_is_loaded_is_loaded_again(
    tmp_path: Path, keep: bool
) -> None:
    config = several_config(tmp_path, "a", slots=2)
    async with pooling(config) as (pool, shelf):
        is_open = shelf.close("a")
        waiting = asyncio.create_task(ask(pool, "a"))
        await shelf.wait_for_load()
        pool.change_models(replace(config, model_options={"a": ModelOptions(slots=1, keep=keep)}))
        if keep:
            waiting.cancel()
        is_open.set()
        await until(pool, lambda: entry(pool, "a").is_usable)
        async with pool.using(entry(pool, "a")) as worker:
            assert worker.num_slots == 1
        facts = entry(pool, "a").facts
        assert facts is not None
        assert facts.num_slots == 1
        assert keep or await waiting
        assert shelf.loads == [NAME, "a", "a"]


@pytest.mark.parametrize("is_removed", [True, False])
@asynchronous
async def test_a_model_that_a_reload_lets_go_does_not_stay_when_nobody_waits_for_its_room(
    tmp_path: Path, is_removed: bool
) -> None:
    config = several_config(tmp_path, "a", "b", max_bytes=2 * MODEL_BYTES, slots=2)
    options = {**config.model_options, "a": ModelOptions(slots=1)}
    if is_removed:
        del options["a"]
    async with pooling(config) as (pool, shelf):
        a = entry(pool, "a")
        async with pool.using(a):
            wanting = asyncio.create_task(ask(pool, "b"))
            await until(pool, lambda: a.is_leaving)
            pool.change_models(replace(config, model_options=options))
            wanting.cancel()
            await until(pool, lambda: entry(pool, "b").bringing is None)
            assert a.is_leaving
        await until(pool, lambda: a.worker is None)
        if not is_removed:
            async with pool.using(entry(pool, "a")) as worker:
                assert worker.num_slots == 1
            assert shelf.loads == [NAME, "a", "a"]


@asynchronous
async def test_nobody_is_admitted_to_a_model_whose_thread_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closing, go_on = threading.Event(), threading.Event()

    def close(_: float) -> None:
        closing.set()
        assert go_on.wait(30)

    async with pooling(several_config(tmp_path, "a", "b", max_bytes=2 * MODEL_BYTES)) as (pool, shelf):
        async with pool.using(entry(pool, "a")) as worker:
            answer = await chat(worker)
            # A disk that takes its time over what is on its way there.
            monkeypatch.setattr(worker.model.engine, "close", close)
        wanting = asyncio.create_task(ask(pool, "b"))
        assert await asyncio.to_thread(closing.wait, 30)
        wanting.cancel()
        await until(pool, lambda: entry(pool, "b").bringing is None)
        assert not entry(pool, "a").is_usable
        with pytest.raises(NotServingError):
            worker.admit()
        waiting = asyncio.create_task(ask(pool, "a"))
        await until(pool, lambda: entry(pool, "a").num_waiting)
        go_on.set()
        assert await waiting == answer
        assert shelf.loads == [NAME, "a", "a"]


@asynchronous
async def test_a_model_that_is_asked_to_stay_is_not_loaded_again(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "a", "b", max_bytes=2 * MODEL_BYTES)) as (pool, shelf):
        is_told, go_on = asyncio.Event(), asyncio.Event()

        async def tell(_: Queued) -> None:
            is_told.set()
            await go_on.wait()

        async def ask_slowly() -> None:
            async with pool.using(entry(pool, "a"), tell):
                pass

        async with pool.using(entry(pool, "a")):
            other = asyncio.create_task(ask(pool, "b"))
            await until(pool, lambda: entry(pool, "a").is_leaving)
            waiting = [asyncio.create_task(ask_slowly()), asyncio.create_task(ask(pool, "a"))]
            await until(pool, lambda: entry(pool, "a").bringing is not None)
            await is_told.wait()
            other.cancel()
            assert await waiting[1]
            # Its turn to be loaded comes while one still waits, and there is nothing to load.
            await until(pool, lambda: entry(pool, "a").bringing is None)
            assert entry(pool, "a").is_usable
            go_on.set()
            await waiting[0]
        assert shelf.loads == [NAME, "a"]


@asynchronous
async def test_a_model_counts_as_gone_when_its_memory_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collecting, go_on = threading.Event(), threading.Event()

    def collect() -> None:
        collecting.set()
        assert go_on.wait(30)

    monkeypatch.setattr("hearthd.models.heap.let_go", collect)
    async with pooling(several_config(tmp_path, "a", "b", max_bytes=2 * MODEL_BYTES)) as (pool, shelf):
        await ask(pool, "a")
        waiting = asyncio.create_task(ask(pool, "b"))
        assert await asyncio.to_thread(collecting.wait, 30)
        await pool.ping()
        assert (shelf.loads, states(pool)["a"]) == ([NAME, "a"], ModelState.LOADED)
        # It has nothing more to say, and what it has counted is not lost meanwhile.
        assert (len(pool.workers), pool.counts.finished) == (1, 1)
        go_on.set()
        assert await waiting
        assert shelf.loads == [NAME, "a", "b"]


@asynchronous
async def test_what_can_never_fit_is_refused_and_takes_nobodys_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with pooling(several_config(tmp_path, "other", max_bytes=2 * MODEL_BYTES - 1)) as (pool, shelf):
        with pytest.raises(NotServingError, match="other cannot be loaded now"):
            await ask(pool, "other")
        assert (
            "other cannot be loaded: it takes 100 bytes, beside 100 of models that are kept in memory; "
            "models.max_bytes is 199: raise it"
        ) in caplog.text
        assert shelf.loads == [NAME]
        assert await ask(pool, NAME)


@asynchronous
async def test_models_that_are_kept_and_do_not_fit_are_refused_at_the_start(tmp_path: Path) -> None:
    shelf = Shelf()
    pool = ModelPool(several_config(tmp_path, "a", keep=True, max_bytes=199), shelf.load, shelf.survey)
    with pytest.raises(ConfigError, match=r"199, and the models that are kept in memory take 200.*fewer slots"):
        await pool.start()
    assert shelf.loads == []
    config = several_config(tmp_path, "a", keep=True, max_bytes=199)
    config = replace(config, engine=replace(config.engine, kv_bytes=64))
    with pytest.raises(ConfigError, match=r"take 200; raise it, or lower engine\.kv_bytes"):
        await ModelPool(config, shelf.load, shelf.survey).start()


def test_who_leaves_is_idle_before_all_and_then_longest_unused() -> None:
    class Tenant:
        def __init__(self, name: str, num_users: int, last_used: float) -> None:
            self.name, self.num_users, self.last_used = name, num_users, last_used

    busy, old, new = Tenant("busy", 1, 0.0), Tenant("old", 0, 1.0), Tenant("new", 0, 2.0)
    for tenants, expected in (((busy, new, old), old), ((busy, new), new), ((busy,), busy)):
        assert choose_leaving(tenants) is expected
    assert choose_leaving(()) is None


# The watchdog.


@asynchronous
async def test_a_ping_waits_for_every_loaded_model_and_for_none_that_has_left(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.gated.add("other")
    async with pooling(several_config(tmp_path, "other", idle_seconds=0.01), shelf) as (pool, _):
        running = asyncio.create_task(ask(pool, "other"))
        await until(pool, lambda: pool.num_chats)
        runner = shelf.runners["other"]
        await asyncio.to_thread(runner.wait_for_forwards, 4)
        # Its run is stuck, with the baton: it does not answer.
        ping = asyncio.create_task(pool.ping())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.shield(ping)
        runner.open_gate()
        await ping
        assert await running
        await until(pool, lambda: states(pool)["other"] is ModelState.LOADABLE)
        await pool.ping()


@asynchronous
async def test_pings_come_back_while_models_come_and_go(tmp_path: Path) -> None:
    config = several_config(tmp_path, "a", "b", max_bytes=2 * MODEL_BYTES)
    async with pooling(config) as (pool, _):
        asking = asyncio.gather(*(ask(pool, name) for name in ("a", "b", "a", "b")))
        num_pings = 0
        while not asking.done():
            await pool.ping()
            num_pings += 1
            await asyncio.sleep(0)
        assert all(await asking)
        assert num_pings


def test_a_run_of_a_prompt_is_short_while_another_model_answers() -> None:
    pace = Pace()
    pace.note_prompt_run(100, 0.5)  # 5 ms a token
    sizes = ChunkSizes(pace, beside=64, alone=512, max_stall_seconds=0.1)
    prompt = sequence(400)
    # Alone, as many as there are in a second, by sixteens; beside others in a tenth of one.
    assert sizes.choose(prompt, [], has_others=False) == 192
    assert sizes.choose(prompt, [], has_others=True) == 16
    assert sizes.choose(prompt, [], has_others=True) == sizes.choose(prompt, [sequence()])


# All of it at random.


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_of_callers_gets_its_own_answers_within_the_budget(tmp_path: Path, seed: int) -> None:
    @asynchronous
    async def run() -> None:
        dice = random.Random(seed)
        names = (NAME, "a", "b", "c")
        config = several_config(tmp_path, *names[1:], max_bytes=2 * MODEL_BYTES, idle_seconds=0.005)
        async with pooling(config) as (pool, shelf):
            expected = {name: await ask(pool, name, 5, 8) for name in names}
            most = 0

            async def caller() -> None:
                nonlocal most
                for _ in range(4):
                    name = dice.choice(names)
                    task = asyncio.create_task(ask(pool, name, 5, 8))
                    for _ in range(dice.randrange(40)):
                        await asyncio.sleep(0)
                    if dice.random() < 0.3:
                        task.cancel()
                        await asyncio.wait([task])
                        continue
                    # Two wait beside those that run; more are refused.
                    with suppress(QueueFullError):
                        assert await task == expected[name]
                    most = max(most, sum(each.memory_bytes for each in pool.entries if each.worker is not None))

            await asyncio.gather(*(caller() for _ in range(8)))
            assert MODEL_BYTES <= most <= 2 * MODEL_BYTES
            await until(pool, lambda: len(pool.workers) == 1 and not any(each.bringing for each in pool.entries))
            assert [(each.num_users, each.num_waiting) for each in pool.entries] == [(0, 0)] * 4
            assert len(shelf.loads) > 4

    run()
