"""What the governor decides reaches the engine: unit by unit, and through a whole daemon on a board of files."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from fake_sysfs import FakeSysfs
from fakes import FakeRunner
from hearth.v1 import status_pb2, status_pb2_grpc
from hearthd.board.governor import FULL, Throttle
from hearthd.board.thermal import BoardReading, Sensors
from hearthd.errors import ShortOfMemoryError
from hearthd.inference.restraint import Restraint
from hearthd.server import Server
from serving import (
    PROOF_FORWARDS,
    answer,
    asynchronous,
    chat_request,
    make_config,
    make_model,
    make_runner,
    start_chat,
    unix_target,
)


class Steps:
    """A model's steps by a clock of their own."""

    def __init__(self, num_slots: int = 4) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.throttle = FULL
        self.runner = make_runner(num_slots=num_slots)
        self.model = make_model(self.runner)
        self._restraint = Restraint(self.model, lambda: self.throttle, clock=lambda: self.now, sleep=self.pauses.append)

    def step(self, seconds: float) -> None:
        with self._restraint:
            self.now += seconds


def test_a_cool_board_pays_nothing() -> None:
    steps = Steps()
    for _ in range(10):
        steps.step(0.1)
    assert (steps.pauses, steps.runner.thread_changes) == ([], [])


def test_threads_change_once_for_each_level_that_says_so() -> None:
    steps = Steps()
    for level in (1, 1, 2, 2, 3, 3, 2, 1, 0, 0):
        steps.throttle = Throttle(level)
        steps.step(0.01)
    assert steps.runner.thread_changes == [2, 4]


def test_a_graph_that_takes_long_to_load_keeps_its_threads() -> None:
    steps = Steps()
    steps.runner.load_seconds = 6.0
    steps.throttle = Throttle(3)
    steps.step(0.05)
    steps.step(0.0)
    assert (steps.runner.thread_changes, steps.pauses) == ([], [0.05])


def test_threads_that_cannot_be_had_are_told_once_and_tried_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = Steps()
    change_threads, num_tried = steps.runner.change_threads, 0

    def fail(_: int) -> None:
        nonlocal num_tried
        num_tried += 1
        raise ShortOfMemoryError("canary")

    monkeypatch.setattr(steps.runner, "change_threads", fail)
    steps.throttle = Throttle(2)
    for _ in range(180):
        steps.step(1.0)
    assert num_tried == 3
    told = [record.message for record in caplog.records]
    assert [message.partition(", incident")[0] for message in told] == [
        "the model cannot be loaded for 2 threads; tried again later"
    ]
    assert "canary" not in caplog.text
    monkeypatch.setattr(steps.runner, "change_threads", change_threads)
    for _ in range(60):
        steps.step(1.0)
    assert steps.runner.thread_changes == [2]
    steps.throttle = FULL
    steps.step(1.0)
    assert steps.runner.thread_changes == [2, 4]


def test_a_step_owes_a_pause_of_its_own_length_and_a_long_one_pays_in_parts() -> None:
    steps = Steps()
    steps.throttle = Throttle(3)
    steps.step(0.05)
    assert steps.pauses == []
    steps.step(0.0)
    assert steps.pauses == [0.05]
    steps.step(0.5)
    for _ in range(4):
        steps.step(0.0)
    assert steps.pauses[1:] == pytest.approx([0.2, 0.2, 0.1])


def test_what_is_owed_is_bounded_and_forgotten_when_the_board_is_cool() -> None:
    steps = Steps()
    steps.throttle = Throttle(3)
    for _ in range(100):
        steps.step(10.0)
    steps.throttle = Throttle(2)
    steps.pauses.clear()
    steps.step(0.01)
    steps.step(0.01)
    assert len(steps.pauses) <= 1


# A whole daemon.


class Board:
    """A daemon on a board whose sensors are files."""

    def __init__(self, server: Server, channel: grpc.aio.Channel, sysfs: FakeSysfs) -> None:
        self.channel, self.sysfs = channel, sysfs
        self._governor = server._parts.observation.governor
        self._judge = self._governor.judge
        self._judged = asyncio.Event()
        self._governor.judge = self._note  # type: ignore[method-assign]

    def _note(self, reading: BoardReading) -> None:
        self._judge(reading)
        self._judged.set()

    async def status(self) -> status_pb2.GetStatusResponse:
        return await status_pb2_grpc.StatusServiceStub(self.channel).GetStatus(status_pb2.GetStatusRequest())

    async def comes_to(self, celsius: float | None, level: int) -> status_pb2.GetStatusResponse:
        """Wait until the governor has seen a temperature and come to a level; return the status."""
        while (self._governor.reading.celsius, self._governor.throttle.level) != (celsius, level):
            self._judged.clear()
            await self._judged.wait()
        return await self.status()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the governor look, and decide, without waiting."""
    monkeypatch.setattr("hearthd.board.governor._POLL_SECONDS", 0.01)
    monkeypatch.setattr("hearthd.board.governor._UP_SECONDS", 0.0)


@asynccontextmanager
async def board(directory: Path, runner: FakeRunner, **sections: Any) -> AsyncIterator[Board]:
    sysfs = FakeSysfs(directory / "board")
    sysfs.zone(0, "cpu-thermal", 45.0)
    sysfs.throttled(0)
    config = make_config(directory, **sections)
    server = Server(config, lambda _: make_model(runner), root=sysfs.root)
    running = asyncio.create_task(server.run())
    try:
        async with grpc.aio.insecure_channel(unix_target(config)) as channel:
            await server.is_ready.wait()
            yield Board(server, channel, sysfs)
    finally:
        runner.open_gate()
        server.stop()
        await running


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_a_hot_board_is_spared_in_steps_and_served_fully_when_it_is_cool(tmp_path: Path) -> None:
    runner = make_runner(num_slots=4)
    async with board(tmp_path, runner, engine={"slots": 4}) as hot:
        cool = await hot.comes_to(45.0, 0)
        assert (cool.board.temperature_celsius, list(cool.board.flags)) == (45.0, [])
        _, final = await answer(hot.channel, chat_request("hello", max_tokens=3))
        assert not final.throttled

        hot.sysfs.throttled(0xE0008)
        hot.sysfs.zone(0, "cpu-thermal", 81.0)
        status = await hot.comes_to(81.0, 3)
        assert status.board.temperature_celsius == 81.0
        assert list(status.board.flags) == [status_pb2.BOARD_FLAG_SOFT_TEMPERATURE_LIMIT]
        assert len(status.board.flags_since_start) == 3
        text, final = await answer(hot.channel, chat_request("hello", max_tokens=3, temperature=0))
        assert final.throttled
        assert runner.num_threads == 2

        hot.sysfs.throttled(0xE0000)
        hot.sysfs.zone(0, "cpu-thermal", 60.0)
        await hot.comes_to(60.0, 0)
        again, final = await answer(hot.channel, chat_request("hello", max_tokens=3, temperature=0))
        assert not final.throttled
        assert runner.num_threads == 4
        # Not another answer.
        assert again == text


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_fewer_chats_run_at_once_and_all_are_answered(tmp_path: Path) -> None:
    runner = make_runner(num_slots=4, is_gated=True)
    runner.allow(PROOF_FORWARDS)
    async with board(tmp_path, runner, engine={"slots": 4}, limits={"max_queued": 8}) as hot:
        hot.sysfs.zone(0, "cpu-thermal", 78.5)
        await hot.comes_to(78.5, 1)
        chats = [asyncio.ensure_future(answer(hot.channel, chat_request(f"hello {n}", max_tokens=6))) for n in range(6)]
        while (status := await hot.status()).running_count + status.queued_count < len(chats):
            pass
        runner.open_gate()
        finals = [final for _, final in await asyncio.gather(*chats)]
    assert all(final.throttled for final in finals)
    # Half of the four.
    assert max(rows for _, rows, length in runner.calls if length == 1) == 2


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_an_answer_that_became_slow_on_the_way_says_so(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    runner.allow(PROOF_FORWARDS)
    async with board(tmp_path, runner) as hot:
        chat = start_chat(hot.channel, chat_request("hello", max_tokens=6))
        await asyncio.to_thread(runner.wait_for_forwards, PROOF_FORWARDS + 1)
        hot.sysfs.throttled(1)
        await hot.comes_to(45.0, 1)
        runner.open_gate()
        final = [response.final async for response in chat if response.HasField("final")]
    assert [each.throttled for each in final] == [True]


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_a_limit_of_0_only_watches(tmp_path: Path) -> None:
    async with board(tmp_path, make_runner(), thermal={"max_celsius": 0.0}) as hot:
        hot.sysfs.zone(0, "cpu-thermal", 99.0)
        status = await hot.comes_to(99.0, 0)
        assert status.board.thermal_level == 0


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_a_sensor_that_hangs_holds_up_nobody_and_holds_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hearthd.board.governor._PATIENCE_SECONDS", 0.05)
    hang, go_on = threading.Event(), threading.Event()
    read = Sensors.read

    def read_or_hang(sensors: Sensors) -> BoardReading:
        if hang.is_set():
            go_on.wait(60)
        return read(sensors)

    monkeypatch.setattr("hearthd.board.thermal.Sensors.read", read_or_hang)
    async with board(tmp_path, make_runner()) as hot:
        hot.sysfs.zone(0, "cpu-thermal", 81.0)
        await hot.comes_to(81.0, 3)
        hang.set()
        await hot.comes_to(None, 0)
        _, final = await answer(hot.channel, chat_request("hello", max_tokens=3))
        assert not final.throttled
    # It has ended, with the sensor still hanging.
    assert not go_on.is_set()
    go_on.set()


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_a_sensor_that_fails_is_told_once_and_holds_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with board(tmp_path, make_runner()) as hot:
        hot.sysfs.zone(0, "cpu-thermal", 81.0)
        await hot.comes_to(81.0, 3)

        def fail(_: Sensors) -> BoardReading:
            raise ValueError("canary")

        monkeypatch.setattr("hearthd.board.thermal.Sensors.read", fail)
        await hot.comes_to(None, 0)
    assert len([record for record in caplog.records if "sensors cannot be read" in record.message]) == 1
    assert "canary" not in caplog.text
