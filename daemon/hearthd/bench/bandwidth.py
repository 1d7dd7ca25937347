"""How fast this machine reads memory: what a decode step, which does little but read weights, could reach at best.

NumPy alone. Its reductions release the interpreter's lock, so each thread reduces a slice of its own. Which operation
reads fastest differs from processor to processor: three were within 15 % of each other, and of a loop in C with 512-bit
loads and prefetching, on the Xeon where this was written; all are tried, and the fastest counts.
Not used: sums of floats (pairwise, slower than memory on small cores) and dot products (BLAS has threads of its own).

The buffer is to be as large as the weights, and never small enough for the caches of a board. A server's processor may
have a last cache that is larger than the model (480 MB are said to be on that Xeon, shared with other virtual
machines); there 128, 256 and 1,024 MB gave the same within the noise, so memory is what was measured.

Knows no model. Called by `suite`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

__all__ = ["MIN_BUFFER_BYTES", "ReadBandwidth", "make_buffer"]

# Far more than the last cache of any board: 2 MB on a Raspberry Pi 5, 3 MB on an RK3588.
MIN_BUFFER_BYTES = 64 * 2**20
_PASSES = 2
_REDUCTIONS: tuple[np.ufunc, ...] = (np.add, np.bitwise_or, np.maximum)


def make_buffer(num_bytes: int) -> NDArray[np.int64]:
    """Return a buffer of at least this size. Written to: memory that never was is one page of zeros, in a cache."""
    return np.ones(-(-max(num_bytes, MIN_BUFFER_BYTES) // 8), np.int64)


class ReadBandwidth:
    """Reads a buffer with num_threads threads. Use as a context manager."""

    def __init__(
        self, buffer: NDArray[np.int64], num_threads: int, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._num_bytes = buffer.nbytes
        self._slices = np.array_split(buffer, num_threads)
        self._pool = ThreadPoolExecutor(num_threads)
        self._clock = clock

    def __enter__(self) -> ReadBandwidth:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def measure(self) -> float:
        """Read the buffer some times; returns bytes per second of the fastest pass."""
        return self._num_bytes / min(self._pass(reduction) for reduction in _REDUCTIONS for _ in range(_PASSES))

    def _pass(self, reduction: np.ufunc) -> float:
        started = self._clock()
        for _ in self._pool.map(reduction.reduce, self._slices):
            pass
        return self._clock() - started
