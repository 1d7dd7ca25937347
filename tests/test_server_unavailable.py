"""UNAVAILABLE says whether waiting helps, and the client goes by it: a daemon that loads, a model that cannot load."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

import hearth
from hearthd.errors import BundleError, NotServingError
from hearthd.server import Server
from hearthd.services.statuses import status_of
from hearthd.watching.outcomes import Refusal
from serving import NAME, answer, asynchronous, chat_request, make_config, make_model, make_runner, serving, unix_target
from several_models import Shelf, several_config


def trailers_of(error: Any) -> dict[str, Any]:
    return dict(error.trailing_metadata())


def retry_delay_ms(trailers: dict[str, Any]) -> int | None:
    details = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b"")).details
    found = error_details_pb2.RetryInfo()
    return found.retry_delay.ToMilliseconds() if any(detail.Unpack(found) for detail in details) else None


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return caught.value


@asynchronous
async def test_a_daemon_that_loads_or_shuts_down_says_when_to_come_again(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    config = make_config(tmp_path)
    server = Server(config, lambda _: make_model(runner))
    running = asyncio.create_task(server.run())
    await asyncio.to_thread(runner.wait_for_forwards, 1)
    async with grpc.aio.insecure_channel(unix_target(config)) as channel:
        trailers = trailers_of(await refusal(answer(channel, chat_request())))
        assert retry_delay_ms(trailers) == int(trailers["grpc-retry-pushback-ms"]) == 250
    async with hearth.AsyncClient(f"unix://{config.server.unix_socket}") as client:
        waiting = asyncio.create_task(client.chat("hello"))
        # It has been sent away at least once more before the model is there.
        while server._parts.observation.tally.refused[Refusal.NOT_SERVING] < 2:
            await client.status()
        runner.open_gate()
        assert (await waiting).text
    server.stop()
    await running


@asynchronous
async def test_a_model_that_cannot_be_loaded_is_not_waited_for(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.failing["other"] = BundleError("damaged")
    config = several_config(tmp_path, "other")
    async with serving(config, shelf.load, survey=shelf.survey) as server:
        async with grpc.aio.insecure_channel(unix_target(config)) as channel:
            # The first one hears that it waits, and then the failure; those who come next hear it at once.
            for _ in range(2):
                trailers = trailers_of(await refusal(answer(channel, chat_request(model="other"))))
                assert (trailers["grpc-retry-pushback-ms"], retry_delay_ms(trailers)) == ("-1", None)
        # The test's own limit of time is shorter than this patience.
        async with hearth.AsyncClient(f"unix://{config.server.unix_socket}", ready_timeout=3600) as client:
            for call in (client.chat("hello", model="other"), client.count_tokens("hello", model="other")):
                with pytest.raises(hearth.UnavailableError, match="other cannot be loaded now") as caught:
                    await call
                assert not caught.value.is_transient
            assert (await client.chat("hello")).text
        assert shelf.loads == [NAME, "other"]
        assert server._parts.observation.tally.refused[Refusal.NOT_SERVING] == 4


def test_waiting_a_little_helps_unless_it_is_said() -> None:
    assert status_of(NotServingError("loading")).retry_after_ms == 250
    assert status_of(NotServingError("damaged", retry_after_seconds=None)).trailers() == (
        ("grpc-retry-pushback-ms", "-1"),
    )
