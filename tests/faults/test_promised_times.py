"""How long the daemon with the real model takes for what must not wait: refusals, health, cancels, others' chats.

The figures are the point: they stand in docs/faults.md. A busy machine makes them what it likes, so the bounds only
find what hangs. `pytest -m model tests/faults/test_promised_times.py` prints them at its end.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from daemon_process import real
from hearth.v1 import status_pb2, status_pb2_grpc
from hearthd.bundles.bundle import Bundle
from places import DEFAULT_BUNDLE
from serving import chat_request, start_chat

pytestmark = pytest.mark.model

_PATIENCE_SECONDS = 240
# Ten times what is promised, and some more for a machine that runs other tests.
_HANGS_SECONDS = {"refusal": 0.5, "health": 1.0, "cancel": 5.0}
# Deltas of a chat in which a neighbour with 20 logprobs for each token fills the window of a stream.
_UNCOUNTED = 190
LONG = "Tell me a very long story about a lighthouse, with many details of each day."
ANIMALS = "Write a very long list of animals, each with a sentence on what it eats."
# Some 1,700 tokens, which take seconds to read.
PAGES = "The keeper of the lighthouse went up the stairs, lit the lamp, and looked out over the dark sea. " * 80


@asynccontextmanager
async def daemon(directory: Path, **settings: str) -> AsyncIterator[grpc.aio.Channel]:
    environment = {f"HEARTHD_{name}": value for name, value in settings.items()} | {"HEARTHD_ENGINE_THREADS": "1"}
    with real(directory, DEFAULT_BUNDLE.parent, **environment) as process:
        await asyncio.to_thread(process.wait_for, "READY=1")
        async with grpc.aio.insecure_channel(f"unix:{process.socket_path}") as channel:
            yield channel


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await test()

    asyncio.run(bounded())


async def first(responses: AsyncIterator[Any], event: str) -> None:
    """Read until the first event of a kind."""
    while (await anext(responses)).WhichOneof("event") != event:
        pass


async def timed(awaited: Awaitable[object]) -> float:
    began = time.perf_counter()
    await awaited
    return time.perf_counter() - began


async def follow(channel: grpc.aio.Channel) -> tuple[AsyncIterator[Any], float]:
    """Return a short chat that waits for the only slot, and when it was sent."""
    while True:
        responses, sent = aiter(start_chat(channel, chat_request("Hello.", max_tokens=1))), time.perf_counter()
        # It may overtake a long prompt that is still being tokenised.
        async for response in responses:
            if response.WhichOneof("event") == "queued":
                return responses, sent


def describe(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    middle, late = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
    return f"median {middle * 1000:.1f} ms, p99 {late * 1000:.1f} ms, longest {ordered[-1] * 1000:.1f} ms"


def test_a_full_queue_refuses_and_health_answers_while_the_model_works(
    default_bundle: Bundle, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    async def measure() -> None:
        async with daemon(tmp_path, ENGINE_SLOTS="1", LIMITS_MAX_QUEUED="1") as channel:
            running = start_chat(channel, chat_request(LONG, max_tokens=1900))
            await first(aiter(running), "delta")
            waiting = start_chat(channel, chat_request(LONG, max_tokens=1900))
            await first(aiter(waiting), "queued")
            stub = health_pb2_grpc.HealthStub(channel)

            async def be_refused() -> None:
                code = await start_chat(channel, chat_request("One too many.")).code()
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED

            refusals = [await timed(be_refused()) for _ in range(200)]
            checks = [await timed(stub.Check(health_pb2.HealthCheckRequest())) for _ in range(500)]
            # It was busy all the time.
            assert not running.done()
            assert not waiting.done()
            waiting.cancel()
            running.cancel()
        figure(f"refused by a full queue: {describe(refusals)} (200 calls)")
        figure(f"health with a full queue: {describe(checks)} (500 calls)")
        assert statistics.median(refusals) < _HANGS_SECONDS["refusal"]
        assert statistics.median(checks) < _HANGS_SECONDS["health"]

    run(measure)


def test_a_chat_that_is_cancelled_while_its_prompt_is_read_frees_its_slot(
    default_bundle: Bundle, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    async def measure() -> None:
        waits = []
        async with daemon(tmp_path, ENGINE_SLOTS="1") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            status = status_pb2_grpc.StatusServiceStub(channel)
            for number in range(16):
                read = start_chat(channel, chat_request(f"{number} {PAGES}", max_tokens=1))
                while not (await status.GetStatus(status_pb2.GetStatusRequest())).running_count:
                    pass
                following, sent = await follow(channel)
                # Into the middle of one run of the model or another.
                while time.perf_counter() - sent < 0.05 + 0.06 * number:
                    await stub.Check(health_pb2.HealthCheckRequest())
                assert not read.done(), "the prompt was read before it could be cancelled"
                read.cancel()
                cancelled = time.perf_counter()
                timings = [response async for response in following][-1].final.timings
                waits.append(max(sent + timings.queue_ms / 1000 - cancelled, 0.0))
        figure(f"slot free after a cancel in mid-prompt: {describe(waits)} (16 cancels)")
        assert statistics.median(waits) < _HANGS_SECONDS["cancel"]

    run(measure)


@pytest.mark.slow
def test_a_neighbour_that_does_not_read_slows_nobody(
    default_bundle: Bundle, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """Compared with a neighbour that reads: two sequences take longer than one, whoever reads them."""
    small_window = [("grpc.http2.lookahead_bytes", 65535), ("grpc.http2.bdp_probe", 0)]
    settings = {"SERVER_WRITE_TIMEOUT_SECONDS": "600", "SERVER_STREAM_BACKLOG_BYTES": str(16 * 2**20)}
    # A message for each token: they are what is counted and timed.
    settings["SERVER_STREAM_INTERVAL_MS"] = "0"

    async def measure() -> None:
        gaps: dict[str, list[float]] = {"reading": [], "stuck": []}
        async with (
            daemon(tmp_path, ENGINE_SLOTS="2", **settings) as channel,
            grpc.aio.insecure_channel(channel_target(tmp_path), options=small_window) as slow,
        ):
            num_bytes = 0

            async def read_all(responses: AsyncIterator[Any]) -> None:
                nonlocal num_bytes
                async for response in responses:
                    num_bytes += response.ByteSize()

            for kind, neighbours in (("reading", channel), ("stuck", slow)):
                neighbour = start_chat(neighbours, chat_request(LONG, max_tokens=1800, top_logprobs=20))
                responses = aiter(neighbour)
                await first(responses, "delta")
                reading = asyncio.create_task(read_all(responses)) if kind == "reading" else None
                mine = aiter(start_chat(channel, chat_request(ANIMALS, max_tokens=_UNCOUNTED + 120, temperature=0.0)))
                for _ in range(_UNCOUNTED):
                    await first(mine, "delta")
                # More than a window: the other neighbour's stream has come to a stand by now.
                assert num_bytes > 65535
                before = time.perf_counter()
                async for _response in mine:
                    now = time.perf_counter()
                    gaps[kind].append(now - before)
                    before = now
                assert not neighbour.done()
                neighbour.cancel()
                if reading:
                    await asyncio.gather(reading, return_exceptions=True)
        late = {kind: sorted(each)[int(len(each) * 0.95)] for kind, each in gaps.items()}
        figure(
            f"between two tokens, p95: {late['reading'] * 1000:.1f} ms beside a neighbour that reads, "
            f"{late['stuck'] * 1000:.1f} ms beside one that does not ({late['stuck'] / late['reading'] - 1:+.1%})"
        )
        assert late["stuck"] < 10 * late["reading"]

    run(measure)


def channel_target(directory: Path) -> str:
    return f"unix:{directory}/hearthd.sock"
