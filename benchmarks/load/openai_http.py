"""One request to a server that speaks OpenAI's streaming chat API over HTTP/1.1, and the time of all that comes.

By hand, for the little of HTTP that this takes: a connection for each request, chunked answers, server-sent events. So
the generator costs about what it costs over gRPC, and needs no further package. Called by the scenario `peer`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from load.outcome import End, Outcome

_MAX_LINE = 2**20


class HttpError(Exception):
    """The server answered something else than HTTP with status 200; the message says what."""

    def __init__(self, message: str, *, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


async def ask(port: int, body: dict[str, Any], outcome: Outcome, *, seconds: float) -> Outcome:
    """Post a chat to loopback, read its answer to the end or for so long, and note all in the outcome."""
    outcome.sent = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            await _read(port, body, outcome)
    except TimeoutError:
        outcome.end, outcome.reason = End.FAILED, "deadline"
    except HttpError as error:
        outcome.end = End.REFUSED if error.is_refusal and not outcome.deltas else End.FAILED
        outcome.reason = str(error)
    except (OSError, EOFError) as error:
        outcome.end, outcome.reason = End.FAILED, f"connection: {type(error).__name__}"
    outcome.ended = time.monotonic()
    return outcome


async def _read(port: int, body: dict[str, Any], outcome: Outcome) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_MAX_LINE)
    try:
        content = json.dumps(body | {"stream": True}).encode()
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
            + content
        )
        await writer.drain()
        await _read_head(reader)
        finish_reason = None
        async for event in _events(_lines(_chunks(reader))):
            if event == "[DONE]":
                break
            data = json.loads(event)
            if "error" in data:
                raise HttpError(f"error: {str(data['error'])[:80]}")
            choice = data["choices"][0]
            if text := choice.get("delta", {}).get("content"):
                outcome.deltas.append(time.monotonic())
                outcome.text += text
            finish_reason = choice.get("finish_reason") or finish_reason
        # It tells no counts while it streams: a piece is a token, but for characters of several.
        outcome.completion_tokens = len(outcome.deltas)
        outcome.end, outcome.reason = (End.ANSWERED, "") if finish_reason else (End.FAILED, "cut short")
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> None:
    status = (await reader.readuntil(b"\r\n")).decode("latin-1").split()
    headers = {}
    while (line := (await reader.readuntil(b"\r\n")).decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip().lower()
    if len(status) < 2 or not status[1].isdecimal():
        raise HttpError("no HTTP")
    if status[1] != "200":
        raise HttpError(f"HTTP {status[1]}", is_refusal=status[1] in ("429", "503"))
    if headers.get("transfer-encoding") != "chunked":
        raise HttpError("an answer that is no stream")


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readuntil(b"\r\n")


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode().rstrip("\r")


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the data of each event. One of several lines does not come from such a server."""
    async for line in lines:
        if line.startswith("data:"):
            yield line[len("data:") :].strip()
