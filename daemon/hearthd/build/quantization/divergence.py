"""How far one next-token distribution is from another. Knows logits only. Called by `quality` and `sensitivity`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["kl_divergence", "log_softmax"]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return log probabilities, float32 (positions, vocab_size) as the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), np.float32)


def kl_divergence(expected: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the Kullback-Leibler divergence of `found` from `expected`, in nats, float64 (positions,).

    Both are log probabilities, float32 (positions, vocab_size).
    """
    return np.asarray(np.sum(np.exp(expected) * (expected - found), axis=1, dtype=np.float64))
