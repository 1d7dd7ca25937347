"""How fast a runner reads prompts and writes tokens: one measurement each, as the engine would run it.

The model's own runs and nothing else: no sampling, no text, no gRPC. Knows no rounds, no statistics and no output.
Called by `suite`, which repeats these, and by `benchmarks/`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from hearthd.kv.kv_cache import Runner

__all__ = ["chunks", "decode", "fill", "prefill"]

Clock = Callable[[], float]


def chunks(num_tokens: int, chunk: int, min_run: int) -> Iterator[tuple[int, int]]:
    """Cut a prompt as `Engine` does: a rest that is too small for a run of its own goes along. Yields start, end."""
    start = 0
    while start < num_tokens:
        left = num_tokens - start
        size = left if left - chunk < min_run else chunk
        yield start, start + size
        start += size


def prefill(
    runner: Runner, num_tokens: int, *, chunk: int, slot: int = 0, seed: int = 0, clock: Clock = time.perf_counter
) -> float:
    """Run a prompt of random tokens from a slot's first position on. Returns seconds."""
    token_ids = np.random.default_rng(seed).integers(0, runner.vocab_size, (1, num_tokens))
    started = clock()
    for start, end in chunks(num_tokens, chunk, runner.min_run):
        runner.forward(token_ids[:, start:end], slot, np.asarray([start], np.int32))
    return clock() - started


def fill(runner: Runner, num_tokens: int, *, num_slots: int, chunk: int) -> None:
    """Give slots KV of num_tokens positions, so that decoding after them reads memory that was written.

    The kernel shows buffers that nobody has written to as one page of zeros, which stays in the first cache: at 2,000
    tokens of context attention over them looks faster than over real ones.
    """
    prefill(runner, num_tokens, chunk=chunk)
    for slot in range(1, num_slots):
        runner.copy_slot(0, slot, num_tokens)


def decode(
    runner: Runner,
    num_streams: int,
    context: int,
    *,
    num_steps: int,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> float:
    """Run steps of one token of each stream, in one batch, after `context` positions. Returns seconds of all steps.

    `fill` must have written these positions of the first num_streams slots.
    """
    # Not one token again and again: each reads another row of the embedding.
    token_ids = np.random.default_rng(seed).integers(0, runner.vocab_size, (num_steps, num_streams, 1))
    started = clock()
    for step in range(num_steps):
        runner.forward(token_ids[step], 0, np.full(num_streams, context + step, np.int32))
    return clock() - started
