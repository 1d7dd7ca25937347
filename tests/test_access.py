"""Whoever has no right to call learns nothing, from any method; whoever has one may do what the role says, no more."""

import asyncio
import datetime
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fakes import FakeRunner
from hearth.v1 import chat_pb2, model_pb2, model_pb2_grpc
from hearth.v1 import status_pb2 as hearth_status_pb2
from hearth.v1 import status_pb2_grpc as hearth_status_pb2_grpc
from hearthd.access import auth
from hearthd.access.tokens import create_token, revoke_token
from hearthd.configuration.roles import BUILT_IN, METHODS, OPEN_METHODS, Role
from hearthd.errors import ConfigError
from hearthd.priority import Priority
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

UNKNOWN = [
    "hearth.v1.ChatService/Nope",
    "nope.v1.Nope/Nope",
    "grpc.health.v1.Health/Nope",
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "x/y",
    "",
]
Metadata = tuple[tuple[str, str], ...]


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


@asynccontextmanager
async def daemon(directory: Path, load: Any = None, **sections: Any) -> AsyncIterator[tuple[grpc.aio.Channel, Server]]:
    """Run a daemon whose TCP needs a token; give a channel to it."""
    tokens = directory / "tokens"
    if not tokens.exists():
        create_token(tokens, "nobody")
    config = make_config(directory, **{"auth": {"token_file": tokens}} | sections)
    async with serving(config, load) as server, grpc.aio.insecure_channel(tcp_target(server)) as channel:
        yield channel, server


async def every_method(channel: grpc.aio.Channel, metadata: Metadata) -> list[str]:
    """Ask the daemon itself what it serves, and its descriptors what methods that has."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), metadata=metadata)
    services = [service.name for service in (await call.read()).list_services_response.service]
    pool = descriptor_pool.Default()
    return [f"{name}/{method.name}" for name in services for method in pool.FindServiceByName(name).methods]


async def outcome(channel: grpc.aio.Channel, method: str, metadata: Metadata | None) -> tuple[Any, ...]:
    """Return all that a call tells whoever makes it; what is answered, and streams on, is left."""
    call = channel.unary_stream(f"/{method}")(b"", metadata=metadata)
    with suppress(grpc.aio.AioRpcError):
        if await call.read() is not grpc.aio.EOF:
            call.cancel()
            return (grpc.StatusCode.OK,)
    code = await call.code()
    metadatas = [tuple(sorted(await each())) for each in (call.initial_metadata, call.trailing_metadata)]
    return code, await call.details(), *metadatas


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def let_pass_until(runner: FakeRunner, awaited: Any) -> Any:
    """Let a gated runner do one forward after the other until something has happened."""
    task = asyncio.ensure_future(awaited)
    while not task.done():
        runner.allow()
        await asyncio.to_thread(runner.wait_for_forwards, runner.num_forwards + 1)
    return await task


async def get_status(channel: grpc.aio.Channel, metadata: Metadata | None = None) -> Any:
    stub = hearth_status_pb2_grpc.StatusServiceStub(channel)
    return await stub.GetStatus(hearth_status_pb2.GetStatusRequest(), metadata=metadata)


# No right to call.


@asynchronous
async def test_roles_know_every_method_that_is_served(tmp_path: Path) -> None:
    """A method that is added must be given to a role, or be for `all` by intention."""
    admin = create_token(tmp_path / "tokens", "root", role="admin")
    async with daemon(tmp_path) as (channel, _):
        served = await every_method(channel, bearer(admin))
    assert len(served) >= 9
    assert sorted(served) == sorted([*(method for group in METHODS.values() for method in group), *OPEN_METHODS])


@asynchronous
async def test_a_scan_without_a_right_to_call_learns_nothing_from_any_method(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    admin = create_token(tokens, "root", role="admin")
    revoked, expired = create_token(tokens, "revoked"), create_token(tokens, "expired", seconds_valid=-1)
    revoke_token(tokens, "revoked")
    credentials: dict[str, Metadata | None] = {
        "none": None,
        "wrong": bearer("hearth_" + "A" * 43),
        "revoked": bearer(revoked),
        "expired": bearer(expired),
        "empty": bearer(""),
        "a name": bearer("root"),
        "a password": (("authorization", "Basic cm9vdDpyb290"),),
        "bytes": (("authorization-bin", b"\xff"),),  # type: ignore[dict-item]
        "twice": bearer(admin) * 2,
        "too much": bearer("x" * 4000),
    }
    async with daemon(tmp_path) as (channel, _):
        methods = [*await every_method(channel, bearer(admin)), *UNKNOWN]
        outcomes = {
            (method, name): await outcome(channel, method, metadata)
            for method in methods
            for name, metadata in credentials.items()
        }
    assert len(outcomes) >= (9 + len(UNKNOWN)) * len(credentials)
    (only,) = set(outcomes.values())
    code, text, initial, trailing = only
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert text.startswith("no valid credential: send the metadata `authorization: Bearer TOKEN`")
    assert not any(word in text for word in ("expired", "revoked", NAME))
    assert (initial, trailing) == ((), ())


@asynchronous
async def test_nothing_that_somebody_without_a_right_sends_is_read(tmp_path: Path) -> None:
    """Not even that it is too large, or no message at all."""
    async with daemon(tmp_path) as (channel, _):
        for data in (b"\xff", b"\x00" * 1_000_000):
            call = channel.unary_unary("/hearth.v1.ModelService/CountTokens")(data)
            assert (await refusal(call)).code() is grpc.StatusCode.UNAUTHENTICATED
        waiting = channel.stream_stream("/hearth.v1.ChatService/Chat")()
        assert await waiting.code() is grpc.StatusCode.UNAUTHENTICATED


@asynchronous
async def test_a_scan_does_not_fill_the_journal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with daemon(tmp_path) as (channel, server):
        for _ in range(10):
            await asyncio.gather(*(outcome(channel, "x/y", None) for _ in range(20)))
        server._parts.authenticator._tell_from = 0.0
        await outcome(channel, "x/y", None)
    lines = [record.getMessage() for record in caplog.records if "without a valid credential" in record.getMessage()]
    assert lines[0].endswith(" was refused")
    assert len(lines) < 20
    told = [re.search(r"\((\d+) others before it\)$", line) for line in lines[1:]]
    assert sum(int(match[1]) for match in told if match) + len(lines) == 201


@asynchronous
async def test_what_is_revoked_or_expires_ends_at_the_next_call_of_an_open_connection(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    kitchen = bearer(create_token(tokens, "kitchen"))
    async with daemon(tmp_path) as (channel, server):
        await get_status(channel, kitchen)
        revoke_token(tokens, "kitchen")
        assert (await refusal(get_status(channel, kitchen))).code() is grpc.StatusCode.UNAUTHENTICATED

        guest = bearer(create_token(tokens, "guest", seconds_valid=3600))
        await get_status(channel, guest)
        file = server._parts.authenticator._tokens
        assert file is not None
        in_an_hour = datetime.datetime.now(datetime.UTC).timestamp() + 3601
        file._now = lambda: in_an_hour
        assert (await refusal(get_status(channel, guest))).code() is grpc.StatusCode.UNAUTHENTICATED


@asynchronous
async def test_a_chat_that_runs_when_its_token_is_revoked_is_finished(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    runner.allow(PROOF_FORWARDS)
    kitchen = bearer(create_token(tmp_path / "tokens", "kitchen"))
    async with daemon(tmp_path, lambda _: make_model(runner)) as (channel, _):
        call = start_chat(channel, chat_request(), metadata=kitchen)
        await asyncio.to_thread(runner.wait_for_forwards, PROOF_FORWARDS + 1)
        revoke_token(tmp_path / "tokens", "kitchen")
        runner.open_gate()
        assert [response async for response in call][-1].HasField("final")


@asynchronous
async def test_what_goes_on_until_the_caller_leaves_ends_soon_after_its_token_is_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert auth._SECONDS_BETWEEN_LOOKS <= 5
    monkeypatch.setattr(auth, "_SECONDS_BETWEEN_LOOKS", 0.01)
    tokens = tmp_path / "tokens"
    kitchen, other = (bearer(create_token(tokens, name, role="admin")) for name in ("kitchen", "other"))
    async with daemon(tmp_path) as (channel, server):
        watches = [
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), metadata=metadata)
            for metadata in (kitchen, other)
        ]
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(metadata=kitchen)
        await reflection.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        for call in (*watches, reflection):
            await call.read()
        revoke_token(tokens, "kitchen")
        for call in (watches[0], reflection):
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "authorization: Bearer TOKEN" in await call.details()
        # Its neighbour has been asked as often, and goes on to the daemon's end.
        assert not watches[1].done()
        server.stop()
        assert (await watches[1].read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await watches[1].code() is grpc.StatusCode.OK


@asynchronous
async def test_a_watch_of_open_health_needs_no_token_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_SECONDS_BETWEEN_LOOKS", 0.01)
    open_health = {"token_file": tmp_path / "tokens", "health_open": True}
    async with daemon(tmp_path, auth=open_health) as (channel, server):
        looks = asyncio.Semaphore(0)
        authorise = server._parts.authenticator.authorise
        monkeypatch.setattr(
            server._parts.authenticator,
            "authorise",
            lambda caller, method: (looks.release(), authorise(caller, method)),
        )
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        for _ in range(4):
            await looks.acquire()
        assert not watch.done()
        watch.cancel()


# Roles.


@asynchronous
async def test_a_role_gets_its_methods_and_is_told_the_same_of_all_others(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    roles = {"nothing": Role(methods=()), "one": Role(methods=("hearth.v1.ModelService/CountTokens",))}
    names = ("admin", "user", "monitor", "nothing", "one", "gone")
    given = {name: bearer(create_token(tokens, name, role=name)) for name in names}
    async with daemon(tmp_path, roles=roles) as (channel, _):
        served = await every_method(channel, given["admin"])
        refused: dict[str, set[str]] = {}
        texts = set()
        for name, metadata in given.items():
            outcomes = {method: await outcome(channel, method, metadata) for method in [*served, *UNKNOWN]}
            refused[name] = {
                method for method, each in outcomes.items() if each[0] is grpc.StatusCode.PERMISSION_DENIED
            }
            texts |= {(name, each[1:]) for each in outcomes.values() if each[0] is grpc.StatusCode.PERMISSION_DENIED}
            assert not [method for method, each in outcomes.items() if each[0] is grpc.StatusCode.UNAUTHENTICATED]
        methods, unknown = set(served) - OPEN_METHODS, {*UNKNOWN, *OPEN_METHODS}
        assert refused["admin"] == set()
        assert refused["user"] == unknown
        assert refused["monitor"] == unknown | {
            method for method in methods if not method.startswith(("hearth.v1.StatusService", "grpc.health"))
        }
        assert refused["one"] == unknown | methods - {"hearth.v1.ModelService/CountTokens"}
        assert refused["nothing"] == refused["gone"] == unknown | methods
        assert len(texts) == 5, "the text depends on the method"
        assert all(f"role {name} may not call this method" in rest[0] for name, rest in texts)


@asynchronous
async def test_what_nobody_serves_is_unimplemented_for_whoever_may_call_anything(tmp_path: Path) -> None:
    admin = bearer(create_token(tmp_path / "tokens", "root", role="admin"))
    async with daemon(tmp_path) as (channel, _):
        for method in [*UNKNOWN, *OPEN_METHODS]:
            code, text, *_ = await outcome(channel, method, admin)
            assert (code, text) == (grpc.StatusCode.UNIMPLEMENTED, "there is no method of that name")


@asynchronous
async def test_a_role_may_use_its_models_and_sees_no_others(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    roles = {"this": Role(models=(NAME,)), "other": Role(models=("qwen3",))}
    this, other = (bearer(create_token(tokens, name, role=name)) for name in roles)
    async with daemon(tmp_path, roles=roles) as (channel, _):
        stub = model_pb2_grpc.ModelServiceStub(channel)

        async def listed(metadata: Metadata) -> list[str]:
            response = await stub.ListModels(model_pb2.ListModelsRequest(), metadata=metadata)
            return [model.name for model in response.models]

        assert (await listed(this), await listed(other)) == ([NAME], [])
        await answer(channel, chat_request(model=NAME), metadata=this)
        await answer(channel, chat_request(), metadata=this)
        for name in ("", NAME, "nope"):
            for call in (
                answer(channel, chat_request(model=name), metadata=other),
                stub.GetModel(model_pb2.GetModelRequest(name=name), metadata=other),
                stub.CountTokens(model_pb2.CountTokensRequest(model=name, text="a"), metadata=other),
            ):
                error = await refusal(call)
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                assert error.details() == "role other may not use that model; it may use qwen3"


@asynchronous
async def test_callers_without_a_credential_have_the_role_of_the_configuration(tmp_path: Path) -> None:
    async with serving(make_config(tmp_path, auth={"open_role": "monitor"})) as server:
        for target in (unix_target(server._config), tcp_target(server)):
            async with grpc.aio.insecure_channel(target) as channel:
                await get_status(channel)
                error = await refusal(answer(channel, chat_request()))
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED


@asynchronous
async def test_another_configuration_holds_from_the_next_call_on(tmp_path: Path) -> None:
    """What a reload does; one that cannot be used changes nothing."""
    tokens = tmp_path / "tokens"
    kitchen = bearer(create_token(tokens, "kitchen"))
    async with daemon(tmp_path) as (channel, server):
        auth, roles = server._config.auth, dict(BUILT_IN)
        await get_status(channel, kitchen)
        server._parts.authenticator.update(auth, roles | {"user": Role(methods=("chat",))})
        assert (await refusal(get_status(channel, kitchen))).code() is grpc.StatusCode.PERMISSION_DENIED
        await answer(channel, chat_request(), metadata=kitchen)
        broken = make_config(tmp_path, auth={"token_file": tmp_path / "none"}).auth
        with pytest.raises(ConfigError):
            server._parts.authenticator.update(broken, roles)
        await answer(channel, chat_request(), metadata=kitchen)
        assert (await refusal(get_status(channel, kitchen))).code() is grpc.StatusCode.PERMISSION_DENIED


# Limits of a role, as a caller sees them.


def quota_refusal(error: grpc.aio.AioRpcError) -> tuple[str, str, float]:
    """Return text, violation and seconds of a refusal, which must be whole, and the same in both languages."""
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    retry, failure = error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    assert status.details[0].Unpack(retry)
    assert status.details[1].Unpack(failure)
    assert len(status.details) == 2
    (violation,) = failure.violations
    assert violation.subject == "caller:phone"
    assert retry.retry_delay.ToMilliseconds() == int(trailers["grpc-retry-pushback-ms"]) > 0
    return error.details() or "", violation.description, retry.retry_delay.ToMilliseconds() / 1000


@asynchronous
async def test_a_role_says_how_urgent_its_requests_are_and_may_be(tmp_path: Path) -> None:
    roles = {"script": Role(max_priority="normal", default_priority="background"), "guest": Role(max_priority="normal")}
    phone = bearer(create_token(tmp_path / "tokens", "phone", role="user"))
    script = bearer(create_token(tmp_path / "tokens", "script", role="script"))
    async with daemon(tmp_path, roles=roles) as (channel, _):
        request = chat_request()
        for priority, may in (("INTERACTIVE", False), ("NORMAL", True), ("BACKGROUND", True), ("UNSPECIFIED", True)):
            request.priority = chat_pb2.Priority.Value(f"PRIORITY_{priority}")
            await answer(channel, request, metadata=phone)
            if may:
                await answer(channel, request, metadata=script)
            else:
                error = await refusal(answer(channel, request, metadata=script))
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                assert error.details() == (
                    "role script may not ask for priority interactive; the most urgent one that it may ask for is "
                    "normal"
                )
    assert roles["script"].priority(None) is Priority.BACKGROUND
    assert roles["guest"].priority(None) is Priority.NORMAL
    # The default is never more urgent than what may be asked for.
    assert Role(max_priority="background").priority(None) is Priority.BACKGROUND


@asynchronous
async def test_calls_over_the_rate_are_refused_and_unknown_ones_count_too(tmp_path: Path) -> None:
    roles = {"guest": Role(methods=("all",), requests_per_minute=3)}
    phone = bearer(create_token(tmp_path / "tokens", "phone", role="guest"))
    tablet = bearer(create_token(tmp_path / "tokens", "tablet", role="guest"))
    async with daemon(tmp_path, roles=roles) as (channel, _):
        await get_status(channel, phone)
        await answer(channel, chat_request(), metadata=phone)
        await outcome(channel, "nope/Nope", phone)
        for call in (get_status(channel, phone), answer(channel, chat_request(), metadata=phone)):
            text, limit, seconds = quota_refusal(await refusal(call))
            assert limit == "requests_per_minute = 3 of role guest"
            assert text.startswith("phone has made its 3 calls of a minute")
            assert 15 < seconds <= 20
        await get_status(channel, tablet)


@asynchronous
async def test_a_token_made_anew_under_its_name_does_not_get_more(tmp_path: Path) -> None:
    roles = {"guest": Role(requests_per_minute=1)}
    phone = bearer(create_token(tmp_path / "tokens", "phone", role="guest"))
    async with daemon(tmp_path, roles=roles) as (channel, _):
        await get_status(channel, phone)
        revoke_token(tmp_path / "tokens", "phone")
        phone = bearer(create_token(tmp_path / "tokens", "phone", role="guest"))
        quota_refusal(await refusal(get_status(channel, phone)))


@asynchronous
async def test_tokens_of_minute_and_day_are_those_of_usage(tmp_path: Path) -> None:
    roles = {"guest": Role(tokens_per_minute=10_000, tokens_per_day=60)}
    phone = bearer(create_token(tmp_path / "tokens", "phone", role="guest"))
    usage_file = tmp_path / "usage.json"
    auth = {"token_file": tmp_path / "tokens", "usage_file": usage_file}
    spent = 0
    async with daemon(tmp_path, roles=roles, auth=auth) as (channel, server):
        while spent < 60:
            assert server._parts.daily_usage.used("token:phone") == spent
            _, final = await answer(channel, chat_request(), metadata=phone)
            spent += final.usage.prompt_tokens + final.usage.completion_tokens
        text, limit, seconds = quota_refusal(await refusal(answer(channel, chat_request(), metadata=phone)))
        assert text.startswith("phone has used its 60 tokens of today (tokens_per_day of role guest); try again in ")
        assert limit == "tokens_per_day = 60 of role guest"
        assert 0 < seconds <= 25 * 3600
        # Counting is not chatting.
        await get_status(channel, phone)
        assert (await get_status(channel, phone)).chats_refused_count == 0
    assert '"token:phone"' in usage_file.read_text()
    async with daemon(tmp_path, roles=roles, auth=auth) as (channel, server):
        assert server._parts.daily_usage.used("token:phone") == spent
        quota_refusal(await refusal(answer(channel, chat_request(), metadata=phone)))


@asynchronous
async def test_a_chat_that_waits_costs_nothing_and_one_that_is_left_what_it_took(tmp_path: Path) -> None:
    roles = {"guest": Role(tokens_per_day=10_000, max_concurrent_chats=2)}
    phone = bearer(create_token(tmp_path / "tokens", "phone", role="guest"))
    runner = make_runner(is_gated=True, num_slots=1)
    runner.allow(PROOF_FORWARDS)
    async with daemon(tmp_path, lambda _: make_model(runner), roles=roles, engine={"slots": 1}) as (channel, server):
        running = start_chat(channel, chat_request(max_tokens=100), metadata=phone)
        await asyncio.to_thread(runner.wait_for_forwards, PROOF_FORWARDS + 1)
        waiting = start_chat(channel, chat_request(max_tokens=100), metadata=phone)
        while not (await get_status(channel, phone)).queued_count:
            pass
        assert (await let_pass_until(runner, waiting.read())).HasField("queued")
        text, limit, seconds = quota_refusal(await refusal(answer(channel, chat_request(), metadata=phone)))
        assert text.startswith("phone has 2 chats at once, the most that it may")
        assert (limit, seconds) == ("max_concurrent_chats = 2 of role guest", 1)

        waiting.cancel()
        assert (await let_pass_until(runner, running.read())).HasField("delta")
        running.cancel()
        while (status := await get_status(channel, phone)).chats_cancelled_count < 2:
            pass
        used = server._parts.daily_usage.used("token:phone")
        assert used == status.prompt_tokens_count + status.completion_tokens_count > 0
        runner.open_gate()
        await answer(channel, chat_request(), metadata=phone)


@asynchronous
async def test_whoever_only_asks_for_open_health_uses_up_nothing_of_those_inside(tmp_path: Path) -> None:
    roles = {"user": Role(requests_per_minute=2)}
    auth = {"token_file": tmp_path / "tokens", "health_open": True}
    async with daemon(tmp_path, roles=roles, auth=auth) as (channel, server):
        for _ in range(5):
            code, *_ = await outcome(channel, "grpc.health.v1.Health/Check", None)
            assert code is grpc.StatusCode.OK
        async with grpc.aio.insecure_channel(unix_target(server._config)) as unix:
            await get_status(unix)


# Caches.


@asynchronous
async def test_two_users_of_loopback_do_not_see_what_the_other_has_cached(tmp_path: Path) -> None:
    """Without tokens a connection is all that tells them apart; on a Unix socket gRPC does not tell even that."""
    own_pool = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        serving(make_config(tmp_path), lambda _: make_model(make_runner(num_slots=4))) as server,
        grpc.aio.insecure_channel(tcp_target(server), options=own_pool) as one,
        grpc.aio.insecure_channel(tcp_target(server), options=own_pool) as other,
    ):
        cached = []
        for channel in (one, other, one, other):
            _, final = await answer(channel, chat_request("the same words"))
            cached.append(final.usage.cached_prompt_tokens > 0)
    assert cached == [False, False, True, True]
