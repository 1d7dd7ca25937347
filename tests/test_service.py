"""hearth.v1 on a real socket: what is answered, what is refused before any compute, and with which details."""

import asyncio
import itertools
import math
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeRunner, scripted
from hearth.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc, status_pb2_grpc
from hearth.v1 import status_pb2 as hearth_status_pb2
from hearthd.access.tokens import create_token
from hearthd.configuration.config import Config
from hearthd.errors import InvalidRequestError
from hearthd.inference.model import Model
from hearthd.sequences.sampling import validate
from hearthd.server import Server
from hearthd.services.chat import ChatService
from hearthd.services.convert import read_chat
from hearthd.services.model import ModelService
from hearthd.services.status import StatusService
from serving import (
    NAME,
    PROOF_FORWARDS,
    answer,
    asynchronous,
    chat_request,
    make_config,
    make_model,
    make_runner,
    make_tokenizer,
    serving,
    start_chat,
    tcp_target,
    unix_target,
)

CANARY = "canary-7f3a"
Role = chat_pb2.Role


@asynccontextmanager
async def daemon(
    directory: Path, runner: FakeRunner | None = None, load: Callable[[Config], Model] | None = None, **sections: Any
) -> AsyncIterator[tuple[grpc.aio.Channel, Server]]:
    config = make_config(directory, **sections)
    runner = runner or make_runner()
    runner.allow(PROOF_FORWARDS)
    async with (
        serving(config, load or (lambda _: make_model(runner))) as server,
        grpc.aio.insecure_channel(unix_target(config)) as channel,
    ):
        try:
            yield channel, server
        finally:
            runner.open_gate()


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def detail(error: grpc.aio.AioRpcError, message: Any) -> Any:
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    (packed,) = status.details
    assert packed.Unpack(message)
    return message


def violations(error: grpc.aio.AioRpcError) -> list[str]:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    return [violation.field for violation in detail(error, error_details_pb2.BadRequest()).field_violations]


def conversation(*turns: tuple[int, str]) -> chat_pb2.ChatRequest:
    return chat_pb2.ChatRequest(messages=[chat_pb2.Message(role=role, content=text) for role, text in turns])


async def until_there(channel: grpc.aio.Channel, num_chats: int) -> None:
    """Return when so many chats are admitted: while the gate is shut, none of them ends before the last has come."""
    service = status_pb2_grpc.StatusServiceStub(channel)
    while True:
        status = await service.GetStatus(hearth_status_pb2.GetStatusRequest())
        if status.running_count + status.queued_count == num_chats:
            return


async def let_pass_until(runner: FakeRunner, awaited: Any) -> Any:
    """Let a gated runner do one forward after the other until something has happened."""
    task = asyncio.ensure_future(awaited)
    while not task.done():
        runner.allow()
        await asyncio.to_thread(runner.wait_for_forwards, runner.num_forwards + 1)
    return await task


@asynchronous
async def test_a_chat_streams_text_and_ends_with_its_figures(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (channel, _):
        text, final = await answer(channel, chat_request(max_tokens=20, request_id="kitchen:1"))
        again, second = await answer(channel, chat_request(max_tokens=20))
    assert text == again != ""
    assert (final.request_id, final.model) == ("kitchen:1", NAME)
    assert re.fullmatch("[0-9a-f]{16}", second.request_id)
    assert final.finish_reason == chat_pb2.FINISH_REASON_LENGTH
    assert final.usage.completion_tokens == 20
    assert final.usage.prompt_tokens > second.usage.cached_prompt_tokens > 0
    timings = final.timings
    assert 0 < timings.time_to_first_token_ms <= timings.queue_ms + timings.prefill_ms + 1
    assert timings.decode_tokens_per_second == pytest.approx(19 / timings.decode_ms * 1000, rel=1e-4)


@asynchronous
async def test_max_tokens_default_is_the_configured_one_and_the_context_ends_it(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (channel, _):
        _, final = await answer(channel, chat_request())
        assert final.usage.completion_tokens == 8
    (tmp_path / "b").mkdir()
    async with daemon(tmp_path / "b", make_runner(context_length=24)) as (channel, _):
        _, final = await answer(channel, chat_request())
        assert final.usage.prompt_tokens + final.usage.completion_tokens == 24


@asynchronous
async def test_log_probabilities_come_when_asked_for(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (channel, _):
        deltas = [
            response.delta
            async for response in start_chat(channel, chat_request(top_logprobs=3, max_tokens=5))
            if response.HasField("delta")
        ]
        tokens = [token for delta in deltas for token in delta.token_logprobs]
        plain = [
            response.delta
            async for response in start_chat(channel, chat_request(max_tokens=5))
            if response.HasField("delta")
        ]
    assert len(tokens) == 5
    for token in tokens:
        assert token.top[0].token_id == token.chosen.token_id  # greedy
        assert len(token.top) == 3
        assert token.chosen.logprob <= 0
    assert not any(delta.token_logprobs for delta in plain)
    assert "".join(delta.text for delta in plain) == "".join(delta.text for delta in deltas)


@asynchronous
async def test_waiting_chats_hear_their_places_first(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True, num_slots=1)
    async with daemon(tmp_path, runner, engine={"slots": 1}) as (channel, _):
        first = start_chat(channel, chat_request(max_tokens=200))
        await asyncio.to_thread(runner.wait_for_forwards, PROOF_FORWARDS + 1)
        second = aiter(start_chat(channel, chat_request()))
        await until_there(channel, 2)
        assert (await let_pass_until(runner, anext(second))).queued.position == 0
        runner.open_gate()
        for responses in (first, second):
            *_, last = [response async for response in responses]
            assert last.HasField("final")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2**31 - 1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -math.inf}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3e38}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["x" * 65]}, "stop[0]"),
    ],
)
@asynchronous
async def test_an_option_out_of_range_is_refused_by_name(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    runner = make_runner()
    async with daemon(tmp_path, runner) as (channel, _):
        error = await refusal(answer(channel, chat_request(**options)))
    assert violations(error) == [f"sampling.{field}"]
    assert runner.num_forwards == PROOF_FORWARDS


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (chat_pb2.ChatRequest(), ["messages"]),
        (conversation((Role.ROLE_UNSPECIFIED, "a")), ["messages[0].role"]),
        (conversation((99, "a")), ["messages[0].role"]),
        (conversation((Role.ROLE_USER, "")), ["messages[0].content"]),
        (conversation((Role.ROLE_USER, "a"), (Role.ROLE_ASSISTANT, "b")), ["messages[1].role"]),
        (conversation((Role.ROLE_USER, "a"), (Role.ROLE_SYSTEM, "b"), (Role.ROLE_USER, "c")), ["messages[1].role"]),
        (conversation(*[(Role.ROLE_USER, "a")] * 257), ["messages"]),
        (
            conversation((99, ""), (Role.ROLE_USER, ""), (Role.ROLE_ASSISTANT, "")),
            ["messages[0].role", "messages[0].content", "messages[1].content", "messages[2].role"],
        ),
        (
            chat_request(stop=["", "a", "x" * 65, "b", "c"]),
            ["sampling.stop", "sampling.stop[0]", "sampling.stop[2]"],
        ),
        (conversation(*[(-(2**31), "a")] * 256), [f"messages[{place}].role" for place in range(16)]),
        (chat_request(request_id="a b"), ["request_id"]),
        (chat_request(request_id="é"), ["request_id"]),
        (chat_request(request_id="x" * 65), ["request_id"]),
        (
            chat_pb2.ChatRequest(
                request_id="?", sampling=chat_pb2.SamplingOptions(top_p=7, temperature=-1, stop=[""], max_tokens=0)
            ),
            [
                "messages",
                "sampling.temperature",
                "sampling.top_p",
                "sampling.max_tokens",
                "sampling.stop[0]",
                "request_id",
            ],
        ),
    ],
    ids=range(14),
)
@asynchronous
async def test_a_malformed_request_is_refused_with_all_that_is_wrong(
    tmp_path: Path, request_: chat_pb2.ChatRequest, fields: list[str]
) -> None:
    runner = make_runner()
    async with daemon(tmp_path, runner) as (channel, _):
        assert violations(await refusal(answer(channel, request_))) == fields
    assert runner.num_forwards == PROOF_FORWARDS


@pytest.mark.parametrize(
    ("request_id", "fault"),
    [
        ("a b", "has ' ' at character 2"),
        ("a\nb", r"has '\n' at character 2"),
        ("\u202ex", r"has '\u202e' at character 1"),
        ("x" * 65, "has 65 characters"),
        ("x" * 65 + "é", r"has 66 characters and has '\xe9' at character 66"),
    ],
)
def test_a_bad_request_id_is_told_by_its_fault(request_id: str, fault: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_chat(chat_request(request_id=request_id), make_model(make_runner()), 256)
    assert str(caught.value) == f"request_id: {fault}; give at most 64 characters of A-Z a-z 0-9 . _ : -"


@asynchronous
async def test_an_empty_answer_may_come_back_as_history(tmp_path: Path) -> None:
    request = conversation((Role.ROLE_USER, "a"), (Role.ROLE_ASSISTANT, ""), (Role.ROLE_USER, "b"))
    async with daemon(tmp_path) as (channel, _):
        text, _ = await answer(channel, request)
        assert text


@asynchronous
async def test_prompt_and_answer_beyond_the_context_are_refused_with_the_counts(tmp_path: Path) -> None:
    runner = make_runner(context_length=64)
    async with daemon(tmp_path, runner) as (channel, _):
        counted = await model_pb2_grpc.ModelServiceStub(channel).CountTokens(
            model_pb2.CountTokensRequest(conversation=model_pb2.Conversation(messages=chat_request().messages))
        )
        room = 64 - counted.token_count
        _, final = await answer(channel, chat_request(max_tokens=room))
        assert final.usage.prompt_tokens == counted.token_count
        before = runner.num_forwards

        error = await refusal(answer(channel, chat_request(max_tokens=room + 1)))
        assert violations(error) == ["sampling.max_tokens"]
        assert (
            f"prompt_tokens {counted.token_count} + max_tokens {room + 1} exceed the context_length 64"
            in error.details()
        )

        error = await refusal(answer(channel, chat_request("word " * 200)))
        assert violations(error) == ["messages"]
        assert re.search(r"prompt_tokens \d+ leave no room in the context_length 64", error.details())
        assert runner.num_forwards == before


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(width=32),
        "top_k": st.integers(-(2**31), 2**31 - 1),
        "top_p": st.floats(width=32),
        "min_p": st.floats(width=32),
        "repetition_penalty": st.floats(width=32),
        "presence_penalty": st.floats(width=32),
        "frequency_penalty": st.floats(width=32),
        "seed": st.integers(0, 2**64 - 1),
        "max_tokens": st.integers(-(2**31), 2**31 - 1),
        "top_logprobs": st.integers(-(2**31), 2**31 - 1),
        "stop": st.lists(st.text(st.characters(codec="utf-8"), max_size=70), max_size=6),
        "request_id": st.text(st.characters(codec="utf-8"), max_size=70),
    },
)


@settings(deadline=None, max_examples=300)
@given(OPTIONS, st.text(st.characters(codec="utf-8"), max_size=20))
def test_any_request_is_sound_or_refused_by_field(options: dict[str, Any], content: str) -> None:
    model = make_model(make_runner())
    request = chat_pb2.ChatRequest.FromString(chat_request(content, **options).SerializeToString())
    try:
        call = read_chat(request, model, 256)
    except InvalidRequestError as error:
        for each in (error, *error.others):
            assert re.fullmatch(r"(sampling\.[a-z_]+|messages|request_id)(\[\d+\])?(\.[a-z]+)?", each.field)
    else:
        validate(call.params, model.runner.vocab_size)
        assert all(math.isfinite(value) for value in (call.params.temperature, call.params.top_p, call.params.min_p))


@asynchronous
async def test_a_model_that_is_not_there_is_not_found_and_not_repeated(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (channel, _):
        stub = model_pb2_grpc.ModelServiceStub(channel)
        for call in (
            answer(channel, chat_request(model=CANARY)),
            stub.GetModel(model_pb2.GetModelRequest(name=CANARY)),
            stub.CountTokens(model_pb2.CountTokensRequest(model=CANARY, text="a")),
        ):
            error = await refusal(call)
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert error.details() == f"there is no model of that name; this daemon serves {NAME}"
        await answer(channel, chat_request(model=NAME))


@asynchronous
async def test_a_full_queue_is_told_at_once_in_both_languages(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    async with daemon(tmp_path, runner) as (channel, _):
        streams = [aiter(start_chat(channel, chat_request(max_tokens=200))) for _ in range(4)]
        await until_there(channel, 4)
        # Two run, which gives each a first delta, and two hear that they wait.
        first = await let_pass_until(runner, asyncio.gather(*map(anext, streams)))
        assert sorted(response.WhichOneof("event") for response in first) == ["delta", "delta", "queued", "queued"]
        started = asyncio.get_running_loop().time()
        error = await refusal(answer(channel, chat_request()))
        assert asyncio.get_running_loop().time() - started < 0.5
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "the queue is full: 2 chats run and 2 wait; try again later"
        delay = detail(error, error_details_pb2.RetryInfo()).retry_delay
        pushback = dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
        assert delay.ToMilliseconds() == int(pushback) == 1000
        status = await status_pb2_grpc.StatusServiceStub(channel).GetStatus(hearth_status_pb2.GetStatusRequest())
        assert (status.running_count, status.queued_count, status.chats_refused_count) == (2, 2, 1)
        runner.open_gate()
        for stream in streams:
            *_, last = [response async for response in stream]
            assert last.HasField("final")
        await answer(channel, chat_request())


@asynchronous
async def test_an_urgent_chat_is_put_before_one_that_came_earlier(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True, num_slots=1)
    async with daemon(tmp_path, runner, engine={"slots": 1}) as (channel, _):
        calls = [start_chat(channel, chat_request(max_tokens=100))]
        await asyncio.to_thread(runner.wait_for_forwards, PROOF_FORWARDS + 1)
        for priority in (chat_pb2.PRIORITY_BACKGROUND, chat_pb2.PRIORITY_INTERACTIVE):
            request = chat_request(max_tokens=2)
            request.priority = priority
            calls.append(start_chat(channel, request))
            await until_there(channel, len(calls))
            assert (await let_pass_until(runner, calls[-1].read())).queued.position == 0
        assert (await calls[1].read()).queued.position == 1
        runner.open_gate()
        for call in calls:
            last = None
            while (response := await call.read()) is not grpc.aio.EOF:
                last = response
            assert last is not None
            assert last.HasField("final")


@asynchronous
async def test_grpcs_own_retry_policy_waits_as_it_is_told(tmp_path: Path) -> None:
    """The trailer is what a stock client obeys: it comes again by itself and is answered."""
    runner = make_runner(is_gated=True, num_slots=1)
    policy = (
        '{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "60s", '
        '"maxBackoff": "60s", "backoffMultiplier": 1, "retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}]}'
    )
    sections = {"limits": {"max_queued": 0}, "engine": {"slots": 1}}
    async with daemon(tmp_path, runner, **sections) as (channel, server):
        first = start_chat(channel, chat_request())
        await asyncio.to_thread(runner.wait_for_forwards, PROOF_FORWARDS + 1)
        target = tcp_target(server)
        async with grpc.aio.insecure_channel(target, options=[("grpc.service_config", policy)]) as patient:
            retried = asyncio.create_task(answer(patient, chat_request()))
            stub = status_pb2_grpc.StatusServiceStub(channel)
            while not (await stub.GetStatus(hearth_status_pb2.GetStatusRequest())).chats_refused_count:
                pass
            runner.open_gate()
            text, _ = await retried
        assert text
        assert (await first.read()) is not None


@asynchronous
async def test_a_cancelled_chat_ends_in_the_engine(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    async with daemon(tmp_path, runner) as (channel, _):
        call = start_chat(channel, chat_request(max_tokens=100))
        runner.allow(4)
        assert (await call.read()).HasField("delta")
        await asyncio.to_thread(runner.wait_for_forwards, PROOF_FORWARDS + 5)
        call.cancel()
        stub = status_pb2_grpc.StatusServiceStub(channel)
        while not (await stub.GetStatus(hearth_status_pb2.GetStatusRequest())).chats_cancelled_count:
            pass
        runner.open_gate()
        _, final = await answer(channel, chat_request("x"))
        # What ran: the step that was under way, and the second chat.
        own = final.usage.completion_tokens + math.ceil(
            (final.usage.prompt_tokens - final.usage.cached_prompt_tokens) / 16
        )
        assert runner.num_forwards <= PROOF_FORWARDS + 5 + own


@asynchronous
async def test_a_vanished_caller_ends_in_the_engine_during_its_prompt(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    async with daemon(tmp_path, runner) as (channel, server):
        async with grpc.aio.insecure_channel(tcp_target(server)) as other:
            start_chat(other, chat_request("word " * 40))
            await asyncio.to_thread(runner.wait_for_forwards, PROOF_FORWARDS + 1)
        stub = status_pb2_grpc.StatusServiceStub(channel)
        while (await stub.GetStatus(hearth_status_pb2.GetStatusRequest())).running_count:
            pass
        assert runner.num_forwards == PROOF_FORWARDS + 1


@asynchronous
async def test_a_deadline_ends_the_call_and_the_work(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    async with daemon(tmp_path, runner) as (channel, _):
        error = await refusal(answer(channel, chat_request(), timeout=0.2))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        stub = status_pb2_grpc.StatusServiceStub(channel)
        while (await stub.GetStatus(hearth_status_pb2.GetStatusRequest())).running_count:
            pass
        runner.open_gate()
        await answer(channel, chat_request())


@pytest.mark.parametrize(
    ("backlog_bytes", "why"),
    [
        (4096, "read faster"),
        # Never reached: what ends it is that nothing is taken.
        (16 * 2**20, "the caller took nothing for 0.2 seconds, the limit; read faster"),
    ],
    ids=["backlog", "time"],
)
@asynchronous
async def test_a_reader_that_takes_nothing_loses_its_place(tmp_path: Path, backlog_bytes: int, why: str) -> None:
    """A caller that is connected and never reads: its stream fills up, and its slot goes to others."""
    # It never ends by itself.
    runner = make_runner(context_length=8192, num_slots=1, logits_after=scripted(make_tokenizer().vocab_size, 1, [65]))
    small_window = [("grpc.http2.lookahead_bytes", 65535), ("grpc.http2.bdp_probe", 0)]
    async with (
        daemon(
            tmp_path,
            runner,
            server={"write_timeout_seconds": 0.2, "stream_backlog_bytes": backlog_bytes},
            engine={"slots": 1},
        ) as (channel, server),
        grpc.aio.insecure_channel(tcp_target(server), options=small_window) as slow,
    ):
        call = start_chat(slow, chat_request(max_tokens=6000, top_logprobs=5))
        stub = status_pb2_grpc.StatusServiceStub(channel)
        async with asyncio.timeout(30):
            while not (await stub.GetStatus(hearth_status_pb2.GetStatusRequest())).chats_failed_count:
                pass
        await answer(channel, chat_request())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert why in caught.value.details()


@asynchronous
async def test_a_fault_is_told_by_an_id_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = make_runner()
    async with daemon(tmp_path, runner) as (channel, _):
        runner.fail_next = OSError(CANARY)
        errors = [await refusal(answer(channel, chat_request()))]

        def fail(*_: Any, **__: Any) -> Any:
            raise KeyError(CANARY)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hearthd.services.chat.read_chat", fail)
            errors.append(await refusal(answer(channel, chat_request())))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hearthd.services.chat.to_chat_response", fail)
            errors.append(await refusal(answer(channel, chat_request())))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hearthd.services.model.find_model", fail)
            errors.append(await refusal(model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest())))
        await answer(channel, chat_request())
    for error in errors:
        assert error.code() is grpc.StatusCode.INTERNAL
        incident = re.fullmatch(
            r"a fault of the daemon, incident ([0-9a-f]{12}); its journal says more", error.details() or ""
        )
        assert incident
        assert f"incident {incident[1]}: builtins." in caplog.text
        assert CANARY not in repr(error)
    assert len({error.details() for error in errors}) == 4
    assert CANARY not in caplog.text


@asynchronous
async def test_a_cancellation_from_elsewhere_does_not_leave_the_caller_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled(*_: Any) -> Any:
        raise asyncio.CancelledError

    async with daemon(tmp_path) as (channel, _):
        monkeypatch.setattr("hearthd.services.chat.read_chat", cancelled)
        error = await refusal(answer(channel, chat_request()))
        assert error.code() is grpc.StatusCode.INTERNAL


@asynchronous
async def test_bytes_that_are_no_request_are_an_invalid_argument(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (channel, _):
        for call in (
            channel.unary_unary("/hearth.v1.ModelService/GetModel")(b"\xff"),
            channel.unary_unary("/hearth.v1.ChatService/Chat")(b"\xff"),
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff"),
            channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(b"\xff"),
        ):
            assert violations(await refusal(call)) == ["request"]


@asynchronous
async def test_nothing_that_is_said_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("hearthd", "asyncio"):
        caplog.set_level("DEBUG", logger=name)
    async with daemon(tmp_path) as (channel, _):
        text, _ = await answer(channel, chat_request(CANARY, stop=[CANARY], max_tokens=30))
        call = start_chat(channel, chat_request(CANARY, max_tokens=200))
        await call.read()
        call.cancel()
        for request in (
            chat_request(CANARY, temperature=9),
            chat_request(CANARY * 100),
            chat_request(CANARY, request_id=CANARY + "é"),
            chat_request(CANARY, stop=[CANARY * 20]),
            chat_request(CANARY, model=CANARY),
        ):
            assert CANARY not in (await refusal(answer(channel, request))).details()
    assert "chat " in caplog.text
    assert CANARY not in caplog.text
    assert text[:12] not in caplog.text


@asynchronous
async def test_models_are_described_with_their_limits(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (channel, _):
        stub = model_pb2_grpc.ModelServiceStub(channel)
        (listed,) = (await stub.ListModels(model_pb2.ListModelsRequest())).models
        model = (await stub.GetModel(model_pb2.GetModelRequest(name=NAME))).model
    assert listed == model
    assert (model.name, model.context_length, model.parameter_count, model.license) == (NAME, 256, 1000, "Apache-2.0")
    limits = model.limits
    assert (limits.max_total_tokens, limits.default_max_tokens, limits.max_running, limits.max_queued) == (256, 8, 2, 2)
    assert (limits.max_messages, limits.max_request_bytes) == (256, 262144)
    assert (limits.max_prompt_tokens, limits.max_tokens) == (255, 255)
    assert (limits.max_stop_strings, limits.max_stop_string_chars, limits.max_top_logprobs) == (4, 64, 20)
    assert model.default_sampling.temperature == 0
    assert not model.default_sampling.HasField("seed")
    assert not model.default_sampling.HasField("max_tokens")


@asynchronous
async def test_tokens_are_counted_as_a_chat_would_cost(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (channel, _):
        stub = model_pb2_grpc.ModelServiceStub(channel)
        turns = conversation((Role.ROLE_SYSTEM, "be brief"), (Role.ROLE_USER, "hello"))
        request = model_pb2.CountTokensRequest(conversation=model_pb2.Conversation(messages=turns.messages))
        counted = (await stub.CountTokens(request)).token_count
        _, final = await answer(channel, turns)
        assert counted == final.usage.prompt_tokens
        assert (await stub.CountTokens(model_pb2.CountTokensRequest(text=""))).token_count == 0
        assert (await stub.CountTokens(model_pb2.CountTokensRequest(text="aaaa"))).token_count > 0
        ending = conversation((Role.ROLE_USER, "a"), (Role.ROLE_ASSISTANT, "b"))
        await stub.CountTokens(
            model_pb2.CountTokensRequest(conversation=model_pb2.Conversation(messages=ending.messages))
        )
        assert violations(await refusal(stub.CountTokens(model_pb2.CountTokensRequest()))) == ["input"]
        nobody = model_pb2.CountTokensRequest(conversation=model_pb2.Conversation())
        assert violations(await refusal(stub.CountTokens(nobody))) == ["messages"]


@asynchronous
async def test_while_the_model_loads_status_answers_and_the_others_say_so(tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    config = make_config(tmp_path)
    server = Server(config, lambda _: make_model(runner))
    running = asyncio.create_task(server.run())
    await asyncio.to_thread(runner.wait_for_forwards, 1)
    async with grpc.aio.insecure_channel(unix_target(config)) as channel:
        status = await status_pb2_grpc.StatusServiceStub(channel).GetStatus(hearth_status_pb2.GetStatusRequest())
        assert status.state == hearth_status_pb2.DAEMON_STATE_LOADING
        assert status.model == NAME
        assert status.max_running == 2
        assert status.resident_bytes > 10_000_000
        stub = model_pb2_grpc.ModelServiceStub(channel)
        for call in (answer(channel, chat_request()), stub.ListModels(model_pb2.ListModelsRequest())):
            error = await refusal(call)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "still loading" in (error.details() or "")
        runner.open_gate()
        await server.is_ready.wait()
        await answer(channel, chat_request())
        status = await status_pb2_grpc.StatusServiceStub(channel).GetStatus(hearth_status_pb2.GetStatusRequest())
        assert status.state == hearth_status_pb2.DAEMON_STATE_SERVING
        assert (status.chats_finished_count, status.completion_tokens_count) == (1, 8)
        assert status.prompt_tokens_count > 0
        assert status.uptime_ms > 0
        assert status.version
    server.stop()
    await running


@asynchronous
async def test_a_long_text_does_not_hold_up_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding waits in its own thread: whoever asks meanwhile is answered."""
    encoding, may_end = threading.Event(), threading.Event()
    model = make_model(make_runner())
    encode = type(model.tokenizer).encode_text

    def slow(self: Any, text: str) -> list[int]:
        encoding.set()
        assert may_end.wait(10), "nobody was answered meanwhile"
        return encode(self, text)

    monkeypatch.setattr(type(model.tokenizer), "encode_text", slow)
    async with daemon(tmp_path, load=lambda _: model) as (channel, _):
        stub = model_pb2_grpc.ModelServiceStub(channel)
        counting = stub.CountTokens(model_pb2.CountTokensRequest(text="long"))
        await asyncio.to_thread(encoding.wait)
        await answer(channel, chat_request())
        await stub.ListModels(model_pb2.ListModelsRequest())
        may_end.set()
        assert (await counting).token_count > 0


@asynchronous
async def test_a_callers_texts_keep_another_waiting_for_one_of_them_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Semaphore(0), threading.Semaphore(0)
    model = make_model(make_runner())
    encode = type(model.tokenizer).encode_text

    def slow(self: Any, text: str) -> list[int]:
        if text == "long":
            begun.release()
            assert may_end.acquire(timeout=20), "the other caller waited for all of them"
        return encode(self, text)

    monkeypatch.setattr(type(model.tokenizer), "encode_text", slow)
    kitchen, cellar = (
        (("authorization", f"Bearer {create_token(tmp_path / 'tokens', name)}"),) for name in ("kitchen", "cellar")
    )
    auth = {"token_file": tmp_path / "tokens"}
    async with daemon(tmp_path, load=lambda _: model, auth=auth) as (channel, server):
        stub = model_pb2_grpc.ModelServiceStub(channel)
        executor, is_in_line, num_submitted = server._parts.tokenising._executor, asyncio.Event(), itertools.count(1)
        submit = executor.submit

        def submit_and_tell(*arguments: Any) -> Any:
            future = submit(*arguments)
            if next(num_submitted) == 3:
                is_in_line.set()
            return future

        monkeypatch.setattr(executor, "submit", submit_and_tell)
        flood = [stub.CountTokens(model_pb2.CountTokensRequest(text="long"), metadata=kitchen) for _ in range(8)]
        for _ in range(2):
            assert await asyncio.to_thread(begun.acquire, timeout=20)
        other = stub.CountTokens(model_pb2.CountTokensRequest(text="short"), metadata=cellar)
        await is_in_line.wait()
        may_end.release()
        assert (await other).token_count > 0
        assert sum(call.done() for call in flood) <= 1
        may_end.release(8)
        for call in flood:
            assert (await call).token_count > 0


def test_every_method_of_the_protos_is_served() -> None:
    for servicer, base in (
        (ChatService, chat_pb2_grpc.ChatServiceServicer),
        (ModelService, model_pb2_grpc.ModelServiceServicer),
        (StatusService, status_pb2_grpc.StatusServiceServicer),
    ):
        methods = [name for name in vars(base) if not name.startswith("_")]
        assert methods
        assert all(name in vars(servicer) for name in methods)
