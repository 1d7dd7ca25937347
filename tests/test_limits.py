"""What a request may say and a connection may do: every number at and beyond its bounds, by its effect on a socket."""

import asyncio
import math
import ssl
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hearth.v1 import chat_pb2, status_pb2_grpc
from hearth.v1 import status_pb2 as hearth_status_pb2
from serving import answer, asynchronous, chat_request, make_config, make_tokenizer, serving, tcp_target
from tls_files import make_tls_files

FLOATS = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)
SMALLEST = 2.0**-149  # of a float
JUST_OVER = 1 + 2.0**-23


# Lowest and highest value that is taken; those beyond them that are not. `stop` has no number.
def ranges() -> dict[str, tuple[list[Any], list[Any]]]:
    return {
        "temperature": ([0.0, 2.0], [-SMALLEST, 2 * JUST_OVER]),
        "top_k": ([0, make_tokenizer().vocab_size], [-1, make_tokenizer().vocab_size + 1, -(2**31), 2**31 - 1]),
        "top_p": ([SMALLEST, 1.0], [0.0, -0.0, -SMALLEST, JUST_OVER]),
        "min_p": ([0.0, 1.0], [-SMALLEST, JUST_OVER]),
        "repetition_penalty": ([SMALLEST, 10.0], [0.0, -1.0, 10 * JUST_OVER]),
        "presence_penalty": ([-2.0, 2.0], [-2 * JUST_OVER, 2 * JUST_OVER]),
        "frequency_penalty": ([-2.0, 2.0], [-2 * JUST_OVER, 2 * JUST_OVER]),
        "seed": ([0, 2**64 - 1], []),
        "max_tokens": ([1, 200], [0, -1, 257, 2**31 - 1, -(2**31)]),
        "top_logprobs": ([0, 20], [-1, 21, 2**31 - 1, -(2**31)]),
    }


async def refused_fields(call: Any) -> list[str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value
    status = status_pb2.Status.FromString(dict(caught.value.trailing_metadata())["grpc-status-details-bin"])
    detail = error_details_pb2.BadRequest()
    (packed,) = status.details
    assert packed.Unpack(detail)
    assert all(violation.description for violation in detail.field_violations)
    return [violation.field for violation in detail.field_violations]


def test_these_are_all_numbers_of_a_request() -> None:
    fields = chat_pb2.SamplingOptions.DESCRIPTOR.fields
    assert {field.name for field in fields if field.cpp_type != FieldDescriptor.CPPTYPE_STRING} == ranges().keys()


@asynchronous
async def test_every_number_is_taken_up_to_its_bounds_and_refused_beyond_them(tmp_path: Path) -> None:
    types = {field.name: field.cpp_type for field in chat_pb2.SamplingOptions.DESCRIPTOR.fields}
    async with serving(make_config(tmp_path)) as server, grpc.aio.insecure_channel(tcp_target(server)) as channel:
        for name, (good, bad) in ranges().items():
            odd = [math.nan, math.inf, -math.inf, 3e38, -3e38] if types[name] in FLOATS else []
            for value in [*bad, *odd]:
                request = chat_request(**{name: value})
                assert await refused_fields(answer(channel, request)) == [f"sampling.{name}"], (name, value)
            for value in good:
                await answer(channel, chat_request(**({"max_tokens": 2} | {name: value})))


# Connections.


async def time_to_be_cut_off(port: int, context: ssl.SSLContext | None) -> float:
    """Connect, say nothing, and return how long the daemon bears it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    started = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(15):
            await reader.read(-1)
    except ConnectionError:
        pass
    writer.close()
    return asyncio.get_running_loop().time() - started


@asynchronous
async def test_whoever_is_silent_before_or_after_the_tls_handshake_is_cut_off(tmp_path: Path) -> None:
    files = make_tls_files(tmp_path)
    trusting = ssl.create_default_context(cafile=files.ca)
    trusting.set_alpn_protocols(["h2"])
    async with serving(make_config(tmp_path, tls={"certificate": files.certificate, "key": files.key})) as server:
        port = int(tcp_target(server).rpartition(":")[2])
        seconds = await asyncio.gather(time_to_be_cut_off(port, None), time_to_be_cut_off(port, trusting))
    assert all(4 < each < 12 for each in seconds), seconds


@asynchronous
async def test_calls_over_the_limit_of_a_connection_wait_and_other_connections_do_not(tmp_path: Path) -> None:
    own_pool = [("grpc.use_local_subchannel_pool", 1)]
    async with serving(make_config(tmp_path)) as server, AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(grpc.aio.insecure_channel(tcp_target(server), options=own_pool))
            for _ in range(2)
        ]
        watches = [health_pb2_grpc.HealthStub(one).Watch(health_pb2.HealthCheckRequest()) for _ in range(32)]
        for watch in watches:
            await watch.read()
        waiting = status_pb2_grpc.StatusServiceStub(one).GetStatus(hearth_status_pb2.GetStatusRequest())
        await status_pb2_grpc.StatusServiceStub(other).GetStatus(hearth_status_pb2.GetStatusRequest())
        assert not waiting.done()
        watches[0].cancel()
        assert (await waiting).version
