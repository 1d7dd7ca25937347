"""Pure functions on logits, one for each sampling option.

Some return changed logits, the others the places that may still be chosen, so that the next one has less to do.
Letters: V is the vocabulary's size, N the number of tokens still to choose from. Knows no request. Called by
`sampling`; `engine` calls `logprobs`.
"""

import math

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FloatArray",
    "apply_answer_penalties",
    "apply_repetition_penalty",
    "apply_temperature",
    "draw",
    "logprobs",
    "min_p_places",
    "top_k_places",
    "top_p_places",
]

FloatArray = NDArray[np.float32] | NDArray[np.float64]


def apply_repetition_penalty(logits: NDArray[np.float32], ids: NDArray[np.intp], penalty: float) -> NDArray[np.float32]:
    """Make tokens that were seen less likely: divide their positive and multiply their negative logits.

    logits: float32 (V,); ids: (N,) without duplicates. Returns a new array (V,). Source: Keskar et al. 2019, CTRL, 4.1.
    """
    seen = logits[ids].astype(np.float64)
    result = logits.copy()
    with np.errstate(over="ignore"):
        changed = np.where(seen > 0, seen / penalty, seen * penalty)
    # A tiny penalty is within its range; it must not make infinities, which would look like a broken model.
    result[ids] = np.minimum(changed, np.finfo(np.float32).max)
    return result


def apply_answer_penalties(
    logits: NDArray[np.float32],
    ids: NDArray[np.intp],
    counts: NDArray[np.int64],
    presence_penalty: float,
    frequency_penalty: float,
) -> NDArray[np.float32]:
    """Subtract presence_penalty once, and frequency_penalty for each time, from the tokens that the answer has.

    logits: float32 (V,); ids: (N,) without duplicates; counts: (N,), how often each stands in the answer, 0 allowed.
    Returns a new array (V,).
    """
    result = logits.copy()
    result[ids] -= (presence_penalty * (counts > 0) + frequency_penalty * counts).astype(np.float32)
    return result


def top_k_places(logits: FloatArray, k: int) -> NDArray[np.intp]:
    """Find the k likeliest; of equally likely ones the first.

    logits: (N,), 1 <= k. Returns min(k, N) places, ascending.
    """
    if k >= logits.size:
        return np.arange(logits.size)
    lowest_kept = np.partition(logits, -k)[-k]
    above = np.flatnonzero(logits > lowest_kept)
    tied = np.flatnonzero(logits == lowest_kept)[: k - above.size]
    return np.sort(np.concatenate((above, tied)))


def apply_temperature(logits: FloatArray, temperature: float) -> NDArray[np.float64]:
    """Divide by the temperature, over 0.

    logits: (N,), their maximum finite. Returns float64 (N,), shifted so that the maximum is 0: a tiny temperature
    then leads to -inf for the others, never to inf or NaN. The shift does not change the probabilities.
    """
    shifted = np.subtract(logits, logits.max(), dtype=np.float64)
    with np.errstate(over="ignore"):
        scaled: NDArray[np.float64] = shifted / temperature
    return scaled


def top_p_places(logits: FloatArray, top_p: float) -> NDArray[np.intp]:
    """Find the fewest likeliest whose probabilities add up to top_p; of equally likely ones the first.

    logits: (N,); 0 < top_p <= 1. Returns at least one place, ascending. Source: Holtzman et al. 2019, 3.1.
    """
    weights = _softmax_weights(logits)
    total = float(weights.sum())
    # All that lie under this floor add up to less than 1 - top_p of the total, so none of them is needed: what is left
    # to sort is a small part of a vocabulary. The half is a margin for rounding.
    floor = 0.5 * (1.0 - top_p) * total / weights.size
    likely = np.flatnonzero(weights >= floor)
    order = likely[np.argsort(-weights[likely], kind="stable")]
    num_kept = int(np.searchsorted(np.cumsum(weights[order]), top_p * total)) + 1
    return np.sort(order[:num_kept])


def min_p_places(logits: FloatArray, min_p: float) -> NDArray[np.intp]:
    """Find those at least min_p times as likely as the likeliest.

    logits: (N,); 0 < min_p <= 1. Returns at least one place, ascending. Source: Nguyen et al. 2024, 3.
    """
    return np.flatnonzero(logits >= logits.max() + math.log(min_p))


def logprobs(logits: NDArray[np.float32], token_id: int, num_top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log probabilities of the model itself, before any sampling option.

    logits: float32 (V,), raw. Returns that of token_id, and (id, log probability) of the num_top likeliest, likeliest
    first, of equally likely ones the lower id.
    """
    # The maximum's own term is 1, so the logarithm of the sum is at least 0, and no log probability over 0.
    shifted = np.subtract(logits, logits.max(), dtype=np.float64)
    normaliser = math.log(float(np.exp(shifted).sum()))
    if num_top == 0:
        return float(shifted[token_id]) - normaliser, ()
    places = top_k_places(logits, num_top)
    places = places[np.argsort(-shifted[places], kind="stable")]
    top = tuple((int(place), float(shifted[place]) - normaliser) for place in places)
    return float(shifted[token_id]) - normaliser, top


def draw(logits: FloatArray, uniform: float) -> int:
    """Choose a place by its probability.

    logits: (N,), their maximum finite; uniform: a random number, 0 <= uniform < 1. Places of -inf are never chosen.
    """
    cumulative = np.cumsum(_softmax_weights(logits))
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    if place == cumulative.size:  # the product was rounded up to the total
        place = int(np.searchsorted(cumulative, cumulative[-1]))
    return place


def _softmax_weights(logits: FloatArray) -> NDArray[np.float64]:
    # Probabilities before the division by their sum, which no caller needs.
    weights: NDArray[np.float64] = np.exp(np.subtract(logits, logits.max(), dtype=np.float64))
    return weights
