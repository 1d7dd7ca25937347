"""The inference thread: admission, order, and that whoever leaves costs no further step."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from fakes import FakeRunner, scripted
from hearthd.errors import (
    BundleError,
    DeadlineTooShortError,
    EngineCrashedError,
    InvalidRequestError,
    NotServingError,
    QueueFullError,
    SlowReaderError,
)
from hearthd.generation.engine import Engine
from hearthd.inference.baton import Baton
from hearthd.inference.model import Model
from hearthd.inference.stream import ChatStream
from hearthd.inference.worker import State, Worker
from hearthd.priority import Priority
from hearthd.sequences.events import Delta, Event, Finished, FinishReason, Queued
from hearthd.sequences.sampling import SamplingParams
from hearthd.sequences.sequence import Sequence
from serving import PROOF_FORWARDS, asynchronous, make_model, make_runner, make_tokenizer


@asynccontextmanager
async def working(
    runner: FakeRunner,
    *,
    max_queued: int = 2,
    backlog: int = 2**20,
    load: Callable[[], Model] | None = None,
    baton: Baton | None = None,
) -> AsyncIterator[Worker]:
    load = load or (lambda: make_model(runner))
    worker = Worker(load, max_queued=max_queued, stream_backlog_bytes=backlog, baton=baton)
    runner.allow(PROOF_FORWARDS)
    await worker.start()
    try:
        yield worker
    finally:
        runner.open_gate()
        worker.stop()
        await worker.wait_until_gone()


def sequence(length: int = 4, **options: Any) -> Sequence:
    params = {"max_tokens": 4, "temperature": 0.0, "top_logprobs": None} | {
        name: options.pop(name) for name in ("max_tokens", "top_logprobs") if name in options
    }
    return Sequence(
        request_id="test",
        prompt_ids=tuple(range(1, length + 1)),
        params=SamplingParams(**params),
        arrived=time.monotonic(),
        **({"cache_identity": "test"} | options),
    )


async def begun(runner: FakeRunner, count: int) -> None:
    await asyncio.to_thread(runner.wait_for_forwards, PROOF_FORWARDS + count)


@asynchronous
async def test_a_chat_gets_its_events_in_order() -> None:
    async with working(make_runner()) as worker:
        with worker.admit() as chat:
            chat.submit(sequence())
            events = [event async for event in chat]
    assert [type(event) for event in events[-1:]] == [Finished]
    assert all(isinstance(event, Delta) for event in events[:-1])
    assert worker.counts.finished == 1
    assert (worker.counts.prompt_tokens, worker.counts.completion_tokens) == (4, 4)


@asynchronous
async def test_the_same_prompt_gets_the_same_answer_alone_and_in_company() -> None:
    async def text(worker: Worker, length: int) -> str:
        with worker.admit() as chat:
            chat.submit(sequence(length, max_tokens=20))
            return "".join([event.text async for event in chat if isinstance(event, Delta)])

    async with working(make_runner(num_slots=3), max_queued=9) as worker:
        alone = [await text(worker, length) for length in range(4, 10)]
        together = await asyncio.gather(*(text(worker, length) for length in range(4, 10)))
    assert alone == together
    assert all(alone)


@asynchronous
async def test_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    runner = make_runner(is_gated=True)
    async with working(runner, max_queued=1) as worker:
        chats = [worker.admit() for _ in range(3)]
        with pytest.raises(QueueFullError, match="2 chats run and 1 wait") as caught:
            worker.admit()
        assert caught.value.retry_after_seconds == 1.0
        assert worker.counts.refused == 1
        with chats[0]:
            pass
        with worker.admit(), chats[1], chats[2]:
            pass
        assert worker.num_chats == 0


@asynchronous
async def test_a_queue_full_of_less_urgent_chats_keeps_nobody_out() -> None:
    async with working(make_runner(is_gated=True), max_queued=1) as worker:
        for priority in (Priority.BACKGROUND, Priority.NORMAL, Priority.INTERACTIVE):
            for _ in range(3):
                worker.admit(priority)
            # And one that is full of more urgent ones keeps all others out.
            for other in (each for each in Priority if each >= priority):
                with pytest.raises(QueueFullError, match="2 chats run and 1 wait"):
                    worker.admit(other)
        assert worker.num_chats == 9


@asynchronous
async def test_a_flood_that_fills_the_queue_gives_way_to_others_chat_by_chat() -> None:
    runner = make_runner(is_gated=True)
    async with working(runner, max_queued=3) as worker:
        flood = [worker.admit(account="flood") for _ in range(5)]
        for chat in flood:
            chat.submit(sequence())
        runner.allow()  # the first two have a slot when the first one's prompt is read
        await begun(runner, 2)
        others = [worker.admit(account="other") for _ in range(2)]
        assert [chat.has_ended for chat in flood] == [False, False, False, True, True]
        with pytest.raises(QueueFullError, match="2 chats run and 3 wait"):
            [event async for event in flood[4]]
        # Now one has three, the other two: nobody gives way for more of either, but for a third one.
        for account in ("flood", "other"):
            with pytest.raises(QueueFullError):
                worker.admit(account=account)
        others.append(worker.admit(account="third"))
        assert [chat.has_ended for chat in flood] == [False, False, True, True, True]
        # Those that run are left alone.
        others.append(worker.admit(account="fourth"))
        assert [chat.has_ended for chat in others] == [False, True, False, False]
        with pytest.raises(QueueFullError):
            worker.admit(account="fifth")
        for chat in [*flood, *others]:
            with chat:
                pass
        assert worker.counts.refused == 3 + 4


@asynchronous
async def test_nobody_gives_way_to_a_less_urgent_chat() -> None:
    async with working(make_runner(is_gated=True), max_queued=3) as worker:
        flood = [worker.admit(Priority.BACKGROUND, "house") for _ in range(3)]
        urgent = [worker.admit(Priority.INTERACTIVE, "house") for _ in range(2)]
        # The last that came is urgent, the last that may give way is not.
        worker.admit(Priority.BACKGROUND, "guest")
        assert [chat.has_ended for chat in [*flood, *urgent]] == [False, False, True, False, False]
        for chat in flood[:2]:
            with chat:
                pass
        urgent += [worker.admit(Priority.INTERACTIVE, "house") for _ in range(2)]
        with pytest.raises(QueueFullError):
            worker.admit(Priority.BACKGROUND, "other")
        assert not any(chat.has_ended for chat in urgent)


@asynchronous
@pytest.mark.parametrize(("estimate", "told"), [(None, 1.0), (0.2, 1.0), (4.5, 4.5), (300.0, 60.0)])
async def test_the_time_to_wait_is_when_the_next_chat_will_have_ended(
    monkeypatch: pytest.MonkeyPatch, estimate: float | None, told: float
) -> None:
    monkeypatch.setattr(Engine, "seconds_until_end", estimate)
    async with working(make_runner(), max_queued=0) as worker:
        with worker.admit(), worker.admit():
            with pytest.raises(QueueFullError) as caught:
                worker.admit()
            assert caught.value.retry_after_seconds == told


@asynchronous
async def test_waiting_chats_hear_their_places() -> None:
    runner = make_runner(is_gated=True)
    async with working(runner) as worker:
        chats = [worker.admit() for _ in range(4)]
        for chat in chats:
            chat.submit(sequence())
        runner.allow()
        assert await anext(chats[2]) == Queued(0)
        assert await anext(chats[3]) == Queued(1)
        with chats[0]:
            pass
        runner.open_gate()
        events = [event async for event in chats[3]]
        assert events[0] == Queued(0)
        assert isinstance(events[-1], Finished)
        for chat in chats[1:]:
            with chat:
                pass


@asynchronous
async def test_a_chat_that_is_left_costs_no_further_step() -> None:
    runner = make_runner(is_gated=True)
    async with working(runner) as worker:
        with worker.admit() as chat:
            chat.submit(sequence(max_tokens=100))
            runner.allow(3)
            await begun(runner, 4)
        runner.allow()  # the step that runs now
        await worker.ping()
        assert runner.num_forwards == PROOF_FORWARDS + 4
        assert worker.counts.cancelled == 1
        # The tokens that it did cost are counted.
        assert (worker.counts.prompt_tokens, worker.counts.completion_tokens) == (4, 3)
        assert worker.num_chats == 0


@asynchronous
async def test_a_chat_that_is_left_while_its_prompt_is_read_stops_that_run() -> None:
    runner = make_runner(is_gated=True)
    async with working(runner) as worker:
        with worker.admit() as chat:
            chat.submit(sequence(100))
            await begun(runner, 1)
        # Nothing lets the forward pass, and yet the thread comes back.
        await worker.ping()
        assert runner.num_forwards == PROOF_FORWARDS + 1


@asynchronous
async def test_a_chat_that_is_left_just_before_a_run_of_its_prompt_stops_it_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = make_runner(is_gated=True)
    terminate, num_asked = runner.terminate, 0

    def miss_once() -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked > 1:
            terminate()

    monkeypatch.setattr(runner, "terminate", miss_once)
    async with working(runner) as worker:
        with worker.admit() as chat:
            chat.submit(sequence(100))
            await begun(runner, 1)
        await worker.ping()
        assert runner.num_forwards == PROOF_FORWARDS + 1
        assert num_asked == 2


@asynchronous
async def test_leaving_a_queue_stops_nobody_elses_run() -> None:
    runner = make_runner(is_gated=True, num_slots=1)
    async with working(runner) as worker:
        with worker.admit() as running:
            running.submit(sequence(100, max_tokens=2))
            await begun(runner, 1)
            for _ in range(10):
                with worker.admit() as waiting:
                    waiting.submit(sequence(100))
            # Nobody has computed anything for them.
            assert (worker.counts.cancelled, worker.counts.prompt_tokens) == (10, 0)
            assert runner.num_forwards == PROOF_FORWARDS + 1
            runner.open_gate()
            assert isinstance([event async for event in running][-1], Finished)
        # 100 tokens in chunks of 16, the last of which gives the first of two tokens: none was run twice.
        assert runner.num_forwards == PROOF_FORWARDS + 7 + 1


@asynchronous
async def test_a_chat_that_is_left_before_it_begins_gives_its_place_back() -> None:
    async with working(make_runner(), max_queued=0) as worker:
        for _ in range(50):
            with worker.admit():
                pass
        assert worker.num_chats == 0
        assert worker.counts.cancelled == 0


@asynchronous
async def test_a_deadline_ends_the_answer() -> None:
    runner = make_runner(is_gated=True)
    async with working(runner) as worker:
        with worker.admit() as chat:
            deadline = time.monotonic() + 0.3
            chat.submit(sequence(max_tokens=100, deadline=deadline))
            await begun(runner, 1)
            await asyncio.sleep(deadline - time.monotonic())
            runner.open_gate()
            events = [event async for event in chat]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.TIME_LIMIT


@asynchronous
async def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    runner = make_runner(is_gated=True)
    async with working(runner) as worker:
        with worker.admit() as chat:
            chat.submit(sequence(deadline=time.monotonic() - 1))
            # Nothing lets a forward pass.
            with pytest.raises(DeadlineTooShortError, match=r"would begin in about .* and the deadline is in 0\.0 s"):
                await anext(chat)
        assert (worker.counts.refused, worker.counts.failed) == (1, 0)
        assert runner.num_forwards == PROOF_FORWARDS


@asynchronous
async def test_a_reader_that_leaves_too_much_unread_is_ended_and_the_others_go_on() -> None:
    # All of the good one's events fit, however late it reads them; a quarter of the slow one's do.
    async with working(make_runner(), backlog=2**17) as worker:
        with worker.admit() as slow, worker.admit() as good:
            slow.submit(sequence(max_tokens=200, top_logprobs=20))
            good.submit(sequence(max_tokens=200))
            events = [event async for event in good]
            assert isinstance(events[-1], Finished)
            with pytest.raises(SlowReaderError, match=f"the limit is {2**17}"):
                await anext(slow)
        assert (worker.counts.finished, worker.counts.failed) == (1, 1)
        assert worker.counts.prompt_tokens == 4 + 4
        assert 200 < worker.counts.completion_tokens <= 400


@asynchronous
async def test_a_prompt_that_the_engine_refuses_fails_alone() -> None:
    async with working(make_runner()) as worker:
        with worker.admit() as chat:
            chat.submit(sequence(1000))
            with pytest.raises(InvalidRequestError):
                await anext(chat)
        with worker.admit() as chat:
            chat.submit(sequence())
            assert isinstance([event async for event in chat][-1], Finished)


@asynchronous
async def test_a_failed_run_fails_its_chats_and_the_engine_goes_on() -> None:
    runner = make_runner()
    async with working(runner) as worker:
        runner.fail_next = OSError("canary")
        with worker.admit() as chat:
            chat.submit(sequence())
            with pytest.raises(OSError, match="canary"):
                await anext(chat)
        with worker.admit() as chat:
            chat.submit(sequence())
            assert isinstance([event async for event in chat][-1], Finished)
        assert worker.state is State.SERVING


@asynchronous
async def test_an_engine_that_only_fails_counts_as_crashed() -> None:
    def broken(history: Any) -> Any:
        raise OSError("canary")

    runner = make_runner()
    async with working(runner) as worker:
        runner.logits_after = broken
        errors = []
        while worker.state is State.SERVING:
            with worker.admit() as chat:
                chat.submit(sequence())
                try:
                    await anext(chat)
                except (OSError, EngineCrashedError) as error:
                    errors.append(error)
        with pytest.raises(EngineCrashedError):
            await worker.wait_until_ended()
    assert 7 <= len(errors) <= 8


@asynchronous
async def test_an_engine_that_reads_prompts_and_fails_at_every_step_counts_as_crashed() -> None:
    """The first token comes with the prompt, and says nothing of the steps."""
    runner = make_runner()
    async with working(runner) as worker:
        forward = runner.forward

        def broken(token_ids: Any, first_slot: int, past_lengths: Any) -> Any:
            if token_ids.shape[1] == 1:
                raise OSError("canary")
            return forward(token_ids, first_slot, past_lengths)

        runner.forward = broken  # type: ignore[method-assign]
        num_words = 0
        for _ in range(20):
            if worker.state is not State.SERVING:
                break
            with worker.admit() as chat, suppress(OSError, EngineCrashedError):
                chat.submit(sequence())
                async for _ in chat:
                    num_words += 1
        with pytest.raises(EngineCrashedError):
            await worker.wait_until_ended()
    assert 6 <= num_words <= 8


@asynchronous
async def test_one_failed_run_of_many_answers_is_one_failure() -> None:
    runner = make_runner(num_slots=8)
    logits_after = runner.logits_after
    async with working(runner) as worker:
        chats = [worker.admit() for _ in range(8)]

        def breaks_once(history: Any) -> Any:
            if all(chat.sequence is not None and len(chat.sequence.output_ids) > 1 for chat in chats):
                runner.logits_after = logits_after
                raise OSError("canary")
            return logits_after(history)

        runner.logits_after = breaks_once
        for chat in chats:
            chat.submit(sequence(max_tokens=100))
        for chat in chats:
            with chat, pytest.raises(OSError, match="canary"):
                [event async for event in chat]
        with worker.admit() as chat:
            chat.submit(sequence())
            assert isinstance([event async for event in chat][-1], Finished)
        assert worker.state is State.SERVING


@asynchronous
async def test_a_crash_of_the_engine_fails_every_chat_with_one_id(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make_runner(is_gated=True)
    async with working(runner) as worker:
        with worker.admit() as first, worker.admit() as second, worker.admit() as third:
            for chat in (first, second):
                chat.submit(sequence(max_tokens=100))
            await begun(runner, 1)

            def crash() -> list[tuple[Sequence, Event]]:
                raise RuntimeError("canary")

            monkeypatch.setattr(worker.model.engine, "step", crash)
            runner.open_gate()
            with pytest.raises(EngineCrashedError) as caught:
                await worker.wait_until_ended()
            for chat in (first, second, third):
                with pytest.raises(EngineCrashedError) as failed:
                    [event async for event in chat]
                assert failed.value.incident == caught.value.incident
        assert worker.state is State.ENDED
        with pytest.raises(NotServingError):
            worker.admit()
    assert f"incident {caught.value.incident}: builtins.RuntimeError" in caplog.text
    assert "canary" not in caplog.text


@asynchronous
async def test_a_ping_crosses_the_queue_and_waits_for_a_stuck_run() -> None:
    runner = make_runner(is_gated=True)
    async with working(runner) as worker:
        await worker.ping()
        with worker.admit() as chat:
            chat.submit(sequence())
            await begun(runner, 1)
            ping = asyncio.create_task(worker.ping())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await asyncio.shield(ping)
            runner.allow()
            await ping


# Other models, and who comes while something is read.


class OtherModel:
    """The thread of another model, which does nothing but ask."""

    def wake(self) -> None:
        pass

    def make_way(self, priority: Priority) -> None:
        pass


@asynchronous
async def test_what_nobody_waits_for_gives_way_to_other_models_and_is_done_after_them() -> None:
    # An answer of such a runner is read again while nobody is asked.
    runner, baton, other = make_runner(min_run=2), Baton(), OtherModel()
    async with working(runner, baton=baton) as worker:
        # Somebody waits for the other one, which takes no step.
        assert baton.ask(other, Priority.BACKGROUND)
        baton.leave(other, Priority.BACKGROUND)
        with worker.admit() as chat:
            chat.submit(sequence(max_tokens=8))
            assert isinstance([event async for event in chat][-1], Finished)
        for _ in range(3):
            await worker.ping()
        num_forwards = runner.num_forwards
        assert worker.model.engine.has_work
        assert [worker.model.engine.has_others(priority) for priority in Priority] == [False, False, True]
        baton.leave(other)
        await asyncio.to_thread(runner.wait_for_forwards, num_forwards + 1)


@asynchronous
async def test_other_models_know_how_urgent_it_is() -> None:
    runner, baton, other = make_runner(is_gated=True), Baton(), OtherModel()
    async with working(runner, baton=baton) as worker:
        assert not baton.has_others(other, Priority.BACKGROUND)
        with worker.admit() as chat, worker.admit() as urgent:
            chat.submit(sequence())
            await begun(runner, 1)
            assert not baton.has_others(other, Priority.INTERACTIVE)
            assert baton.has_others(other, Priority.NORMAL)
            urgent.submit(sequence(priority=Priority.INTERACTIVE))
            runner.allow()
            await begun(runner, 2)
            assert baton.has_others(other, Priority.INTERACTIVE)
            runner.open_gate()
            for each in (chat, urgent):
                assert isinstance([event async for event in each][-1], Finished)
        await worker.ping()
        await worker.ping()
        assert not baton.has_others(other, Priority.BACKGROUND)


@asynchronous
async def test_who_waits_for_its_turn_hears_what_it_is_told() -> None:
    runner, baton, other = make_runner(), Baton(), OtherModel()
    async with working(runner, baton=baton) as worker:
        assert baton.ask(other, Priority.NORMAL)
        with worker.admit() as chat:
            chat.submit(sequence())
            # Its turn does not come, and yet the watchdog learns that it lives, and whoever leaves is gone at once.
            await worker.ping()
            assert worker.model.engine.num_waiting == 1
        await worker.ping()
        assert (worker.model.engine.num_waiting, runner.num_forwards) == (0, PROOF_FORWARDS)
        baton.leave(other)


def patient_model(runner: FakeRunner) -> Model:
    """A model that reads 64 tokens of a prompt at a time while nobody waits, and 16 while somebody does."""
    # By a clock that stands still everything is infinitely fast.
    engine = Engine(
        runner, make_tokenizer(), prefill_chunk=16, solo_prefill_chunk=64, max_stall_seconds=16e-9, clock=lambda: 1.0
    )
    return replace(make_model(runner), engine=engine)


def lengths(runner: FakeRunner) -> list[int]:
    """Return how many tokens the runs since the proof had."""
    return [length for _, _, length in runner.calls[PROOF_FORWARDS:]]


@asynchronous
async def test_who_comes_while_an_old_answer_is_read_waits_for_none_of_it() -> None:
    runner = make_runner(min_run=2, is_gated=True)
    async with working(runner) as worker:
        with worker.admit() as chat:
            chat.submit(sequence(max_tokens=8))
            runner.allow(8)
            assert isinstance([event async for event in chat][-1], Finished)
        await begun(runner, 9)  # nobody asks for it, and it does not pass the gate
        with worker.admit(Priority.BACKGROUND) as newcomer:
            newcomer.submit(sequence(30, cache_identity="other", priority=Priority.BACKGROUND))
            await begun(runner, 10)
            assert lengths(runner)[9:] == [16]
            runner.open_gate()
            assert isinstance([event async for event in newcomer][-1], Finished)
        # What was stopped is read afterwards.
        await begun(runner, 9 + 2 + 3 + 1)


@asynchronous
async def test_a_ping_leaves_what_is_read_alone() -> None:
    runner = make_runner(min_run=2, is_gated=True)
    async with working(runner) as worker:
        with worker.admit() as chat:
            chat.submit(sequence(max_tokens=8))
            runner.allow(8)
            assert isinstance([event async for event in chat][-1], Finished)
        await begun(runner, 9)
        ping = asyncio.create_task(worker.ping())
        await asyncio.sleep(0)
        runner.allow()
        await ping
        for _ in range(3):
            await worker.ping()
        # It was not run again.
        assert len(lengths(runner)) == 9
        assert not worker.model.engine.has_work


@asynchronous
@pytest.mark.parametrize("priority", [Priority.INTERACTIVE, Priority.NORMAL, Priority.BACKGROUND])
async def test_a_long_run_of_a_prompt_is_stopped_for_who_is_more_urgent_and_for_nobody_else(priority: Priority) -> None:
    runner = make_runner(is_gated=True)
    async with working(runner, load=lambda: patient_model(runner)) as worker:
        with worker.admit() as reading, worker.admit() as newcomer:
            reading.submit(sequence(200))
            await begun(runner, 1)
            newcomer.submit(sequence(10, cache_identity="other", priority=priority, max_tokens=1))
            is_stopped = priority < Priority.NORMAL
            if is_stopped:
                await begun(runner, 2)  # though nothing passes the gate
                assert lengths(runner) == [64, 10]
            runner.open_gate()
            for chat in (reading, newcomer):
                assert isinstance([event async for event in chat][-1], Finished)
    # What was stopped is read again.
    assert sum(length for length in lengths(runner) if length > 1) == 200 + 10 + 64 * is_stopped


@asynchronous
async def test_a_prompt_that_was_stopped_goes_on_in_short_runs_which_are_not_stopped() -> None:
    runner = make_runner(is_gated=True)
    async with working(runner, load=lambda: patient_model(runner)) as worker:
        with worker.admit() as reading:
            reading.submit(sequence(200, max_tokens=1))
            await begun(runner, 1)
            for count in range(1, 6):
                with worker.admit() as newcomer:
                    newcomer.submit(
                        sequence(10, cache_identity=f"{count}", priority=Priority.INTERACTIVE, max_tokens=1)
                    )
                    runner.allow(1 if count == 1 else 2)
                    assert isinstance([event async for event in newcomer][-1], Finished)
                await begun(runner, 2 * count + 1)
            # Each came in the middle of a run, and only the first has stopped it.
            assert lengths(runner) == [64, *[10, 16] * 5]
            runner.open_gate()
            events = [event async for event in reading]
        assert isinstance(events[-1], Finished)
        assert sum(length for length in lengths(runner) if length != 10) == 64 + 200


@asynchronous
@pytest.mark.parametrize("is_asked", [True, False], ids=["a long run of a prompt", "what nobody waits for"])
async def test_who_comes_for_another_model_stops_such_a_run_as_well(*, is_asked: bool) -> None:
    baton, runner, other_runner = Baton(), make_runner(min_run=2, is_gated=True), make_runner()
    async with (
        working(runner, load=lambda: patient_model(runner), baton=baton) as worker,
        working(other_runner, baton=baton) as other,
        asyncio.TaskGroup() as tasks,
    ):
        with worker.admit() as chat:
            chat.submit(sequence(200 if is_asked else 4, max_tokens=8))
            if not is_asked:
                runner.allow(8)
            answer = tasks.create_task(last_event(chat))
            await begun(runner, 1 if is_asked else 9)
            with other.admit() as newcomer:
                newcomer.submit(sequence(priority=Priority.INTERACTIVE))
                # Nothing passes the gate of the first model.
                assert isinstance(await last_event(newcomer), Finished)
            await begun(runner, 2 if is_asked else 10)
            assert lengths(runner)[-2:] == ([64, 16] if is_asked else [7, 7])
            runner.open_gate()
            assert isinstance(await answer, Finished)


async def last_event(chat: ChatStream) -> Event:
    return [event async for event in chat][-1]


@asynchronous
async def test_a_less_urgent_model_takes_one_step_after_25() -> None:
    baton, holder, steps = Baton(), OtherModel(), list[str]()
    has_begun = False

    def counting(name: str) -> FakeRunner:
        def logits_after(history: Any) -> Any:
            # The interpreter lets a step of no length go before the other one's asking.
            until = time.monotonic() + 10
            while has_begun and name == "u" and not baton._line and time.monotonic() < until:
                time.sleep(0)
            steps.append(name)
            return logits(history)

        runner = make_runner()
        logits = scripted(runner.vocab_size, 4, [65])
        runner.logits_after = logits_after
        return runner

    async with working(counting("u"), baton=baton) as urgent, working(counting("l"), baton=baton) as less:
        assert baton.ask(holder, Priority.INTERACTIVE)
        steps.clear()
        has_begun = True
        with urgent.admit() as first, less.admit() as second:
            first.submit(sequence(max_tokens=60, priority=Priority.NORMAL))
            second.submit(sequence(max_tokens=60, priority=Priority.BACKGROUND))
            while len(baton._line) < 2:
                await asyncio.gather(urgent.ping(), less.ping())
            baton.leave(holder)
            for chat in (first, second):
                assert isinstance(await last_event(chat), Finished)
    assert [len(turn) for turn in "".join(steps).rstrip("l").split("l")][1:] == [25, 11]
    assert steps.count("l") == 60


@asynchronous
async def test_draining_admits_nobody_and_waits_for_the_last() -> None:
    runner = make_runner(is_gated=True)
    async with working(runner) as worker:
        with worker.admit() as chat:
            chat.submit(sequence())
            await begun(runner, 1)
            worker.begin_drain()
            with pytest.raises(NotServingError, match="shutting down"):
                worker.admit()
            idle = asyncio.create_task(worker.wait_until_idle())
            runner.open_gate()
            assert isinstance([event async for event in chat][-1], Finished)
            assert not idle.done()
        await idle


@asynchronous
async def test_before_the_model_is_loaded_everybody_hears_so() -> None:
    worker = Worker(lambda: make_model(make_runner()), max_queued=1, stream_backlog_bytes=4096)
    with pytest.raises(NotServingError, match="still loading"):
        worker.admit()
    with pytest.raises(NotServingError, match="still loading"):
        _ = worker.model
    worker.stop()
    await worker.wait_until_gone()


@asynchronous
async def test_a_model_that_does_not_load_raises_where_it_was_asked_for() -> None:
    def load() -> Model:
        raise BundleError("model.data is damaged")

    worker = Worker(load, max_queued=1, stream_backlog_bytes=4096)
    with pytest.raises(BundleError, match=r"model\.data is damaged"):
        await worker.start()
    await worker.wait_until_gone()


@asynchronous
async def test_a_model_that_generates_nothing_is_not_served() -> None:
    runner = make_runner()
    runner.fail_next = OSError("broken")
    worker = Worker(lambda: make_model(runner), max_queued=1, stream_backlog_bytes=4096)
    with pytest.raises(OSError, match="broken"):
        await worker.start()
    await worker.wait_until_gone()


@asynchronous
async def test_a_thread_is_stopped_in_the_middle_of_a_prompt() -> None:
    runner = make_runner(is_gated=True)
    worker = Worker(lambda: make_model(runner), max_queued=1, stream_backlog_bytes=4096)
    runner.allow(PROOF_FORWARDS)
    await worker.start()
    with worker.admit() as chat:
        chat.submit(sequence(100))
        await begun(runner, 1)
        worker.stop()
        await worker.wait_until_gone()
        with pytest.raises(NotServingError):
            await anext(chat)
