"""A policy and an audit log in a real daemon: what callers get, what they cannot undo, and what is written down."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from google.rpc import status_pb2 as rpc_status_pb2
from grpc_status.rpc_status import GRPC_DETAILS_METADATA_KEY
from numpy.typing import NDArray

from fakes import FakeRunner
from hearth.v1 import chat_pb2, model_pb2, model_pb2_grpc
from hearth.v1.chat_pb2 import Role
from hearthd.access.tokens import create_token
from hearthd.configuration.roles import Role as Rights
from hearthd.errors import ConfigError
from hearthd.server import Server
from serving import (
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

POLICY = """
[[system]]
prompt = "Be kind."
[[blocked]]
name = "weapons"
on = ["input", "output"]
roles = ["user"]
phrases = ["gun"]
text = "Not in this house."
[[blocked]]
name = "end"
on = "output"
phrases = ["the end is near"]
action = "stop"
[[blocked]]
name = "name"
on = "output"
phrases = ["Hans*"]
action = "replace"
text = "[somebody]"
[[required]]
name = "notice"
on = "output"
roles = ["monitor"]
text = " -- a machine."
"""


def spelling(text: str) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """Logits that answer every conversation with a text."""
    tokenizer = make_tokenizer()
    (eos,) = tokenizer.eos_ids
    answer_ids = [*tokenizer.encode_text(text), eos]
    start, *header = tokenizer.encode_chat([], add_generation_prompt=True)

    def logits_after(history: Sequence[int]) -> NDArray[np.float32]:
        behind = len(history) - 1 - list(reversed(history)).index(start) + 1 + len(header)
        logits = np.zeros(tokenizer.vocab_size, np.float32)
        logits[answer_ids[min(len(history) - behind, len(answer_ids) - 1)]] = 10
        return logits

    return logits_after


@asynccontextmanager
async def daemon(
    directory: Path, says: str = "Hello.", policy: str = POLICY, **sections: dict[str, Any]
) -> AsyncIterator[tuple[grpc.aio.Channel, Server]]:
    path = directory / "policy.toml"
    path.write_text(policy, encoding="utf-8")
    runner: FakeRunner = make_runner(logits_after=spelling(says))
    config = make_config(
        directory,
        policy={"file": path},
        audit={"file": directory / "audit.jsonl"},
        **sections,
    )
    async with (
        serving(config, lambda _: make_model(runner)) as server,
        grpc.aio.insecure_channel(unix_target(config)) as channel,
    ):
        yield channel, server


def audited(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines()]


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@asynchronous
async def test_owners_instructions_cost_tokens_and_count_as_a_chat_does(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (channel, _):
        _, final = await answer(channel, chat_request("hi"))
        alone = make_tokenizer().encode_chat([])
        messages = [chat_pb2.Message(role=Role.ROLE_USER, content="hi")]
        conversation = model_pb2.Conversation(messages=messages)
        stub = model_pb2_grpc.ModelServiceStub(channel)
        counted = await stub.CountTokens(model_pb2.CountTokensRequest(conversation=conversation))
        assert counted.token_count == final.usage.prompt_tokens > len(alone)
        own = chat_request("hi")
        own.messages.insert(0, chat_pb2.Message(role=Role.ROLE_SYSTEM, content="Be rude."))
        _, with_own = await answer(channel, own)
        assert with_own.usage.prompt_tokens > final.usage.prompt_tokens
        room = 256 - final.usage.prompt_tokens
        error = await refused(answer(channel, chat_request("hi", max_tokens=room + 1)))
        assert f"give at most {room}," in (error.details() or "")


@asynchronous
async def test_phrase_in_a_request_is_refused_with_the_owners_sentence(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (channel, _):
        error = await refused(answer(channel, chat_request("buy a GUN now")))
        assert (error.code(), error.details()) == (grpc.StatusCode.PERMISSION_DENIED, "Not in this house.")
        trailers = dict(error.trailing_metadata() or ())
        status = rpc_status_pb2.Status.FromString(trailers[GRPC_DETAILS_METADATA_KEY])
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert (info.reason, dict(info.metadata)) == ("POLICY_RULE", {"rule": "weapons"})


@asynchronous
async def test_phrase_in_an_answer_never_leaves(tmp_path: Path) -> None:
    async with daemon(tmp_path, "Use a gun, Hans.") as (channel, _):
        sent = ""
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012 - it comes at the end of the stream
            async for response in start_chat(channel, chat_request("how?", max_tokens=90)):
                sent += response.delta.text
        assert sent == "Use a "
        error = caught.value
        assert (error.code(), error.details()) == (grpc.StatusCode.PERMISSION_DENIED, "Not in this house.")
    line = audited(tmp_path)[-1]
    assert (line["outcome"], line["rules"]) == ("PERMISSION_DENIED", ["weapons"])
    assert line["prompt_tokens"] > 0
    assert line["completion_tokens"] > 0


@asynchronous
async def test_answer_is_stopped_before_a_phrase_and_names_are_replaced(tmp_path: Path) -> None:
    async with daemon(tmp_path, "Dear Hansel, the end  is near, run") as (channel, _):
        text, final = await answer(channel, chat_request("news?", max_tokens=90))
        assert text == "Dear [somebody], "
        assert final.finish_reason == chat_pb2.FINISH_REASON_POLICY
    line = audited(tmp_path)[-1]
    assert line["rules"] == ["end", "name"]
    assert (line["finish_reason"], line["outcome"]) == ("policy", "OK")
    assert line["completion_tokens"] == final.usage.completion_tokens


@asynchronous
async def test_word_that_a_stop_string_makes_whole_is_blocked_too(tmp_path: Path) -> None:
    async with daemon(tmp_path, "a gunner came") as (channel, _):
        assert (await answer(channel, chat_request("who?", max_tokens=90)))[0] == "a gunner came"
        error = await refused(answer(channel, chat_request("who?", max_tokens=90, stop=["ner"])))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED


@asynchronous
async def test_log_probabilities_would_tell_and_are_refused(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (channel, _):
        error = await refused(answer(channel, chat_request("hi", top_logprobs=2)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "sampling.top_logprobs" in (error.details() or "")


@asynchronous
async def test_rules_follow_the_role_of_the_token(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    auth = {"token_file": tokens}
    callers = {role: create_token(tokens, f"a-{role}", role=role) for role in ("user", "admin")}
    async with (
        daemon(tmp_path, "A gun.", auth=auth) as (_, server),
        grpc.aio.insecure_channel(tcp_target(server)) as tcp,
    ):
        metadata = {role: (("authorization", f"Bearer {token}"),) for role, token in callers.items()}
        assert (await answer(tcp, chat_request("gun?"), metadata=metadata["admin"]))[0] == "A gun."
        assert (await refused(answer(tcp, chat_request("gun?"), metadata=metadata["user"]))).details() == (
            "Not in this house."
        )
        error = await refused(answer(tcp, chat_request("gun?"), metadata=(("authorization", "Bearer wrong"),)))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        await refused(tcp.unary_unary("/secret.Name/Method")(b"", metadata=metadata["user"]))
    admin, user, nobody, unknown = audited(tmp_path)
    assert (admin["caller"], admin["role"], admin["outcome"]) == ("a-admin", "admin", "OK")
    assert (user["caller"], user["rules"]) == ("a-user", ["weapons"])
    assert (nobody["outcome"], nobody["calls"]) == ("UNAUTHENTICATED", 1)
    assert "caller" not in nobody
    assert (unknown["method"], unknown["outcome"]) == ("unknown", "PERMISSION_DENIED")
    assert {"time", "method", "outcome", "seconds"} <= admin.keys()


@asynchronous
async def test_lines_tell_a_rate_from_a_quota(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    roles = {
        "hasty": Rights(methods=("all",), requests_per_minute=1),
        "greedy": Rights(methods=("all",), tokens_per_day=1),
    }
    metadata = {
        role: (("authorization", f"Bearer {create_token(tokens, role, role=role)}"),) for role in (*roles, "user")
    }
    async with (
        daemon(tmp_path, auth={"token_file": tokens}, roles=roles) as (_, server),
        grpc.aio.insecure_channel(tcp_target(server)) as tcp,
    ):
        for role in ("hasty", "greedy"):
            await answer(tcp, chat_request("hi"), metadata=metadata[role])
            error = await refused(answer(tcp, chat_request("hi"), metadata=metadata[role]))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await refused(answer(tcp, chat_request("hi", temperature=-1.0), metadata=metadata["user"]))
        await refused(answer(tcp, chat_request("gun?"), metadata=metadata["user"]))
    lines = audited(tmp_path)
    assert [(line["caller"], line["outcome"], line.get("refusal")) for line in lines] == [
        ("hasty", "OK", None),
        ("hasty", "RESOURCE_EXHAUSTED", "rate"),
        ("greedy", "OK", None),
        ("greedy", "RESOURCE_EXHAUSTED", "quota"),
        ("user", "INVALID_ARGUMENT", "invalid"),
        ("user", "PERMISSION_DENIED", "policy"),
    ]


@asynchronous
async def test_scan_does_not_fill_the_audit_log(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    create_token(tokens, "a")
    async with (
        daemon(tmp_path, auth={"token_file": tokens}) as (_, server),
        grpc.aio.insecure_channel(tcp_target(server)) as tcp,
    ):
        for _ in range(50):
            await refused(answer(tcp, chat_request()))
    found = audited(tmp_path)
    assert len(found) < 25
    assert {line["outcome"] for line in found} == {"UNAUTHENTICATED"}


@asynchronous
async def test_new_policy_holds_from_the_next_call_on_and_a_broken_one_never(tmp_path: Path) -> None:
    async with daemon(tmp_path, "Hello Hans.") as (channel, server):
        assert (await answer(channel, chat_request(max_tokens=90)))[0] == "Hello [somebody]."
        (tmp_path / "policy.toml").write_text(POLICY.replace("[somebody]", "N."), encoding="utf-8")
        server._parts.policy.reload()
        assert (await answer(channel, chat_request(max_tokens=90)))[0] == "Hello N.."
        too_long = POLICY.replace("Be kind.", "Be kind. " * 100)
        (tmp_path / "policy.toml").write_text(too_long, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"room in engine\.context_length, 256"):
            server._parts.policy.reload()
        assert (await answer(channel, chat_request(max_tokens=90)))[0] == "Hello N.."


@asynchronous
async def test_daemon_does_not_start_with_instructions_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"room in engine\.context_length, 256"):
        async with daemon(tmp_path, policy=POLICY.replace("Be kind.", "Be kind. " * 100)):
            pass
    with pytest.raises(ConfigError, match="no role"):
        async with daemon(tmp_path, policy=POLICY.replace('"monitor"', '"montior"')):
            pass
