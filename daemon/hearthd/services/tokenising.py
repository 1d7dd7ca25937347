"""Texts become token ids beside the event loop, which a quarter of a megabyte would hold up for long.

Two threads: one long text does not keep a short one waiting, and the inference thread still gets its share. A caller
gets no more than both: whatever else it has sent waits outside of their queue, so that nobody waits for more than one
text of somebody else's. Knows no tokenizer. Made by `life.parts`, used by `services`.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar
from weakref import WeakValueDictionary

__all__ = ["Tokenising"]

_NUM_THREADS: Final = 2

_Result = TypeVar("_Result")


class Tokenising:
    """The threads, and each caller's turns at them. Of the event loop."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenise")
        # Kept by those who wait or work, and by nobody else.
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, account: str, function: Callable[[], _Result]) -> _Result:
        """Call a function in one of the threads. account: the caller's."""
        turns = self._turns.get(account)
        if turns is None:
            self._turns[account] = turns = asyncio.Semaphore(_NUM_THREADS)
        async with turns:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def close(self) -> None:
        """Begin nothing more."""
        self._executor.shutdown(wait=False, cancel_futures=True)
