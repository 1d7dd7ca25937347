"""The synchronous client.

Only moves bytes and waits: requests, responses, errors and the decision about another attempt are made in modules that
`_async_client` uses as well. The two are kept parallel, method by method.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from hearth import _operations
from hearth._channel import call_metadata
from hearth._chat import ChatProgress
from hearth._connection import Connection
from hearth._errors import CallCancelledError, HearthError
from hearth._grpc import grpc
from hearth._operations import Operation
from hearth._patience import Patience
from hearth._requests import chat_request
from hearth._settings import check_seconds, read_settings
from hearth._status import DaemonStatus
from hearth._translate import RpcFailure
from hearth._values import Answer, ChatOptions, ClientOptions, Delta, Health, Message, ModelInfo, Queued

_T = TypeVar("_T")


class Client:
    """A connection to a daemon, made when it is first needed. Any thread may use it.

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
        self._connection = Connection(self._settings)
        self._stop = Stop()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where the daemon is looked for."""
        return self._connection.address

    def close(self) -> None:
        """Close the connection. Calls that run end with CallCancelledError."""
        self._stop.set()
        self._connection.close()

    def chat(
        self, messages: str | Iterable[Message], *, timeout: float | None = None, **options: Unpack[ChatOptions]
    ) -> Answer:
        """Answer a conversation; a str is one message of the user. Returns the whole answer.

        `timeout` is in seconds and covers everything, waiting too; None takes the client's.
        """
        with self.stream(messages, timeout=timeout, **options) as stream:
            return stream.read()

    def stream(
        self,
        messages: str | Iterable[Message],
        *,
        timeout: float | None = None,
        on_queued: Callable[[Queued], None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> "ChatStream":
        """Answer a conversation piece by piece. The call starts, and its time runs, when the first piece is asked for.

        `on_queued` hears the chat's place in the queue while it waits, at each change.
        """
        request = chat_request(messages, options).SerializeToString()
        seconds = self._settings.timeout if timeout is None else check_seconds("timeout", timeout)

        def begin() -> ChatProgress:
            return ChatProgress(self._patience(seconds), on_queued)

        def open_call(remaining: float | None) -> Any:
            self._raise_if_closed()
            try:
                return self._connection.channel(remaining).unary_stream(_operations.CHAT)(
                    request, timeout=remaining, metadata=self._metadata
                )
            except ValueError:
                self._raise_if_closed()
                raise

        return ChatStream(begin, open_call, Stop(parent=self._stop), self._connection.explain)

    def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """List the models that the daemon serves, the default one first."""
        return self._call(_operations.list_models(), timeout)

    def model(self, name: str | None = None, *, timeout: float | None = None) -> ModelInfo:
        """Describe a model; None is the default one."""
        return self._call(_operations.get_model(name), timeout)

    def count_tokens(
        self, text: str | Iterable[Message], *, model: str | None = None, timeout: float | None = None
    ) -> int:
        """Count the tokens of a text alone, or of a conversation as the model gets it."""
        return self._call(_operations.count_tokens(text, model), timeout)

    def status(self, *, timeout: float | None = None) -> DaemonStatus:
        """Ask how the daemon is now. Does not wait for one that is not there."""
        return self._call(_operations.get_status(), timeout)

    def health(self, *, timeout: float | None = None) -> Health:
        """Ask whether the daemon answers chats now. Does not wait for one that is not there."""
        return self._call(_operations.check_health(), timeout)

    def _call(self, operation: Operation[_T], timeout: float | None) -> _T:
        seconds = self._settings.call_timeout if timeout is None else check_seconds("timeout", timeout)
        patience = self._patience(seconds, operation.waits_for_ready)
        while True:
            self._raise_if_closed()
            try:
                data: bytes = self._connection.channel(patience.remaining()).unary_unary(operation.method)(
                    operation.request, timeout=patience.remaining(), metadata=self._metadata
                )
            except grpc.RpcError as error:
                self._raise_if_closed()
                failure = self._connection.explain(error)
                delay = patience.delay_after(failure)
                if delay is None:
                    raise failure from error
            except ValueError:
                # What gRPC says when another thread has just closed the channel.
                self._raise_if_closed()
                raise
            else:
                return operation.parse(data)
            self._stop.wait(delay)

    def _patience(self, timeout: float, waits_for_ready: bool = True) -> Patience:
        return Patience(
            timeout=timeout,
            ready_timeout=self._settings.ready_timeout if waits_for_ready else 0,
            max_retries=self._settings.max_retries,
            on_failure=self._connection.note,
        )

    def _raise_if_closed(self) -> None:
        if self._stop.is_set:
            raise CallCancelledError("the client is closed")


class ChatStream:
    """An answer on its way: iterate to get it piece by piece.

    Leaving early, by `close`, by the end of a `with` block, or by dropping the stream, cancels the call, and the daemon
    stops working on it. One thread at a time iterates; any thread, or a signal handler, may close.
    """

    def __init__(
        self,
        begin: Callable[[], ChatProgress],
        open_call: Callable[[float | None], Any],
        stop: "Stop",
        explain: Callable[[RpcFailure], HearthError],
    ) -> None:
        """Made by `Client.stream`."""
        self._begin = begin
        self._open_call = open_call
        self._stop = stop
        self._explain = explain
        self._progress: ChatProgress | None = None
        self._call: Any = None
        self._answer: Answer | None = None
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        if self._answer is not None or self._is_closed:
            raise StopIteration
        try:
            delta = self._next_delta()
        except BaseException:
            self.close()
            raise
        if delta is None:
            raise StopIteration
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

    def read(self) -> Answer:
        """Take what is still to come. Returns the whole answer."""
        for _ in self:
            pass
        if self._answer is None:
            raise CallCancelledError("the stream was closed before its end")
        return self._answer

    def close(self) -> None:
        """Cancel the call if it still runs. What was received stays readable."""
        self._is_closed = True
        self._stop.set()
        if self._call is not None:
            self._call.cancel()

    def _next_delta(self) -> Delta | None:
        """More of the answer; None at its end."""
        if self._progress is None:
            self._progress = self._begin()
        while True:
            try:
                if self._call is None:
                    self._call = self._open_call(self._progress.remaining())
                # Closed while it waited, or while the call was being opened.
                if self._stop.is_set:
                    self._call.cancel()
                data: bytes | None = next(self._call, None)
            except grpc.RpcError as error:
                self._call = None
                # gRPC words a closed channel differently at each stage of a call; that we closed it, we know.
                if self._stop.is_set:
                    raise CallCancelledError("the call was cancelled: it was closed before its end") from error
                failure = self._explain(error)
                delay = self._progress.delay_after(failure)
                if delay is None:
                    raise failure from error
                self._stop.wait(delay)
                continue
            if data is None:
                self._answer = self._progress.end()
                return None
            if (delta := self._progress.accept(data)) is not None:
                return delta


class Stop:
    """A flag that ends waits.

    threading.Event would deadlock if a signal handler set it in the very thread that waits for it: its lock is not
    reentrant, that of a Condition is.
    """

    def __init__(self, parent: "Stop | None" = None) -> None:
        """One with a parent is set as soon as the parent is."""
        self._parent = parent
        self._condition: threading.Condition = parent._condition if parent else threading.Condition()
        self._is_set = False

    @property
    def is_set(self) -> bool:
        """Whether `set` was called, here or at the parent."""
        return self._is_set or (self._parent is not None and self._parent.is_set)

    def set(self) -> None:
        """End the waits, those of the children too."""
        self._is_set = True
        with self._condition:
            self._condition.notify_all()

    def wait(self, seconds: float) -> None:
        """Return after `seconds`, or as soon as the flag is set."""
        with self._condition:
            self._condition.wait_for(lambda: self.is_set, seconds)
