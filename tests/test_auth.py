"""Every method behind a token: those of Hearth, those of others, and those that do not exist."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hearth.v1 import model_pb2, model_pb2_grpc, status_pb2, status_pb2_grpc
from hearthd.access.tokens import create_token, revoke_token
from hearthd.configuration.config import Config
from serving import (
    answer,
    asynchronous,
    chat_request,
    make_config,
    make_model,
    make_runner,
    serving,
    tcp_target,
    unix_target,
)

Metadata = tuple[tuple[str, str], ...]
Call = Callable[[grpc.aio.Channel, Metadata | None], Any]


async def chat(channel: grpc.aio.Channel, metadata: Metadata | None) -> None:
    await answer(channel, chat_request(), metadata=metadata)


async def list_models(channel: grpc.aio.Channel, metadata: Metadata | None) -> None:
    await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest(), metadata=metadata)


async def get_model(channel: grpc.aio.Channel, metadata: Metadata | None) -> None:
    await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(), metadata=metadata)


async def count_tokens(channel: grpc.aio.Channel, metadata: Metadata | None) -> None:
    request = model_pb2.CountTokensRequest(text="hello")
    await model_pb2_grpc.ModelServiceStub(channel).CountTokens(request, metadata=metadata)


async def get_status(channel: grpc.aio.Channel, metadata: Metadata | None) -> None:
    await status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest(), metadata=metadata)


async def check(channel: grpc.aio.Channel, metadata: Metadata | None) -> None:
    await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), metadata=metadata)


async def list_health(channel: grpc.aio.Channel, metadata: Metadata | None) -> None:
    await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), metadata=metadata)


async def watch(channel: grpc.aio.Channel, metadata: Metadata | None) -> None:
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), metadata=metadata)
    assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
    call.cancel()


async def reflect(channel: grpc.aio.Channel, metadata: Metadata | None) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), metadata=metadata)
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert "hearth.v1.ChatService" in names


METHODS: list[Call] = [chat, list_models, get_model, count_tokens, get_status, check, list_health, watch, reflect]
HEALTH: list[Call] = [check, list_health, watch]
UNKNOWN = ["/hearth.v1.ChatService/Nope", "/nope.v1.Nope/Nope", "/grpc.health.v1.Health/Nope", "/x/y"]


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@asynccontextmanager
async def channel_to(
    directory: Path, *, with_tokens: bool = True, over_unix: bool = False, **auth: Any
) -> AsyncIterator[tuple[grpc.aio.Channel, str, Config]]:
    """Give a channel to a daemon, a good token, and the configuration."""
    token_file = directory / "tokens"
    token = create_token(token_file, "kitchen")
    config = make_config(directory, auth={"token_file": token_file if with_tokens else None} | auth)
    async with serving(config) as server:
        target = unix_target(config) if over_unix else tcp_target(server)
        async with grpc.aio.insecure_channel(target) as channel:
            yield channel, token, config


@asynchronous
async def test_every_method_needs_a_token(tmp_path: Path) -> None:
    async with channel_to(tmp_path) as (channel, _, _):
        codes = {method.__name__: await code_of(method(channel, None)) for method in METHODS}
    assert codes == {method.__name__: grpc.StatusCode.UNAUTHENTICATED for method in METHODS}


@asynchronous
async def test_every_method_answers_a_good_token(tmp_path: Path) -> None:
    async with channel_to(tmp_path) as (channel, token, _):
        for method in METHODS:
            await method(channel, bearer(token))


@asynchronous
async def test_methods_that_do_not_exist_are_not_told_from_those_that_do(tmp_path: Path) -> None:
    async with channel_to(tmp_path) as (channel, token, _):
        refused = [grpc.StatusCode.UNAUTHENTICATED] * len(UNKNOWN)
        assert [await code_of(channel.unary_unary(path)(b"")) for path in UNKNOWN] == refused
        refused = [grpc.StatusCode.PERMISSION_DENIED] * len(UNKNOWN)
        assert [await code_of(channel.unary_unary(path)(b"", metadata=bearer(token))) for path in UNKNOWN] == refused
        admin = bearer(create_token(tmp_path / "tokens", "root", role="admin"))
        assert [await code_of(channel.unary_unary(path)(b"", metadata=admin)) for path in UNKNOWN] == [
            grpc.StatusCode.UNIMPLEMENTED
        ] * len(UNKNOWN)


@pytest.mark.parametrize(
    "metadata",
    [
        bearer("hearth_" + "A" * 43),
        bearer(""),
        (("authorization", "Basic a2l0Y2hlbjp4"),),
        (("authorization", "{token}"),),
        (("authorization", "Bearer {token} {token}"),),
        (("authorization", "Bearer {token}"), ("authorization", "Bearer {token}")),
        (("x-token", "{token}"),),
    ],
    ids=["unknown", "empty", "scheme", "no scheme", "two in one", "two", "other header"],
)
@asynchronous
async def test_a_wrong_credential_is_refused(tmp_path: Path, metadata: Metadata) -> None:
    async with channel_to(tmp_path) as (channel, token, _):
        filled = tuple((key, value.replace("{token}", token)) for key, value in metadata)
        assert await code_of(get_status(channel, filled)) is grpc.StatusCode.UNAUTHENTICATED


@asynchronous
async def test_the_scheme_is_read_in_any_case(tmp_path: Path) -> None:
    async with channel_to(tmp_path) as (channel, token, _):
        await get_status(channel, (("authorization", f"bEaReR {token}"),))


@asynchronous
async def test_a_revocation_needs_no_restart(tmp_path: Path) -> None:
    async with channel_to(tmp_path) as (channel, token, _):
        await get_status(channel, bearer(token))
        revoke_token(tmp_path / "tokens", "kitchen")
        assert await code_of(get_status(channel, bearer(token))) is grpc.StatusCode.UNAUTHENTICATED


@asynchronous
async def test_health_can_be_opened_and_nothing_else_is(tmp_path: Path) -> None:
    async with channel_to(tmp_path, health_open=True) as (channel, _, _):
        for method in HEALTH:
            await method(channel, None)
        for method in METHODS:
            if method not in HEALTH:
                assert await code_of(method(channel, None)) is grpc.StatusCode.UNAUTHENTICATED, method.__name__


@asynchronous
async def test_the_unix_socket_is_open_unless_configured(tmp_path: Path) -> None:
    async with channel_to(tmp_path, over_unix=True) as (channel, token, _):
        for method in METHODS:
            await method(channel, None)
        await get_status(channel, bearer(token))
        assert await code_of(get_status(channel, bearer("wrong"))) is grpc.StatusCode.UNAUTHENTICATED


@asynchronous
async def test_the_unix_socket_can_need_a_token(tmp_path: Path) -> None:
    async with channel_to(tmp_path, over_unix=True, unix_needs_token=True) as (channel, token, _):
        for method in METHODS:
            assert await code_of(method(channel, None)) is grpc.StatusCode.UNAUTHENTICATED, method.__name__
            await method(channel, bearer(token))


@asynchronous
async def test_without_a_token_file_loopback_is_open(tmp_path: Path) -> None:
    async with channel_to(tmp_path, with_tokens=False) as (channel, _, _):
        for method in METHODS:
            await method(channel, None)


@asynchronous
async def test_a_refusal_comes_before_the_request_is_read(tmp_path: Path) -> None:
    """A caller who is not let in cannot keep the daemon waiting for its message, nor make it hold one."""
    async with channel_to(tmp_path) as (channel, _, _):
        call = channel.stream_stream("/hearth.v1.ModelService/CountTokens")()
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


@asynchronous
async def test_callers_share_no_cache(tmp_path: Path) -> None:
    """Two tokens, and no token on another socket: the same prompt is cached only for whoever sent it."""
    token_file = tmp_path / "tokens"
    kitchen, cellar = create_token(token_file, "kitchen"), create_token(token_file, "cellar")
    config = make_config(tmp_path, auth={"token_file": token_file})

    async def cached(channel: grpc.aio.Channel, metadata: Metadata | None) -> int:
        _, final = await answer(channel, chat_request("the same words"), metadata=metadata)
        return int(final.usage.cached_prompt_tokens)

    async with (
        serving(config, lambda _: make_model(make_runner(num_slots=4))) as server,
        grpc.aio.insecure_channel(tcp_target(server)) as tcp,
        grpc.aio.insecure_channel(unix_target(config)) as unix,
    ):
        for is_cached in (False, True):
            assert (await cached(tcp, bearer(kitchen)) > 0) == is_cached
            assert (await cached(tcp, bearer(cellar)) > 0) == is_cached
            assert (await cached(unix, None) > 0) == is_cached


@asynchronous
async def test_neither_tokens_nor_names_of_methods_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with channel_to(tmp_path) as (channel, token, _):
        await code_of(channel.unary_unary("/canary.Service/Canary")(b"", metadata=bearer("canary")))
        await chat(channel, bearer(token))
    assert "was refused" in caplog.text
    assert "anary" not in caplog.text
    assert token not in caplog.text
