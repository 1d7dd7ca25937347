"""Words of answers on their way to the event loop: the first at once, others together, none lost or out of order."""

import asyncio
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hearthd.inference.outbox import Outbox
from hearthd.sequences.events import Delta, Event, Failed, Finished, FinishReason, Queued
from hearthd.sequences.sampling import SamplingParams
from hearthd.sequences.sequence import Sequence


class FakeTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeLoop:
    """Runs what it was asked for when it is told to."""

    def __init__(self) -> None:
        self.called: list[Callable[[], object]] = []
        self.timers: list[FakeTimer] = []
        self.delays: list[float] = []

    def call(self, callback: Callable[[], object]) -> None:
        self.called.append(callback)

    def call_later(self, delay: float, callback: Callable[[], object]) -> FakeTimer:
        self.timers.append(FakeTimer(callback))
        self.delays.append(delay)
        return self.timers[-1]

    def run(self) -> None:
        called, self.called = self.called, []
        for callback in called:
            callback()

    def ring(self) -> None:
        timers, self.timers = self.timers, []
        for timer in timers:
            if timer.callback is not None:
                timer.callback()


def sequence(name: str = "a") -> Sequence:
    return Sequence(
        request_id=name,
        prompt_ids=(1,),
        params=SamplingParams(max_tokens=9),
        cache_identity=name,
        arrived=0.0,
        account=name,
    )


def finished(which: Sequence) -> Finished:
    which.admitted = which.prefilled = which.first_token = which.last_token = 0.0
    return which.finished(FinishReason.LENGTH, 1.0)


def outbox(interval: float = 0.05) -> tuple[Outbox, FakeLoop, list[list[tuple[Sequence, Event]]]]:
    loop, delivered = FakeLoop(), []
    box = Outbox(loop.call, interval)
    box.start(loop, delivered.append)  # type: ignore[arg-type]
    return box, loop, delivered


def test_first_words_go_at_once_and_the_next_ones_together() -> None:
    box, loop, delivered = outbox()
    chat = sequence()
    box.send([(chat, Delta("one"))])
    loop.run()
    assert delivered == [[(chat, Delta("one"))]]
    for text in (" two", " three"):
        box.send([(chat, Delta(text))])
        assert loop.called == []
    assert loop.delays == [0.05]
    loop.ring()
    assert delivered[1:] == [[(chat, Delta(" two three"))]]


def test_first_words_of_another_chat_take_along_what_waits() -> None:
    box, loop, delivered = outbox()
    one, two = sequence("one"), sequence("two")
    box.send([(one, Delta("a"))])
    loop.run()
    box.send([(one, Delta("b"))])
    box.send([(one, Delta("c")), (two, Delta("x"))])
    loop.run()
    assert delivered[1:] == [[(one, Delta("bc")), (two, Delta("x"))]]


def test_ends_errors_and_places_in_the_queue_do_not_wait() -> None:
    ends: tuple[Event, ...] = (Queued(0), finished(sequence()), Failed(ValueError("it failed")))
    for event in ends:
        box, loop, delivered = outbox()
        chat = sequence()
        box.send([(chat, Delta("words"))])
        loop.run()
        delivered.clear()
        box.send([(chat, Delta("more"))])
        box.send([(chat, event)])
        loop.run()
        assert delivered == [[(chat, Delta("more")), (chat, event)]]


def test_after_a_silence_words_go_at_once() -> None:
    """As from a model that writes slower than that: each token by itself."""
    box, loop, delivered = outbox()
    chat = sequence()
    for text in ("a", "b", "c"):
        box.send([(chat, Delta(text))])
        loop.run()
        assert delivered.pop() == [(chat, Delta(text))]
        loop.ring()
        assert delivered == []


def test_without_an_interval_each_step_goes_by_itself() -> None:
    box, loop, delivered = outbox(0.0)
    chat = sequence()
    for text in ("a", "b"):
        box.send([(chat, Delta(text))])
        loop.run()
    assert delivered == [[(chat, Delta("a"))], [(chat, Delta("b"))]]
    # Also if the loop was busy meanwhile.
    for text in ("c", "d"):
        box.send([(chat, Delta(text))])
    loop.run()
    assert delivered[2:] == [[(chat, Delta("c")), (chat, Delta("d"))]]
    assert loop.delays == []


def test_what_is_left_is_sent_at_the_end() -> None:
    box, loop, delivered = outbox()
    chat = sequence()
    box.send([(chat, Delta("a"))])
    loop.run()
    box.send([(chat, Delta("b"))])
    box.flush()
    loop.run()
    assert delivered[1:] == [[(chat, Delta("b"))]]
    box.flush()
    assert loop.called == []


@given(st.lists(st.one_of(st.tuples(st.integers(0, 2), st.booleans()), st.sampled_from(["run", "ring"])), max_size=60))
def test_nothing_is_lost_doubled_or_out_of_order(actions: list[Any]) -> None:
    box, loop, delivered = outbox()
    chats = [sequence(str(number)) for number in range(3)]
    sent: dict[Sequence, str] = dict.fromkeys(chats, "")
    for number, action in enumerate(actions):
        if action == "run":
            loop.run()
        elif action == "ring":
            loop.ring()
        else:
            which, is_place = action
            text = f"[{number}]"
            box.send([(chats[which], Queued(number) if is_place else Delta(text))])
            sent[chats[which]] += f"<{number}>" if is_place else text
    # Whatever waits has somebody coming for it.
    loop.run()
    loop.ring()
    heard: dict[Sequence, str] = dict.fromkeys(chats, "")
    for events in delivered:
        for chat, event in events:
            assert isinstance(event, Delta | Queued)
            heard[chat] += event.text if isinstance(event, Delta) else f"<{event.position}>"
    assert heard == sent


def test_on_a_real_loop_from_a_real_thread() -> None:
    async def run() -> str:
        loop = asyncio.get_running_loop()
        heard: list[str] = []
        done = asyncio.Event()

        def deliver(events: list[tuple[Sequence, Event]]) -> None:
            heard.extend(event.text for _, event in events if isinstance(event, Delta))
            if any(isinstance(event, Finished) for _, event in events):
                done.set()

        box = Outbox(loop.call_soon_threadsafe, 0.001)
        box.start(loop, deliver)
        chat = sequence()

        def write() -> None:
            for number in range(2000):
                box.send([(chat, Delta(f"{number} "))])
            box.send([(chat, finished(chat))])

        await asyncio.gather(asyncio.to_thread(write), done.wait())
        return "".join(heard)

    assert asyncio.run(run()) == "".join(f"{number} " for number in range(2000))
