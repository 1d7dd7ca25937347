"""What one request may cost at most: a role's caps on its tokens, and who is refused before its text is looked at."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from fakes import FakeRunner
from hearth.v1 import model_pb2, model_pb2_grpc
from hearthd.access.caller import Caller
from hearthd.configuration.roles import Role
from hearthd.errors import NotPermittedError
from serving import (
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
)


def guest(**rights: Any) -> Caller:
    return Caller("phone", "guest", "token:phone", "token:phone/1", Role(**rights))


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize(
    ("cap", "max_tokens", "is_asked", "chosen"),
    [(0, 500, True, 500), (0, 500, False, 500), (500, 500, True, 500), (64, 500, False, 64), (64, 8, True, 8)],
)
def test_a_default_is_cut_to_the_roles_cap_and_what_is_within_it_stays(
    cap: int, max_tokens: int, is_asked: bool, chosen: int
) -> None:
    assert guest(max_tokens=cap).choose_max_tokens(max_tokens, is_asked=is_asked) == chosen


def test_what_is_asked_beyond_a_cap_is_refused_and_not_cut() -> None:
    with pytest.raises(NotPermittedError):
        guest(max_tokens=64).choose_max_tokens(65, is_asked=True)
    guest(max_prompt_tokens=64).require_prompt(64)
    guest().require_prompt(10**6)
    with pytest.raises(NotPermittedError):
        guest(max_prompt_tokens=64).require_prompt(65)


@asynchronous
async def test_a_roles_caps_hold_before_the_model_computes_anything(tmp_path: Path) -> None:
    runner = make_runner(logits_after=None)
    roles = {"user": Role(max_tokens=5, max_prompt_tokens=60)}
    config = make_config(tmp_path, roles=roles)
    async with (
        serving(config, lambda _: make_model(runner)) as server,
        grpc.aio.insecure_channel(tcp_target(server)) as channel,
    ):
        num_forwards = runner.num_forwards
        error = await refusal(answer(channel, chat_request(max_tokens=6)))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert error.details() == (
            "role user may ask for at most 5 tokens of an answer (max_tokens of the role), and sampling.max_tokens is "
            "6; give 5 or less, or leave it out"
        )
        error = await refusal(answer(channel, chat_request("a" * 99)))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        said = error.details() or ""
        assert said.startswith("role user may send at most 60 tokens of prompt (max_prompt_tokens of the role)")
        assert said.endswith("; send fewer or shorter messages")
        assert runner.num_forwards == num_forwards
        (model,) = (await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())).models
        limits = model.limits
        assert (limits.max_prompt_tokens, limits.max_tokens, limits.default_max_tokens) == (60, 5, 5)
        # The default is 8.
        _, final = await answer(channel, chat_request())
        assert 0 < final.usage.completion_tokens <= 5
        assert final.usage.prompt_tokens <= 60
        _, final = await answer(channel, chat_request(max_tokens=3))
        assert final.usage.completion_tokens <= 3


@asynchronous
async def test_who_finds_the_queue_full_has_its_text_not_even_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(is_gated=True, num_slots=1)
    runner.allow(PROOF_FORWARDS)
    config = make_config(tmp_path, engine={"slots": 1}, limits={"max_queued": 1})
    async with (
        serving(config, lambda _: make_model(runner)) as server,
        grpc.aio.insecure_channel(tcp_target(server)) as channel,
    ):
        encode, num_encoded = server._parts.tokenising.run, 0

        async def counted(*arguments: Any) -> Any:
            nonlocal num_encoded
            num_encoded += 1
            return await encode(*arguments)

        monkeypatch.setattr(server._parts.tokenising, "run", counted)
        chats = [start_chat(channel, chat_request(max_tokens=100)) for _ in range(2)]
        await wait_for_two(runner, chats)
        error = await refusal(answer(channel, chat_request("a" * 200_000)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert num_encoded == 2
        for chat in chats:
            chat.cancel()
        runner.open_gate()


async def wait_for_two(runner: FakeRunner, chats: list[Any]) -> None:
    """Return when one of two chats runs, and the other one waits."""
    heard = asyncio.gather(*(chat.read() for chat in chats))
    while not heard.done():
        runner.allow()
        await asyncio.to_thread(runner.wait_for_forwards, runner.num_forwards + 1)
    assert sorted(response.WhichOneof("event") for response in await heard) == ["delta", "queued"]
