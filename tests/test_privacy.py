"""Nobody's words get out: a secret in whatever a caller or the owner writes, and in every error that they provoke."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hearth.v1 import chat_pb2, model_pb2, model_pb2_grpc, status_pb2_grpc
from hearth.v1 import status_pb2 as daemon_status_pb2
from hearthd.logs import configure_logging
from serving import answer, asynchronous, chat_request, make_config, make_model, make_runner, serving, unix_target

CANARY = "zanzibar-7f3a"
POLICY = f"""
[[system]]
prompt = "Secret instructions {CANARY}."
[[blocked]]
name = "in"
on = "input"
phrases = ["{CANARY} plan"]
[[blocked]]
name = "out"
on = "output"
phrases = ["{CANARY} words"]
action = "replace"
text = "{CANARY} instead"
[[required]]
name = "wake"
on = "input"
roles = ["monitor"]
phrases = ["{CANARY} please"]
text = "Say the word."
"""
# Each layer that a caller's words pass, as a place where something may go wrong with them in hand.
LAYERS = (
    "hearthd.services.chat.read_chat",
    "hearthd.services.chat.find_model",
    "hearthd.services.chat.fit_to_context",
    "hearthd.services.chat.to_chat_response",
    "hearthd.services.chat._charge",
    "hearthd.services.convert.read_conversation",
    "hearthd.services.convert.validate",
    "hearthd.policy.rules.RoleRules.apply",
    "hearthd.policy.rules.RoleRules.screen_answer",
    "hearthd.policy.screening.Screen.push",
    "hearthd.policy.screening.Screen.flush",
    "hearthd.policy.search.Search.push",
    "hearthd.text.tokenizer.ChatTokenizer.encode_chat",
    "hearthd.text.tokenizer.ChatTokenizer.decoder",
    "hearthd.text.chat_template.ChatTemplate.render",
    "hearthd.text.decoding.IncrementalDecoder.push",
    "hearthd.sequences.stop.StopMatcher.push",
    "hearthd.sequences.answer.Answer.end",
    "hearthd.sequences.sampling.Sampler.sample",
    "hearthd.kv.kv_cache.KVCache.acquire",
    "hearthd.access.metering.Meters.admit_chat",
    "hearthd.inference.worker.Worker.admit",
    "hearthd.inference.stream.ChatStream.submit",
    "hearthd.access.auth.Authenticator.authorise",
)


class Leak(Exception):
    """Quotes what it had in hand, as exceptions do."""

    def __init__(self) -> None:
        super().__init__(CANARY)
        self.add_note(CANARY)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The daemon's own log, with everything that it tells at any level."""
    root, stream = logging.getLogger(), io.StringIO()
    before = root.handlers[:], root.level
    configure_logging("debug", environment={}, stream=stream)
    for name in ("asyncio", "grpc"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    yield stream
    root.handlers[:], level = before
    root.setLevel(level)


async def told(call: Any) -> str:
    """Everything that the caller of a failed call gets."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    return f"{error.code()} {error.details()} {error.debug_error_string()} {list(error.trailing_metadata() or ())}"


def said() -> chat_pb2.ChatRequest:
    request = chat_request(f"I am {CANARY}", stop=[CANARY], max_tokens=4)
    request.messages.insert(0, chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM, content=f"You are {CANARY}"))
    return request


def config_of(directory: Path) -> Any:
    policy = directory / "policy.toml"
    policy.write_text(POLICY)
    return make_config(
        directory, policy={"file": policy}, audit={"file": directory / "audit.jsonl"}, auth={"open_role": "admin"}
    )


@asynchronous
async def test_words_that_are_said_reach_no_log_no_error_and_no_figure(tmp_path: Path, log: io.StringIO) -> None:
    config = config_of(tmp_path)
    metadata = (("x-secret", CANARY), ("x-secret-bin", CANARY.encode()))
    async with (
        serving(config, lambda _: make_model(make_runner())),
        grpc.aio.insecure_channel(unix_target(config)) as channel,
    ):
        await answer(channel, said(), metadata=metadata)
        wrong = [
            chat_request(f"the {CANARY} plan"),
            chat_request(CANARY, temperature=99),
            chat_request(f"{CANARY} " * 400),
            chat_request("a", stop=[CANARY * 9]),
            chat_request("a", model=CANARY),
            chat_request("a", request_id=f"{CANARY} é"),
            chat_request("a", top_logprobs=2),
        ]
        errors = [await told(answer(channel, request, metadata=metadata)) for request in wrong]
        errors.append(await told(channel.unary_unary(f"/{CANARY}/M")(CANARY.encode(), metadata=metadata)))
        errors.append(await told(channel.unary_unary("/hearth.v1.ChatService/Chat")(b"\xff" + CANARY.encode())))
        described = await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
        status = await status_pb2_grpc.StatusServiceStub(channel).GetStatus(daemon_status_pb2.GetStatusRequest())
    assert [error for error in errors if CANARY in error] == []
    assert CANARY not in f"{described}{status}"
    assert "chat " in log.getvalue()
    assert CANARY not in log.getvalue()
    audit = (tmp_path / "audit.jsonl").read_text()
    assert len(audit.splitlines()) == 12
    assert CANARY not in audit


@asynchronous
async def test_errors_at_every_layer_tell_an_id_and_nothing_else(tmp_path: Path, log: io.StringIO) -> None:
    config = config_of(tmp_path)

    def leak(*_: object, **__: object) -> Any:
        raise Leak

    async with (
        serving(config, lambda _: make_model(make_runner())),
        grpc.aio.insecure_channel(unix_target(config)) as channel,
    ):
        for layer in LAYERS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(layer, leak)
                error = await told(answer(channel, said()))
            assert "StatusCode.INTERNAL a fault of the daemon, incident " in error, layer
            assert CANARY not in error, layer
            # The next caller is served as if nothing had been.
            await answer(channel, chat_request())
    assert log.getvalue().count(", incident ") == len(LAYERS)
    assert CANARY not in log.getvalue()
    audit = (tmp_path / "audit.jsonl").read_text()
    assert CANARY not in audit
    outcomes = [json.loads(line)["outcome"] for line in audit.splitlines()]
    assert outcomes.count("INTERNAL") == len(LAYERS)
    assert outcomes.count("OK") == len(LAYERS)


@asynchronous
async def test_an_audit_log_that_fails_harms_no_call_and_tells_nothing(tmp_path: Path, log: io.StringIO) -> None:
    config = config_of(tmp_path)

    def leak(*_: object, **__: object) -> Any:
        raise Leak

    async with (
        serving(config, lambda _: make_model(make_runner())),
        grpc.aio.insecure_channel(unix_target(config)) as channel,
    ):
        for place in ("hearthd.audit.audit.current_caller", "hearthd.audit.audit_log.AuditLog.write"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(place, leak)
                await answer(channel, said())
    assert log.getvalue().count("a call could not be written down, incident ") == 2
    assert CANARY not in log.getvalue()
