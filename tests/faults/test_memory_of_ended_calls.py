"""However a call ends, its request and all that was made of it go with it: no garbage waits for the collector.

A cycle would hold a refused prompt until a full collection, which a process with many long-lived objects seldom makes:
a daemon that is sent thousands of prompts that do not fit would grow by tens of megabytes.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from hearthd.errors import InvalidRequestError
from hearthd.services.statuses import ErrorBoundary
from serving import asynchronous


class Prompt:
    """Stands for whatever a handler holds."""


class Handler(grpc.GenericRpcHandler):
    """Does what the test says, with a `Prompt` among its variables."""

    def __init__(self, is_stream: bool, behave: Callable[[Any], Any]) -> None:
        self.prompts: list[weakref.ref[Prompt]] = []
        self.begun, self.ended = asyncio.Event(), asyncio.Event()

        async def handle(request: bytes, context: Any) -> bytes | None:
            prompt = Prompt()
            self.prompts.append(weakref.ref(prompt))
            self.begun.set()
            try:
                await behave(context)
            finally:
                self.ended.set()
            return None if is_stream else request

        wrap = grpc.unary_stream_rpc_method_handler if is_stream else grpc.unary_unary_rpc_method_handler
        self._handler = wrap(handle, request_deserializer=bytes, response_serializer=bytes)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._handler


@asynccontextmanager
async def calling(handler: Handler) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[ErrorBoundary()])
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gc.collect()
    gc.disable()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        gc.enable()
        await server.stop(0)


async def refuse(_context: Any) -> None:
    raise InvalidRequestError("messages", "do not fit")


async def fail(_context: Any) -> None:
    raise RuntimeError("a bug")


async def wait(_context: Any) -> None:
    await asyncio.Event().wait()


async def all_gone(handler: Handler) -> bool:
    """Whether the calls leave nothing once gRPC has done with them, which takes it a few turns of the loop."""
    for _ in range(1000):
        if not any(prompt() for prompt in handler.prompts):
            return True
        await asyncio.sleep(0)
    return False


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("behave", [refuse, fail])
@asynchronous
async def test_a_refused_call_leaves_nothing(is_stream: bool, behave: Callable[[Any], Any]) -> None:
    handler = Handler(is_stream, behave)
    async with calling(handler) as channel:
        for _ in range(5):
            call = channel.unary_stream("/x/y")(b"") if is_stream else channel.unary_unary("/x/y")(b"")
            expected = grpc.StatusCode.INVALID_ARGUMENT if behave is refuse else grpc.StatusCode.INTERNAL
            assert await call.code() is expected
        assert len(handler.prompts) == 5
        assert await all_gone(handler)


@pytest.mark.parametrize("is_stream", [False, True])
@asynchronous
async def test_a_cancelled_call_leaves_nothing(is_stream: bool) -> None:
    handler = Handler(is_stream, wait)
    async with calling(handler) as channel:
        for _ in range(5):
            handler.begun.clear()
            handler.ended.clear()
            call = channel.unary_stream("/x/y")(b"") if is_stream else channel.unary_unary("/x/y")(b"")
            await handler.begun.wait()
            call.cancel()
            await handler.ended.wait()
        assert await all_gone(handler)
