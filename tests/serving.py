"""A daemon in the test's own process: real sockets, real tokenizer, `FakeRunner` in place of the model.

Run as a program it is a daemon of its own, for tests that send signals: `python tests/serving.py DIRECTORY [FLAG...]`,
configured by DIRECTORY/hearthd.toml where there is one.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from tokenizers import Tokenizer

from fakes import FakeRunner
from hearth.v1 import chat_pb2, chat_pb2_grpc, status_pb2, status_pb2_grpc
from hearthd.__main__ import run_server
from hearthd.configuration.config import (
    AuthConfig,
    Config,
    EngineConfig,
    LimitsConfig,
    ModelConfig,
    ServerConfig,
    TlsConfig,
    load_config,
)
from hearthd.generation.engine import Engine
from hearthd.inference.model import Model
from hearthd.life.notify import Notifier
from hearthd.logs import configure_logging
from hearthd.models.facts import ModelFacts
from hearthd.sequences.sampling import SamplingParams
from hearthd.server import Server
from hearthd.text.tokenizer import ChatTokenizer
from tiny_tokenizers import CHATML, byte_level

TIMEOUT_SECONDS = 30
NAME = "test-model"
# What proves a model before it serves: "Hello" with prefill chunks of 16 tokens is two, the second token one more.
PROOF_FORWARDS = 3
# Of a first chat that says as much.
PROMPT_FORWARDS = 2


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in a loop of its own; a test that waits for ever fails."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await test(*arguments, **named)

        asyncio.run(bounded())

    return run


@functools.cache
def make_tokenizer() -> ChatTokenizer:
    eos_id = Tokenizer.from_str(byte_level()).token_to_id("<|im_end|>")
    return ChatTokenizer(byte_level(), CHATML, eos_ids=[eos_id])


def make_runner(**options: Any) -> FakeRunner:
    return FakeRunner(**{"vocab_size": make_tokenizer().vocab_size, "context_length": 256, "num_slots": 2} | options)


def make_model(runner: FakeRunner, *, prefill_chunk: int = 16, max_answer_seconds: float = 600.0) -> Model:
    tokenizer = make_tokenizer()
    return Model(
        name=NAME,
        engine=Engine(runner, tokenizer, prefill_chunk=prefill_chunk, max_answer_seconds=max_answer_seconds),
        runner=runner,
        tokenizer=tokenizer,
        default_sampling=SamplingParams(max_tokens=8, temperature=0.0),
        architecture="TestForCausalLM",
        parameter_count=1000,
        quantization="int8",
        size_bytes=2000,
        license="Apache-2.0",
        source="made by a test",
    )


def make_config(directory: Path, **sections: dict[str, Any]) -> Config:
    """Return a configuration with a socket in the directory and a free port; sections override single keys."""
    config = Config(
        model=ModelConfig(directory=directory, name=NAME),
        server=ServerConfig(unix_socket=directory / "hearthd.sock", tcp=("127.0.0.1:0",), drain_grace_seconds=5.0),
        engine=EngineConfig(slots=2, prefill_chunk=16),
        limits=LimitsConfig(max_queued=2, default_max_tokens=8),
        tls=TlsConfig(),
        auth=AuthConfig(),
    )
    roles = {"roles": {**config.roles, **sections.pop("roles")}} if "roles" in sections else {}
    return replace(config, **{name: replace(getattr(config, name), **keys) for name, keys in sections.items()}, **roles)


@asynccontextmanager
async def serving(
    config: Config,
    load: Callable[[Config], Model] | None = None,
    notifier: Notifier | None = None,
    load_again: Callable[[], Config] | None = None,
    survey: Callable[[Config], ModelFacts] | None = None,
) -> AsyncIterator[Server]:
    """Run a daemon; in the block it is ready, and after it has ended as SIGTERM would end it."""
    server = Server(config, load or (lambda _: make_model(make_runner())), notifier, load_again, survey)
    running = asyncio.create_task(server.run())
    ready = asyncio.create_task(server.is_ready.wait())
    await asyncio.wait((running, ready), return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    try:
        if running.done():
            await running
        yield server
    finally:
        if not running.done():
            server.stop()
        await running


def unix_target(config: Config) -> str:
    return f"unix:{config.server.unix_socket}"


def tcp_target(server: Server) -> str:
    return next(address for address in server.addresses if not address.startswith("unix:"))


async def warnings_of(server: Server) -> list[str]:
    """Return what `hearth status` would warn of."""
    target = next(address for address in server.addresses if address.startswith("unix:"))
    async with grpc.aio.insecure_channel(target) as channel:
        status = await status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest())
    return list(status.warnings)


def chat_request(content: str = "hello", **fields: Any) -> chat_pb2.ChatRequest:
    """Return a request; keyword arguments are sampling options, but for request_id and model."""
    message = chat_pb2.Message(role=chat_pb2.ROLE_USER, content=content)
    whole = {name: fields.pop(name) for name in ("request_id", "model") if name in fields}
    return chat_pb2.ChatRequest(messages=[message], sampling=chat_pb2.SamplingOptions(**fields), **whole)


def start_chat(channel: grpc.aio.Channel, request: chat_pb2.ChatRequest, **options: Any) -> Any:
    return chat_pb2_grpc.ChatServiceStub(channel).Chat(request, **options)


async def answer(channel: grpc.aio.Channel, request: chat_pb2.ChatRequest, **options: Any) -> tuple[str, Any]:
    """Return an answer's whole text and its final message."""
    text, final = "", None
    async for response in start_chat(channel, request, **options):
        assert final is None, "something came after the final message"
        match response.WhichOneof("event"):
            case "delta":
                text += response.delta.text
            case "final":
                final = response.final
    assert final is not None
    return text, final


def _obey(runner: FakeRunner) -> None:
    """Let as many forwards pass as each line of standard input says; let all pass when it ends."""
    for line in sys.stdin:
        runner.allow(int(line))
    runner.open_gate()


def main(directory: Path, *flags: str) -> int:
    configure_logging("info")
    runner = make_runner(is_gated="gated" in flags)
    threading.Thread(target=_obey, args=(runner,), daemon=True).start()
    if "hanging" in flags:
        # The loop is told to stop, and never turns again.
        Server.stop = lambda self: threading.Event().wait()  # type: ignore[method-assign,assignment,return-value]
    if "broken" in flags:
        runner.fail_next = OSError("canary")
    file = directory / "hearthd.toml"
    if file.exists():
        read = functools.partial(load_config, file)
        return run_server(read(), lambda _: make_model(runner), read)
    config = make_config(directory, server={"drain_grace_seconds": 0.0} if "hurried" in flags else {})
    return run_server(config, lambda _: make_model(runner))


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), *sys.argv[2:])
    sys.stderr.flush()
    # As hearthd itself does.
    os._exit(code)
