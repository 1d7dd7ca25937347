"""What only asyncio can do to a client: cancel tasks, close beside them, run many at once, drop streams."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import hearth
import scripted_daemon as peer
from hearth.v1 import chat_pb2


def half_an_answer(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
    yield peer.delta("half")
    peer.wait_for_end(context)


@pytest.fixture
def daemon() -> Iterator[peer.ScriptedDaemon]:
    with peer.ScriptedDaemon(half_an_answer) as daemon:
        yield daemon


async def ended(daemon: peer.ScriptedDaemon) -> bool:
    return await asyncio.to_thread(daemon.chat_ended.wait, 5)


def test_a_cancelled_task_cancels_its_call(daemon: peer.ScriptedDaemon) -> None:
    async def run() -> None:
        async with hearth.AsyncClient(daemon.address) as client:
            stream = client.stream("?")
            await anext(stream)
            task = asyncio.create_task(stream.read())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await ended(daemon)

    asyncio.run(run())


def test_a_timeout_around_a_call_is_the_tasks_own(daemon: peer.ScriptedDaemon) -> None:
    async def run() -> None:
        async with hearth.AsyncClient(daemon.address) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.chat("?")
            assert await ended(daemon)

    asyncio.run(run())


@pytest.mark.parametrize("what", ["stream", "client"])
def test_closing_beside_a_reader_ends_it(daemon: peer.ScriptedDaemon, what: str) -> None:
    async def run() -> None:
        async with hearth.AsyncClient(daemon.address) as client:
            stream = client.stream("?")
            await anext(stream)
            reader = asyncio.create_task(stream.read())
            await asyncio.sleep(0)
            await (stream if what == "stream" else client).aclose()
            with pytest.raises(hearth.CallCancelledError):
                await reader
            assert not reader.cancelled()
            assert await ended(daemon)

    asyncio.run(run())


@pytest.mark.parametrize("what", ["stream", "client"])
def test_closing_ends_the_wait_for_another_attempt(daemon: peer.ScriptedDaemon, what: str) -> None:
    daemon.script = peer.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", pushback="600000")

    async def run() -> None:
        async with hearth.AsyncClient(daemon.address, timeout=3600) as client:
            stream = client.stream("?")
            reader = asyncio.create_task(stream.read())
            assert await ended(daemon)
            await (stream if what == "stream" else client).aclose()
            with pytest.raises(hearth.HearthError):
                await reader

    asyncio.run(run())


def test_a_closed_client_says_so(daemon: peer.ScriptedDaemon) -> None:
    async def run() -> None:
        client = hearth.AsyncClient(daemon.address)
        await client.aclose()
        with pytest.raises(hearth.CallCancelledError, match="the client is closed"):
            await client.models()
        with pytest.raises(hearth.CallCancelledError, match="the client is closed"):
            await client.chat("?")

    asyncio.run(run())


def test_dropping_a_stream_cancels_its_call(daemon: peer.ScriptedDaemon) -> None:
    async def run() -> None:
        async with hearth.AsyncClient(daemon.address) as client:
            async for delta in client.stream("?"):
                assert delta.text == "half"
                break
            assert await ended(daemon)

    asyncio.run(run())


def test_many_at_once_keep_apart(daemon: peer.ScriptedDaemon) -> None:
    def echo(request: chat_pb2.ChatRequest, _: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield from (peer.delta(character) for character in request.messages[0].content)
        yield peer.final()

    daemon.script = echo

    async def run() -> None:
        questions = [f"question number {number}" for number in range(50)]
        async with hearth.AsyncClient(daemon.address) as client:
            answers = await asyncio.gather(*map(client.chat, questions))
        assert [answer.text for answer in answers] == questions

    asyncio.run(run())
