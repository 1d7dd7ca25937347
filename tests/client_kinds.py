"""Both kinds of client behind one face, so that each promise is tested once and kept by both.

`Blocking` runs an AsyncClient's coroutines on an event loop of its own, one after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import hearth

Connect = Callable[..., Any]
KINDS: dict[str, Connect] = {}


class Blocking:
    """An AsyncClient, used like a Client."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = hearth.AsyncClient(*arguments, **options)

    def __enter__(self) -> Blocking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        self._runner.close()

    def close(self) -> None:
        self._runner.run(self._client.aclose())

    def stream(self, *arguments: Any, **options: Any) -> BlockingStream:
        return BlockingStream(self._runner, self._client.stream(*arguments, **options))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *arguments, **options: self._runner.run(method(*arguments, **options))


class BlockingStream:
    """An AsyncChatStream, used like a ChatStream."""

    def __init__(self, runner: asyncio.Runner, stream: hearth.AsyncChatStream) -> None:
        self._runner = runner
        self._stream = stream

    def __enter__(self) -> BlockingStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[hearth.Delta]:
        return self

    def __next__(self) -> hearth.Delta:
        async def step() -> hearth.Delta | None:
            return await anext(self._stream, None)

        if (delta := self._runner.run(step())) is None:
            raise StopIteration
        return delta

    def close(self) -> None:
        self._runner.run(self._stream.aclose())

    def read(self) -> hearth.Answer:
        return self._runner.run(self._stream.read())

    @property
    def text(self) -> str:
        return self._stream.text

    @property
    def answer(self) -> hearth.Answer:
        return self._stream.answer


KINDS.update(threads=hearth.Client, asyncio=Blocking)
