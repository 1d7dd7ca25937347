"""The daemon's life in the test's own process: bind, load, health, drain, end; and gRPC's limits, by their effect."""

import asyncio
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fakes import FakeRunner
from hearth.v1 import model_pb2, model_pb2_grpc, status_pb2, status_pb2_grpc
from hearthd.access.tokens import create_token, revoke_token
from hearthd.configuration.config import Config
from hearthd.errors import AddressInUseError, BundleError, ConfigError, EngineCrashedError
from hearthd.inference.model import Model
from hearthd.server import Server
from serving import (
    NAME,
    PROOF_FORWARDS,
    answer,
    asynchronous,
    chat_request,
    make_config,
    make_model,
    make_runner,
    serving,
    start_chat,
    tcp_target,
    unix_target,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ["", "hearth.v1.ChatService", "hearth.v1.ModelService", "hearth.v1.StatusService", "grpc.health.v1.Health"]


@asynccontextmanager
async def gated(directory: Path, **sections: Any) -> AsyncIterator[tuple[Server, FakeRunner, grpc.aio.Channel]]:
    """Run a daemon whose forwards wait for the test."""
    runner = make_runner(is_gated=True)
    runner.allow(PROOF_FORWARDS)
    config = make_config(directory, **sections)
    async with (
        grpc.aio.insecure_channel(unix_target(config)) as channel,
        serving(config, lambda _: make_model(runner)) as server,
    ):
        yield server, runner, channel
        runner.open_gate()


async def begun(runner: FakeRunner, count: int) -> None:
    await asyncio.to_thread(runner.wait_for_forwards, PROOF_FORWARDS + count)


async def status(channel: grpc.aio.Channel) -> status_pb2.GetStatusResponse:
    return await status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest())


async def check(channel: grpc.aio.Channel, service: str = "") -> int:
    response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(response.status)


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


# Health and reflection.


@asynchronous
async def test_health_answers_for_the_daemon_and_each_service(tmp_path: Path) -> None:
    async with gated(tmp_path) as (_, _, channel):
        assert [await check(channel, service) for service in SERVICES] == [SERVING] * 5
        assert await code_of(check(channel, "nope")) is grpc.StatusCode.NOT_FOUND
        listed = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
        names = [*SERVICES, f"hearth.v1.ChatService/{NAME}"]
        assert {name: each.status for name, each in listed.statuses.items()} == dict.fromkeys(names, SERVING)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="nope"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


@asynchronous
async def test_health_tells_a_watcher_of_loading_serving_and_the_end_and_then_ends(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    config = make_config(tmp_path)
    server = Server(config, lambda _: make_model(runner))
    running = asyncio.create_task(server.run())
    await asyncio.to_thread(runner.wait_for_forwards, 1)
    async with grpc.aio.insecure_channel(unix_target(config)) as channel:
        watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == NOT_SERVING
        runner.open_gate()
        assert (await anext(watch)).status == SERVING
        server.stop()
        assert [response.status async for response in watch] == [NOT_SERVING]
    await running


@asynchronous
async def test_reflection_shows_every_service(tmp_path: Path) -> None:
    async with gated(tmp_path) as (_, _, channel):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="hearth.v1.ChatService"),
        ]
        listed, described = [response async for response in stub.ServerReflectionInfo(iter(requests))]
        names = [service.name for service in listed.list_services_response.service]
        assert sorted(names) == sorted(
            [*SERVICES[1:], "hearth.v1.PairingService", "grpc.reflection.v1alpha.ServerReflection"]
        )
        assert described.file_descriptor_response.file_descriptor_proto


@asynchronous
async def test_health_answers_while_the_queue_is_full(tmp_path: Path) -> None:
    async with gated(tmp_path) as (_, runner, channel):
        calls = [start_chat(channel, chat_request()) for _ in range(4)]
        while (await status(channel)).queued_count < 2:
            pass
        assert await check(channel) == SERVING
        assert await code_of(answer(channel, chat_request())) is grpc.StatusCode.RESOURCE_EXHAUSTED
        runner.open_gate()
        for call in calls:
            assert [response async for response in call][-1].HasField("final")


# Draining.


@asynchronous
async def test_a_running_answer_finishes_while_the_daemon_drains(tmp_path: Path) -> None:
    async with gated(tmp_path) as (server, runner, channel):
        call = start_chat(channel, chat_request(max_tokens=5))
        await begun(runner, 1)
        watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == SERVING
        server.stop()
        assert [response.status async for response in watch] == [NOT_SERVING]
        assert await check(channel) == NOT_SERVING
        assert (await status(channel)).state == status_pb2.DAEMON_STATE_DRAINING
        assert await code_of(answer(channel, chat_request())) is grpc.StatusCode.UNAVAILABLE
        runner.open_gate()
        responses = [response async for response in call]
        assert responses[-1].final.usage.completion_tokens == 5


@asynchronous
async def test_an_answer_that_does_not_finish_hears_unavailable(tmp_path: Path) -> None:
    async with gated(tmp_path, server={"drain_grace_seconds": 0.1}) as (server, runner, channel):
        call = start_chat(channel, chat_request("word " * 40, max_tokens=5))
        await begun(runner, 1)
        server.stop()
        # The run of its prompt waits for ever, and is stopped in the middle.
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in await call.details()


@asynchronous
async def test_a_second_stop_waits_for_nobody(tmp_path: Path) -> None:
    async with gated(tmp_path, server={"drain_grace_seconds": 3600.0}) as (server, runner, channel):
        call = start_chat(channel, chat_request(max_tokens=5))
        await begun(runner, 1)
        server.stop()
        while (await status(channel)).state != status_pb2.DAEMON_STATE_DRAINING:
            pass
        server.stop()
        assert await call.code() is grpc.StatusCode.UNAVAILABLE


@asynchronous
async def test_an_idle_daemon_ends_at_once_in_spite_of_who_watches(tmp_path: Path) -> None:
    async with AsyncExitStack() as watchers:
        async with gated(tmp_path) as (server, _, channel):
            other = await watchers.enter_async_context(grpc.aio.insecure_channel(tcp_target(server)))
            calls = [
                aiter(health_pb2_grpc.HealthStub(each).Watch(health_pb2.HealthCheckRequest()))
                for each in (channel, channel, other)
            ]
            for call in calls:
                await anext(call)
            started = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - started < 1


@asynchronous
async def test_stopped_while_loading_it_never_serves(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    server = Server(make_config(tmp_path), lambda _: make_model(runner))
    running = asyncio.create_task(server.run())
    await asyncio.to_thread(runner.wait_for_forwards, 1)
    server.stop()
    runner.open_gate()
    await running
    assert not server.is_ready.is_set()


# Failing.


@asynchronous
async def test_a_model_that_cannot_be_loaded_ends_the_daemon(tmp_path: Path) -> None:
    def load(_: Config) -> Model:
        raise BundleError("model.data is damaged")

    with pytest.raises(BundleError, match="is damaged"):
        async with serving(make_config(tmp_path), load):
            pass
    assert not (tmp_path / "hearthd.sock").exists()


@asynchronous
async def test_a_crash_of_the_engine_is_told_to_callers_and_ends_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(runner := make_runner(is_gated=True))
    runner.allow(PROOF_FORWARDS)
    config = make_config(tmp_path)
    server = Server(config, lambda _: model)
    running = asyncio.create_task(server.run())
    async with grpc.aio.insecure_channel(unix_target(config)) as channel:
        await server.is_ready.wait()
        watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == SERVING
        call = start_chat(channel, chat_request())
        await begun(runner, 1)

        def crash() -> Any:
            raise RuntimeError("canary")

        monkeypatch.setattr(model.engine, "step", crash)
        runner.open_gate()
        assert await call.code() is grpc.StatusCode.INTERNAL
        with pytest.raises(EngineCrashedError) as caught:
            await running
        assert caught.value.incident in await call.details()
        assert "canary" not in await call.details()
        assert [response.status async for response in watch] == [NOT_SERVING]


# Addresses.


@asynchronous
async def test_a_second_daemon_on_the_same_socket_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    async with gated(tmp_path) as (_, runner, channel):
        runner.open_gate()
        second = make_config(tmp_path, server={"tcp": ()})
        with pytest.raises(AddressInUseError, match=r"served by another hearthd \(process \d+\)"):
            async with serving(second):
                pass
        await answer(channel, chat_request())
    assert not (tmp_path / "hearthd.sock").exists()


@asynchronous
async def test_a_second_daemon_on_the_same_port_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    async with gated(tmp_path) as (server, runner, _):
        runner.open_gate()
        (tmp_path / "second").mkdir()
        for address in (tcp_target(server), f"0.0.0.0:{tcp_target(server).rpartition(':')[2]}"):
            second = make_config(tmp_path / "second", server={"tcp": (address,), "allow_insecure_lan": True})
            with pytest.raises(AddressInUseError, match="another program listens there"):
                async with serving(second):
                    pass
            assert not (tmp_path / "second/hearthd.sock").exists()
        async with grpc.aio.insecure_channel(tcp_target(server)) as channel:
            await answer(channel, chat_request())


@asynchronous
async def test_a_socket_left_by_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "hearthd.sock"))
    async with gated(tmp_path) as (_, runner, channel):
        runner.open_gate()
        await answer(channel, chat_request())


@asynchronous
async def test_a_file_that_is_no_socket_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "hearthd.sock").write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        async with serving(make_config(tmp_path)):
            pass
    assert (tmp_path / "hearthd.sock").read_text() == "precious"


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
@asynchronous
async def test_the_socket_has_its_mode_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    async with gated(tmp_path, server={"unix_socket_mode": mode}):
        assert stat.S_IMODE((tmp_path / "hearthd.sock").stat().st_mode) == mode


@asynchronous
async def test_odd_characters_in_a_path_are_that_path(tmp_path: Path) -> None:
    path = tmp_path / "a b%41 ü/hearthd.sock"
    async with serving(make_config(tmp_path, server={"unix_socket": path})) as server:
        assert path.is_socket()
        assert server.addresses[0] == f"unix://{path}"


@asynchronous
async def test_only_what_is_configured_is_listened_on(tmp_path: Path) -> None:
    async with serving(make_config(tmp_path, server={"tcp": ()})) as server:
        assert server.addresses == [f"unix://{tmp_path}/hearthd.sock"]
    async with serving(
        make_config(tmp_path, server={"unix_socket": None, "tcp": ("127.0.0.1:0", "[::1]:0")})
    ) as server:
        assert [address.rpartition(":")[0] for address in server.addresses] == ["127.0.0.1", "[::1]"]
        assert not (tmp_path / "hearthd.sock").exists()


def test_an_address_for_other_machines_is_refused_before_anything_is_bound(tmp_path: Path) -> None:
    config = make_config(tmp_path, server={"tcp": ("0.0.0.0:0",)})
    with pytest.raises(ConfigError, match="which other machines can reach"):
        Server(config, lambda _: make_model(make_runner()))
    assert list(tmp_path.iterdir()) == []


@asynchronous
async def test_what_is_open_by_flag_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(make_config(tmp_path)):
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
    create_token(tmp_path / "tokens", "kitchen")
    revoke_token(tmp_path / "tokens", "kitchen")
    config = make_config(
        tmp_path,
        server={"tcp": ("0.0.0.0:0",), "allow_insecure_lan": True},
        auth={"token_file": tmp_path / "tokens"},
    )
    async with serving(config):
        assert "0.0.0.0:0 is open to the network without TLS or authentication" in caplog.text
        assert "has no token, so nobody can call on TCP" in caplog.text


# gRPC's limits.


@asynchronous
async def test_a_message_over_the_limit_is_refused_also_when_it_travels_compressed(tmp_path: Path) -> None:
    config = make_config(tmp_path, limits={"max_request_bytes": 10_000})
    async with serving(config) as server, grpc.aio.insecure_channel(tcp_target(server)) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        assert (await stub.CountTokens(model_pb2.CountTokensRequest(text="a" * 9_000))).token_count
        for compression in (None, grpc.Compression.Gzip):
            request = model_pb2.CountTokensRequest(text="a" * 3_000_000)
            code = await code_of(stub.CountTokens(request, compression=compression))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


@asynchronous
async def test_metadata_over_the_limit_is_refused(tmp_path: Path) -> None:
    async with serving(make_config(tmp_path)) as server, grpc.aio.insecure_channel(tcp_target(server)) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        await stub.GetStatus(status_pb2.GetStatusRequest(), metadata=(("x", "y" * 4_000),))
        call = stub.GetStatus(status_pb2.GetStatusRequest(), metadata=(("x", "y" * 9_000),))
        assert await code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED


@asynchronous
async def test_a_caller_that_connects_and_says_nothing_is_cut_off(tmp_path: Path) -> None:
    async with serving(make_config(tmp_path)) as server:
        host, _, port = tcp_target(server).rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        # Handshake: 5 seconds. What comes before is HTTP/2's own settings frame.
        async with asyncio.timeout(10):
            await reader.read(-1)
        writer.close()


@asynchronous
async def test_connections_over_the_limit_leave_those_that_are_there_and_the_unix_socket(tmp_path: Path) -> None:
    config = make_config(tmp_path, server={"max_connections": 3})
    async with serving(config) as server, AsyncExitStack() as stack:
        own_pool = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(tcp_target(server), options=own_pool))
            for _ in range(4)
        ]
        for channel in channels[:3]:
            await status(channel)
        stub = status_pb2_grpc.StatusServiceStub(channels[3])
        assert await code_of(stub.GetStatus(status_pb2.GetStatusRequest(), timeout=1)) in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )
        for channel in channels[:3]:
            await status(channel)
        unix = await stack.enter_async_context(grpc.aio.insecure_channel(unix_target(config)))
        await status(unix)
