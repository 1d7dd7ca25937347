"""What systemd hears, on a real socket: nothing outside of it, and inside no life sign of a dead thread."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest

from hearthd.errors import ConfigError
from hearthd.life.notify import Notifier, feed_watchdog
from serving import (
    PROOF_FORWARDS,
    asynchronous,
    chat_request,
    make_config,
    make_model,
    make_runner,
    serving,
    start_chat,
    unix_target,
)


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Return what systemd holds: the other end of NOTIFY_SOCKET."""
    received = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    received.bind(str(tmp_path / "notify"))
    received.setblocking(False)
    # libsystemd reads the environment itself.
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield received
    received.close()


def heard(systemd: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(systemd.recv(4096).decode())
        except BlockingIOError:
            return messages


async def hear(systemd: socket.socket) -> str:
    return (await asyncio.get_running_loop().sock_recv(systemd, 4096)).decode()


def test_outside_of_systemd_nothing_is_said_and_nothing_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "systemd.daemon", None)
    notifier = Notifier({"WATCHDOG_USEC": "1000000"})
    notifier.ready("serving")
    notifier.alive()
    assert notifier.watchdog_seconds is None


def test_under_systemd_without_its_library_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "systemd.daemon", None)
    with pytest.raises(ConfigError, match="install python3-systemd"):
        Notifier({"NOTIFY_SOCKET": "/run/systemd/notify"})


def test_each_word_is_said_as_systemd_reads_it(systemd: socket.socket) -> None:
    notifier = Notifier()
    notifier.status("loading")
    notifier.extend_timeout(1.5)
    notifier.ready("serving smollm2-135m")
    notifier.alive()
    notifier.stopping("draining")
    assert heard(systemd) == [
        "STATUS=loading",
        "EXTEND_TIMEOUT_USEC=1500000",
        "READY=1\nSTATUS=serving smollm2-135m",
        "WATCHDOG=1",
        "STOPPING=1\nSTATUS=draining",
    ]


def test_a_dead_systemd_ends_nothing(systemd: socket.socket, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier()
    systemd.close()
    (tmp_path / "notify").unlink()
    notifier.ready("serving")
    assert "systemd could not be told READY" in caplog.text


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_systemds(environment: dict[str, str], seconds: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/x"} | environment).watchdog_seconds == seconds


class Inference:
    """A ping as the worker gives it, answered by hand."""

    def __init__(self) -> None:
        self.num_pings = 0
        self.pinged = asyncio.Event()
        self.answers = asyncio.Event()

    async def ping(self) -> None:
        self.num_pings += 1
        self.pinged.set()
        await self.answers.wait()


@asynccontextmanager
async def feeding(inference: Inference, seconds: float = 0.03) -> AsyncIterator[None]:
    task = asyncio.create_task(feed_watchdog(Notifier(), seconds, inference.ping))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynchronous
async def test_a_thread_that_answers_feeds_the_watchdog(systemd: socket.socket) -> None:
    inference = Inference()
    inference.answers.set()
    async with feeding(inference):
        assert [await hear(systemd) for _ in range(3)] == ["WATCHDOG=1"] * 3
    assert inference.num_pings == 3


@asynchronous
async def test_no_life_sign_comes_before_the_answer(systemd: socket.socket) -> None:
    inference = Inference()
    async with feeding(inference):
        await inference.pinged.wait()
        assert heard(systemd) == []
        inference.answers.set()
        assert await hear(systemd) == "WATCHDOG=1"


@asynchronous
async def test_a_stuck_engine_starves_the_watchdog(systemd: socket.socket) -> None:
    inference = Inference()
    async with feeding(inference):
        await inference.pinged.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):  # ten times what systemd would wait
                await hear(systemd)
    assert inference.num_pings == 1


@asynchronous
async def test_a_daemon_tells_its_life_in_order(systemd: socket.socket, tmp_path: Path) -> None:
    async with serving(make_config(tmp_path), notifier=Notifier()) as server:
        pass
    said = heard(systemd)
    assert said[0] == "STATUS=loading test-model"
    assert said[1] == "EXTEND_TIMEOUT_USEC=30000000"
    assert said[2] == f"READY=1\nSTATUS=serving test-model on {', '.join(server.addresses)}"
    assert said[3] == "STOPPING=1\nSTATUS=shutting down: 0 chats may finish within 5 s"
    assert said[4].startswith("EXTEND_TIMEOUT_USEC=")


@asynchronous
async def test_ready_is_said_after_a_real_token(systemd: socket.socket, tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    starting = asyncio.create_task(_serve(tmp_path, runner))
    # "Hello" in its template is two chunks, of which comes the first token; the second one takes a run more.
    for forward in range(1, PROOF_FORWARDS + 1):
        await asyncio.to_thread(runner.wait_for_forwards, forward)
        assert not any(message.startswith("READY") for message in heard(systemd))
        runner.allow()
    while not (await hear(systemd)).startswith("READY"):
        pass
    runner.open_gate()
    await starting


async def _serve(tmp_path: Path, runner: object) -> None:
    async with serving(make_config(tmp_path), lambda _: make_model(runner), Notifier()):  # type: ignore[arg-type]
        pass


@asynchronous
async def test_a_stuck_run_of_the_model_starves_the_watchdog(
    systemd: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real worker behind the watchdog: alive while idle, silent while a forward does not return."""
    monkeypatch.setenv("WATCHDOG_USEC", "60000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    runner = make_runner(is_gated=True)
    runner.allow(PROOF_FORWARDS)
    config = make_config(tmp_path, server={"drain_grace_seconds": 0.0})
    async with (
        serving(config, lambda _: make_model(runner), Notifier()),
        grpc.aio.insecure_channel(unix_target(config)) as channel,
    ):
        while await hear(systemd) != "WATCHDOG=1":
            pass
        call = start_chat(channel, chat_request())
        await asyncio.to_thread(runner.wait_for_forwards, 3)
        # What was on its way comes within one interval of 20 ms, then nothing for the rest of eight watchdog times.
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await hear(systemd)
        heard(systemd)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await hear(systemd)
        runner.open_gate()
        while await hear(systemd) != "WATCHDOG=1":
            pass
        call.cancel()
