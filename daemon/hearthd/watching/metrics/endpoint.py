"""The page that Prometheus fetches: one answer to one request, over plain HTTP, on the event loop.

Not prometheus_client's own server: that one begins a thread for each connection and lets a silent one keep it for ever,
and it asks a name server for the name of the address that it binds. Here connections are few and short, whatever
whoever is at the other end does.

Knows no metric. Made by `observation`.
"""

import asyncio
import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

from hearthd.errors import AddressInUseError
from hearthd.listening.listeners import Listener
from hearthd.logs import log_incident

__all__ = ["MetricsEndpoint"]

_logger = logging.getLogger(__name__)

_PATH: Final = b"/metrics"
_MAX_CONNECTIONS: Final = 8
_MAX_HEAD_BYTES: Final = 8192
# From the connection to the answer's last byte.
_PATIENCE_SECONDS: Final = 5.0
# What was rendered serves for so long: whoever asks all the time costs no answer its time.
_KEEP_SECONDS: Final = 0.5

Render = Callable[[], tuple[bytes, str]]
"""Returns the page and its content type."""


class MetricsEndpoint:
    """Serves one page. Of the event loop."""

    def __init__(
        self,
        listeners: Sequence[Listener],
        render: Render,
        *,
        patience_seconds: float = _PATIENCE_SECONDS,
        keep_seconds: float | None = None,
    ) -> None:
        self._listeners = listeners
        self._render = render
        self._patience_seconds = patience_seconds
        self._keep_seconds = _KEEP_SECONDS if keep_seconds is None else keep_seconds
        self._page: tuple[bytes, str] = (b"", "")
        self._rendered = -math.inf
        self._num_open = 0
        self._servers: list[asyncio.Server] = []
        self.addresses: list[str] = []
        """Where it listens, `host:port`."""

    async def start(self) -> None:
        """Bind and serve. Raises AddressInUseError."""
        for listener in self._listeners:
            bound = _bind(listener)
            # The kernel chooses a port for 0.
            self.addresses.append(f"{listener.target.rpartition(':')[0]}:{bound.getsockname()[1]}")
            self._servers.append(await asyncio.start_server(self._serve, sock=bound, limit=_MAX_HEAD_BYTES))
        _logger.info("metrics on %s", ", ".join(f"http://{address}/metrics" for address in self.addresses))

    def close(self) -> None:
        """Listen no more. What is being answered ends by itself, soon."""
        for server in self._servers:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._num_open >= _MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._num_open += 1
        try:
            async with asyncio.timeout(self._patience_seconds):
                writer.write(self._answer(await _read_head(reader)))
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, EOFError):
            pass  # whoever asked is gone, or does not talk, or does not read
        finally:
            writer.transport.abort()
            self._num_open -= 1

    def _answer(self, head: bytes | None) -> bytes:
        words = (head or b"").partition(b"\r\n")[0].split(b" ")
        if head is None or len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"this is no HTTP request\n")
        method, path = words[0], words[1].partition(b"?")[0]
        if path != _PATH:
            return _response("404 Not Found", b"there is only /metrics\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"use GET\n", b"Allow: GET, HEAD\r\n")
        try:
            page, content_type = self._find_page()
        except Exception as error:  # noqa: BLE001 - the daemon serves on, and its message may not be told
            incident = log_incident("the metrics could not be collected", error)
            return _response("500 Internal Server Error", f"incident {incident}\n".encode())
        return _response("200 OK", page, content_type=content_type, is_head=method == b"HEAD")

    def _find_page(self) -> tuple[bytes, str]:
        now = time.monotonic()
        if now - self._rendered >= self._keep_seconds:
            self._page, self._rendered = self._render(), now
        return self._page


async def _read_head(reader: asyncio.StreamReader) -> bytes | None:
    """Return a request up to its empty line; None if it is too long. A body would not be read."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        return None


def _response(
    status: str,
    body: bytes,
    fields: bytes = b"",
    *,
    content_type: str = "text/plain; charset=utf-8",
    is_head: bool = False,
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n"
    )
    return head.encode() + fields + b"\r\n" + (b"" if is_head else body)


def _bind(listener: Listener) -> socket.socket:
    host, _, port = listener.target.rpartition(":")
    host = host.strip("[]")
    # [::] stands for every address of this machine, also where there is no IPv6.
    everywhere = host == "::"
    dual = everywhere and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host and (dual or not everywhere) else socket.AF_INET
    host = "" if everywhere and not dual else host
    bound: socket.socket | None = None
    with contextlib.suppress(OSError):
        bound = socket.create_server((host, int(port)), family=family, backlog=16, dualstack_ipv6=dual)
    if bound is None:
        raise AddressInUseError(
            f"metrics.address has {listener.text}, which cannot be bound: another program listens there, or it is no "
            "address of this machine, or the service has no network (hearthd-local.service); change it, or set it to "
            '""'
        )
    return bound
