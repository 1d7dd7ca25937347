"""Several models over gRPC: named by requests, listed, watched, and changed by a reload; whoever may not use one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hearth.v1 import model_pb2, model_pb2_grpc, status_pb2, status_pb2_grpc
from hearthd.bundles.manifest import is_model_name
from hearthd.configuration.config import Config, ModelOptions
from hearthd.configuration.roles import Role
from hearthd.errors import BundleError
from hearthd.models.entry import Failure, ModelState
from hearthd.server import Server
from serving import NAME, answer, asynchronous, chat_request, make_config, serving, start_chat, unix_target
from several_models import MODEL_BYTES, Shelf, chat, entry, several_config, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
LOADED, LOADABLE, FAILED = model_pb2.MODEL_STATE_LOADED, model_pb2.MODEL_STATE_LOADABLE, model_pb2.MODEL_STATE_FAILED


@asynccontextmanager
async def daemon(
    config: Config, shelf: Shelf | None = None, **options: Any
) -> AsyncIterator[tuple[grpc.aio.Channel, Shelf, Server]]:
    shelf = shelf or Shelf()
    async with (
        serving(config, shelf.load, survey=shelf.survey, **options) as server,
        grpc.aio.insecure_channel(unix_target(config)) as channel,
    ):
        await shelf.wait_for_load()
        yield channel, shelf, server


async def models(channel: grpc.aio.Channel) -> dict[str, model_pb2.Model]:
    listed = await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
    return {model.name: model for model in listed.models}


async def check(channel: grpc.aio.Channel, name: str) -> Any:
    request = health_pb2.HealthCheckRequest(service=f"hearth.v1.ChatService/{name}")
    return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@asynchronous
async def test_a_request_names_its_model_and_the_answer_says_whose_it_is(tmp_path: Path) -> None:
    async with daemon(several_config(tmp_path, "other")) as (channel, shelf, _):
        default, final = await answer(channel, chat_request())
        assert final.model == NAME
        other, final = await answer(channel, chat_request(model="other"))
        assert final.model == "other"
        assert other != default
        assert await answer(channel, chat_request(model=NAME)) != (other, final)
        assert shelf.loads == [NAME, "other"]


@asynchronous
async def test_who_waits_for_a_model_to_be_loaded_hears_so(tmp_path: Path) -> None:
    async with daemon(several_config(tmp_path, "other", idle_seconds=0.01)) as (channel, shelf, server):
        is_open = shelf.close("other")
        calls = [aiter(start_chat(channel, chat_request(model="other"))) for _ in range(2)]
        told = [(await anext(call)).queued for call in calls]
        assert sorted(queued.position for queued in told) == [0, 1]
        assert not told[0].HasField("expected_wait_ms")
        is_open.set()
        for call in calls:
            assert [response async for response in call][-1].HasField("final")
        # The next time it is known how long that takes.
        await until(server._parts.models, lambda: entry(server._parts.models, "other").worker is None)
        call = aiter(start_chat(channel, chat_request(model="other")))
        assert (await anext(call)).queued.expected_wait_ms > 0
        assert [response async for response in call][-1].HasField("final")


@asynchronous
async def test_a_deadline_before_the_model_would_be_loaded_is_refused_at_once(tmp_path: Path) -> None:
    async with daemon(several_config(tmp_path, "other")) as (channel, shelf, server):
        entry(server._parts.models, "other").load_seconds = 3600.0
        is_open = shelf.close("other")
        count = model_pb2.CountTokensRequest(model="other", text="hello")
        for call in (
            answer(channel, chat_request(model="other"), timeout=60.0),
            model_pb2_grpc.ModelServiceStub(channel).CountTokens(count, timeout=60.0),
        ):
            error = await refusal(call)
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "other has to be loaded first, which takes about 3" in error.details()
        # It is loaded for those who come again.
        await shelf.wait_for_load()
        is_open.set()
        assert await answer(channel, chat_request(model="other"))
        assert shelf.loads == [NAME, "other"]


@asynchronous
async def test_models_are_listed_and_described_without_being_loaded(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.failing["broken's bundle"] = BundleError("gone")
    async with daemon(several_config(tmp_path, "other", "broken", slots=3), shelf) as (channel, shelf, _):
        listed = await models(channel)
        assert {name: model.state for name, model in listed.items()} == {
            NAME: LOADED,
            "other": LOADABLE,
            "broken": FAILED,
        }
        assert next(iter(listed)) == NAME
        other = listed["other"]
        assert (other.architecture, other.memory_bytes, other.limits.max_running) == (
            "otherForCausalLM",
            MODEL_BYTES,
            3,
        )
        assert (listed["broken"].architecture, listed["broken"].context_length) == ("", 0)
        got = await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(name="other"))
        assert got.model == other
        assert shelf.loads == [NAME]
        await answer(channel, chat_request(model="other"))
        assert (await models(channel))["other"].state == LOADED


@asynchronous
async def test_counting_tokens_loads_the_model(tmp_path: Path) -> None:
    async with daemon(several_config(tmp_path, "other")) as (channel, shelf, _):
        request = model_pb2.CountTokensRequest(model="other", text="hello")
        counted = await model_pb2_grpc.ModelServiceStub(channel).CountTokens(request)
        assert counted.token_count > 0
        assert shelf.loads == [NAME, "other"]


@asynchronous
async def test_a_model_that_a_role_may_not_use_is_not_there_for_it_and_is_not_loaded(tmp_path: Path) -> None:
    config = several_config(tmp_path, "other")
    roles = {**config.roles, "user": Role(models=(NAME,))}
    async with daemon(replace(config, roles=roles)) as (channel, shelf, _):
        assert list(await models(channel)) == [NAME]
        for name in ("other", "nowhere"):
            error = await refusal(answer(channel, chat_request(model=name)))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert (await refusal(check(channel, name))).code() is grpc.StatusCode.NOT_FOUND
        assert await check(channel, NAME) == SERVING
        assert shelf.loads == [NAME]


@asynchronous
async def test_the_health_of_a_model_says_whether_it_can_be_chatted_with(tmp_path: Path) -> None:
    async with daemon(several_config(tmp_path, "other", "third")) as (channel, shelf, server):
        assert [await check(channel, name) for name in (NAME, "other", "third")] == [SERVING] * 3
        request = health_pb2.HealthCheckRequest(service="hearth.v1.ChatService/other")
        watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(request))
        assert (await anext(watch)).status == SERVING
        shelf.failing["other"] = BundleError("damaged")
        error = await refusal(answer(channel, chat_request(model="other")))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert (await anext(watch)).status == NOT_SERVING
        # The daemon serves all the same, and so do its other models.
        assert (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status == SERVING
        assert await check(channel, "third") == SERVING
        told = await status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest())
        assert "cannot be loaded: other; the journal says why" in told.warnings
        shelf.failing.clear()
        other = entry(server._parts.models, "other")
        assert other.failure is not None
        other.failure = Failure(other.failure.text, 0.0)
        await answer(channel, chat_request(model="other"))
        assert (await anext(watch)).status == SERVING


@asynchronous
async def test_the_status_counts_the_chats_of_all_models(tmp_path: Path) -> None:
    async with daemon(several_config(tmp_path, "other", slots=3)) as (channel, _, _):
        for name in ("", "other", "other"):
            await answer(channel, chat_request(model=name))
        told = await status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest())
        assert (told.chats_finished_count, told.max_running, told.running_count) == (3, 5, 0)
        assert told.model == NAME


# The configuration read again.


@asynchronous
async def test_a_reload_adds_removes_and_changes_models(tmp_path: Path) -> None:
    old = several_config(tmp_path, "going", "changing", slots=2)
    new = replace(
        old,
        model_options={
            "changing": ModelOptions(slots=3),
            "coming": ModelOptions(keep=True),
            NAME: ModelOptions(slots=1),
        },
    )
    async with daemon(old, load_again=lambda: new) as (channel, shelf, server):
        pool = server._parts.models
        for name in ("going", "changing"):
            await answer(channel, chat_request(model=name))
        watch = aiter(
            health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="hearth.v1.ChatService/going")
            )
        )
        assert (await anext(watch)).status == SERVING
        going = entry(pool, "going")
        async with pool.using(going):
            outcome = await server._parts.reload.run()
            assert outcome.changed == ("models.going", "models.changing", "models.coming")
            # The default model was loaded at the start.
            assert outcome.need_restart == (f"models.{NAME}",)
            assert (await anext(watch)).status == UNKNOWN
            assert (await refusal(answer(channel, chat_request(model="going")))).code() is grpc.StatusCode.NOT_FOUND
            # Who has it keeps it.
            assert going.worker is not None
        await until(pool, lambda: going.worker is None)
        await until(pool, lambda: entry(pool, "coming").state is ModelState.LOADED)
        await until(pool, lambda: entry(pool, "changing").worker is None)
        listed = await models(channel)
        assert {name: model.state for name, model in listed.items()} == {
            NAME: LOADED,
            "changing": LOADABLE,
            "coming": LOADED,
        }
        assert listed["changing"].limits.max_running == 3
        await answer(channel, chat_request(model="changing"))
        # What came without being asked for is there when it is.
        await answer(channel, chat_request(model="coming"))
        assert sorted(shelf.loads) == sorted([NAME, "going", "changing", "coming", "changing"])


@asynchronous
async def test_a_reload_that_only_lets_a_model_stay_does_not_unload_it(tmp_path: Path) -> None:
    old = several_config(tmp_path, "other", idle_seconds=600.0)
    new = several_config(tmp_path, "other", idle_seconds=0.01)
    async with daemon(old, load_again=lambda: new) as (channel, _, server):
        await answer(channel, chat_request(model="other"))
        worker = entry(server._parts.models, "other").worker
        assert (await server._parts.reload.run()).changed == ("models.other",)
        assert entry(server._parts.models, "other").worker is worker
        # From now on it does not stay for long.
        await until(server._parts.models, lambda: entry(server._parts.models, "other").worker is None)


@asynchronous
async def test_a_reload_that_lowers_the_budget_lets_models_go_that_have_no_room(tmp_path: Path) -> None:
    old = several_config(tmp_path, "idle", "used", "last")
    new = several_config(tmp_path, "idle", "used", "last", max_bytes=2 * MODEL_BYTES)
    async with daemon(old, load_again=lambda: new) as (channel, shelf, server):
        pool = server._parts.models
        for name in ("used", "idle", "last"):
            await answer(channel, chat_request(model=name))
        idle, used, last = (entry(pool, name) for name in ("idle", "used", "last"))
        async with pool.using(used) as worker:
            async with pool.using(last):
                assert (await server._parts.reload.run()).changed == ("models.max_bytes",)
                await until(pool, lambda: idle.worker is None)
                # Of those in use the one that was asked for first; it serves who has it.
                assert used.is_leaving
                assert not last.is_leaving
            assert await chat(worker)
        await until(pool, lambda: used.worker is None)
        assert [each.state for each in pool.entries] == [
            ModelState.LOADED,
            ModelState.LOADABLE,
            ModelState.LOADABLE,
            ModelState.LOADED,
        ]
        await answer(channel, chat_request(model="last"))
        assert shelf.loads == [NAME, "used", "idle", "last"]


@asynchronous
async def test_a_reload_names_a_model_that_is_not_installed_and_the_rest_goes_on(tmp_path: Path) -> None:
    old = several_config(tmp_path)
    shelf = Shelf()
    shelf.failing["other's bundle"] = BundleError("gone")
    async with daemon(old, shelf, load_again=lambda: several_config(tmp_path, "other")) as (channel, _, server):
        assert (await server._parts.reload.run()).error is None
        await until(server._parts.models, lambda: entry(server._parts.models, "other").failure)
        assert await check(channel, "other") == NOT_SERVING
        assert (await answer(channel, chat_request()))[0]


# Names.


@pytest.mark.parametrize("name", ["../../etc", "other/", "OTHER", "other\n", " other", "o" * 5000, "other\u202e", "."])
@asynchronous
async def test_a_name_that_is_nearly_right_is_none(tmp_path: Path, name: str) -> None:
    async with daemon(several_config(tmp_path, "other")) as (channel, shelf, _):
        error = await refusal(answer(channel, chat_request(model=name)))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.NOT_FOUND,
            f"there is no model of that name; this daemon serves {NAME}, other",
        )
        assert (await refusal(check(channel, name))).code() is grpc.StatusCode.NOT_FOUND
        assert shelf.loads == [NAME]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=1, max_size=20))
def test_any_name_is_a_model_or_not_found(tmp_path: Path, names: list[str]) -> None:
    @asynchronous
    async def run() -> None:
        async with daemon(several_config(tmp_path, "other")) as (channel, shelf, _):
            stub = model_pb2_grpc.ModelServiceStub(channel)
            for name in names:
                if name in ("", NAME, "other"):
                    continue
                for call in (
                    start_chat(channel, chat_request(model=name)).read(),
                    stub.GetModel(model_pb2.GetModelRequest(name=name)),
                    stub.CountTokens(model_pb2.CountTokensRequest(model=name, text="a")),
                ):
                    error = await refusal(call)
                    assert error.code() is grpc.StatusCode.NOT_FOUND
                    assert len(name) < 4 or is_model_name(name) or name not in (error.details() or "")
            assert shelf.loads == [NAME]

    run()


@asynchronous
async def test_without_models_in_the_configuration_all_is_as_before(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with daemon(config) as (channel, shelf, _):
        assert {name: model.state for name, model in (await models(channel)).items()} == {NAME: LOADED}
        assert (await answer(channel, chat_request()))[1].model == NAME
        assert shelf.loads == [NAME]
