"""The client for asyncio.

Only moves bytes and waits, as `_client` does, with which it shares requests, responses, errors and the decision about
another attempt. The two are kept parallel, method by method.
"""

# A `timeout` goes to gRPC, which tells the daemon the deadline; asyncio.timeout could not.
# ruff: noqa: ASYNC109

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from hearth import _operations
from hearth._channel import call_metadata
from hearth._chat import ChatProgress
from hearth._connection import AsyncConnection
from hearth._errors import CallCancelledError
from hearth._grpc import grpc
from hearth._operations import Operation
from hearth._patience import Patience
from hearth._requests import chat_request
from hearth._settings import check_seconds, read_settings
from hearth._status import DaemonStatus
from hearth._values import Answer, ChatOptions, ClientOptions, Delta, Health, Message, ModelInfo, Queued

_T = TypeVar("_T")


class AsyncClient:
    """A connection to a daemon, made when it is first needed. Belongs to the event loop that first uses it.

    `address` is `unix:///path`, `host:port` or `[IPv6]:port`. None: HEARTH_ADDRESS, else the daemon that this user is
    paired with, else the socket of this user's or the system's daemon, the first where somebody listens, else, where
    there is no socket, 127.0.0.1:50051. The daemon is looked for anew whenever it is not there; after a socket it
    is looked for at sockets alone, since anybody on this machine may listen on a port that is free. `options`: see
    `ClientOptions`.

    Raises ConfigurationError if any of them cannot be used. Every call may raise the other errors of this package.
    """

    def __init__(self, address: str | None = None, **options: Unpack[ClientOptions]) -> None:
        self._settings = read_settings(address, options, os.environ)
        self._metadata = call_metadata(self._settings)
        self._connection = AsyncConnection(self._settings)
        self._is_closed = False
        # Small calls that wait for their next attempt; closing the channel would not reach them.
        self._waiting: set[asyncio.Event] = set()
        # Nor does it end every stream in older versions of grpc.aio.
        self._streams: weakref.WeakSet[AsyncChatStream] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def address(self) -> str:
        """Where the daemon is looked for."""
        return self._connection.address

    async def aclose(self) -> None:
        """Close the connection. Calls that run end with CallCancelledError."""
        self._is_closed = True
        for wakeup in self._waiting:
            wakeup.set()
        for stream in list(self._streams):
            stream._cancel()
        await self._connection.close()

    async def chat(
        self, messages: str | Iterable[Message], *, timeout: float | None = None, **options: Unpack[ChatOptions]
    ) -> Answer:
        """Answer a conversation; a str is one message of the user. Returns the whole answer.

        `timeout` is in seconds and covers everything, waiting too; None takes the client's.
        """
        async with self.stream(messages, timeout=timeout, **options) as stream:
            return await stream.read()

    def stream(
        self,
        messages: str | Iterable[Message],
        *,
        timeout: float | None = None,
        on_queued: Callable[[Queued], None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> "AsyncChatStream":
        """Answer a conversation piece by piece. The call starts, and its time runs, when the first piece is asked for.

        `on_queued` hears the chat's place in the queue while it waits, at each change.
        """
        request = chat_request(messages, options).SerializeToString()
        seconds = self._settings.timeout if timeout is None else check_seconds("timeout", timeout)

        def begin() -> ChatProgress:
            return ChatProgress(self._patience(seconds), on_queued)

        async def open_call(remaining: float | None) -> Any:
            channel = await self._channel(remaining)
            return channel.unary_stream(_operations.CHAT)(request, timeout=remaining, metadata=self._metadata)

        stream = AsyncChatStream(self, begin, open_call)
        self._streams.add(stream)
        return stream

    async def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """List the models that the daemon serves, the default one first."""
        return await self._call(_operations.list_models(), timeout)

    async def model(self, name: str | None = None, *, timeout: float | None = None) -> ModelInfo:
        """Describe a model; None is the default one."""
        return await self._call(_operations.get_model(name), timeout)

    async def count_tokens(
        self, text: str | Iterable[Message], *, model: str | None = None, timeout: float | None = None
    ) -> int:
        """Count the tokens of a text alone, or of a conversation as the model gets it."""
        return await self._call(_operations.count_tokens(text, model), timeout)

    async def status(self, *, timeout: float | None = None) -> DaemonStatus:
        """Ask how the daemon is now. Does not wait for one that is not there."""
        return await self._call(_operations.get_status(), timeout)

    async def health(self, *, timeout: float | None = None) -> Health:
        """Ask whether the daemon answers chats now. Does not wait for one that is not there."""
        return await self._call(_operations.check_health(), timeout)

    async def _call(self, operation: Operation[_T], timeout: float | None) -> _T:
        seconds = self._settings.call_timeout if timeout is None else check_seconds("timeout", timeout)
        patience = self._patience(seconds, operation.waits_for_ready)
        while True:
            try:
                channel = await self._channel(patience.remaining())
                data: bytes = await channel.unary_unary(operation.method)(
                    operation.request, timeout=patience.remaining(), metadata=self._metadata
                )
            except grpc.RpcError as error:
                failure = self._connection.explain(error)
                delay = patience.delay_after(failure)
                if delay is None:
                    raise failure from error
            except asyncio.CancelledError:
                self._raise_if_closed_beside_task()
                raise
            else:
                return operation.parse(data)
            await self._wait(asyncio.Event(), delay)

    async def _wait(self, wakeup: asyncio.Event, seconds: float) -> None:
        """Return after `seconds`, or as soon as `wakeup` is set or the client is closed."""
        # Closed between the failure and this: nobody would wake it.
        if self._is_closed:
            return
        self._waiting.add(wakeup)
        try:
            async with asyncio.timeout(seconds):
                await wakeup.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(wakeup)

    def _patience(self, timeout: float, waits_for_ready: bool = True) -> Patience:
        return Patience(
            timeout=timeout,
            ready_timeout=self._settings.ready_timeout if waits_for_ready else 0,
            max_retries=self._settings.max_retries,
            on_failure=self._connection.note,
        )

    async def _channel(self, seconds: float | None) -> Any:
        self._raise_if_closed()
        channel = await self._connection.channel(seconds)
        # Closed while a paired daemon was looked for.
        self._raise_if_closed()
        return channel

    def _raise_if_closed(self) -> None:
        if self._is_closed:
            raise CallCancelledError("the client is closed")

    def _raise_if_closed_beside_task(self) -> None:
        """Raise CallCancelledError if it is the client's closing, and not the task's own end, that cancelled a call."""
        task = asyncio.current_task()
        if self._is_closed and not (task and task.cancelling()):
            raise CallCancelledError("the client is closed")


class AsyncChatStream:
    """An answer on its way: iterate to get it piece by piece.

    Leaving early, by `aclose`, by the end of an `async with` block, by the end of the task, or by dropping the stream,
    cancels the call, and the daemon stops working on it. One task at a time iterates; any task may close.
    """

    def __init__(
        self,
        client: AsyncClient,
        begin: Callable[[], ChatProgress],
        open_call: Callable[[float | None], Awaitable[Any]],
    ) -> None:
        """Made by `AsyncClient.stream`."""
        self._client = client
        self._begin = begin
        self._open_call = open_call
        self._progress: ChatProgress | None = None
        self._call: Any = None
        self._responses: Any = None
        self._answer: Answer | None = None
        self._is_closed = False
        self._wakeup = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # gRPC's own tasks keep a call alive that nobody reads any more; a synchronous one ends by itself.
        if getattr(self, "_call", None) is not None and self._answer is None:
            self._call.cancel()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if self._answer is not None or self._is_closed:
            raise StopAsyncIteration
        try:
            delta = await self._next_delta()
        except BaseException:
            self._cancel()
            raise
        if delta is None:
            raise StopAsyncIteration
        return delta

    @property
    def text(self) -> str:
        """The answer as far as it was received."""
        return self._progress.text if self._progress else ""

    @property
    def answer(self) -> Answer:
        """The whole answer, with usage and timings, once the iteration is over. RuntimeError before."""
        if self._answer is None:
            raise RuntimeError("the answer is not complete: iterate the stream to its end first")
        return self._answer

    async def read(self) -> Answer:
        """Take what is still to come. Returns the whole answer."""
        async for _ in self:
            pass
        if self._answer is None:
            raise CallCancelledError("the stream was closed before its end")
        return self._answer

    async def aclose(self) -> None:
        """Cancel the call if it still runs. What was received stays readable."""
        self._cancel()
        # Not while another task is in the middle of it: that one ends by the cancellation.
        if self._responses is not None and not self._responses.ag_running:
            await self._responses.aclose()

    async def _next_delta(self) -> Delta | None:
        """More of the answer; None at its end."""
        if self._progress is None:
            self._progress = self._begin()
        while True:
            if self._is_closed:
                raise CallCancelledError("the stream was closed before its end")
            try:
                if self._call is None:
                    self._call = await self._open_call(self._progress.remaining())
                    # Closed meanwhile: `_cancel` knew of no call.
                    if self._is_closed:
                        self._call.cancel()
                    # Not `read`: it drops the responses that have come when the call is over before they were read.
                    self._responses = aiter(self._call)
                data: bytes | None = await anext(self._responses, None)
            except grpc.RpcError as error:
                self._call = self._responses = None
                failure = self._client._connection.explain(error)
                delay = self._progress.delay_after(failure)
                if delay is None:
                    raise failure from error
                await self._client._wait(self._wakeup, delay)
                continue
            except asyncio.CancelledError:
                self._raise_if_closed_beside_task()
                raise
            if data is None:
                self._answer = self._progress.end()
                return None
            if (delta := self._progress.accept(data)) is not None:
                return delta

    def _raise_if_closed_beside_task(self) -> None:
        task = asyncio.current_task()
        if self._is_closed and not (task and task.cancelling()):
            raise CallCancelledError("the stream was closed before its end")
        self._client._raise_if_closed_beside_task()

    def _cancel(self) -> None:
        self._is_closed = True
        self._wakeup.set()
        if self._call is not None:
            self._call.cancel()
