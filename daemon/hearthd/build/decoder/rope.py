"""Rotary positions: the angles by which pairs of a head's features turn, for each position.

Reads a configuration's rope keys, in the spelling that `checkpoint.Checkpoint` promises. Knows no weights, no ONNX and
no architecture. Called by `layers` (reading) and `graph` (tables).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hearthd.build.decoder.config_values import MAX_POSITIONS, positive_number, whole_number
from hearthd.errors import BuildError

__all__ = ["Rope", "read_rope", "rope_tables"]

_ROPE_TYPES = ("default", "linear", "llama3", "longrope")


@dataclass(frozen=True, slots=True)
class Rope:
    """One table of angles; layers of different kinds may have different ones.

    inverse_frequencies: radians for each step of position, one for each pair of features that turns; a pair is feature
    i and feature i + rotary_dim / 2. magnitude: what the turned features are multiplied by besides. max_positions: how
    far this holds, None for as far as the checkpoint goes.
    """

    name: str
    inverse_frequencies: tuple[float, ...]
    magnitude: float = 1.0
    max_positions: int | None = None


def rope_tables(rope: Rope, context_length: int, num_pairs: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cosines and sines of every position's angles, each float32 (context_length, num_pairs).

    Pairs beyond those that turn keep their values: angle 0, magnitude 1.
    """
    num_turned = len(rope.inverse_frequencies)
    positions = np.arange(context_length, dtype=np.float64)
    angles = np.outer(positions, np.asarray(rope.inverse_frequencies, np.float64))
    cos = np.ones((context_length, num_pairs), np.float32)
    sin = np.zeros((context_length, num_pairs), np.float32)
    cos[:, :num_turned] = np.cos(angles) * rope.magnitude
    sin[:, :num_turned] = np.sin(angles) * rope.magnitude
    return cos, sin


def read_rope(config: Mapping[str, Any], rotary_dim: int, *, name: str = "rope") -> Rope:
    """Read `rope_theta` and `rope_scaling`.

    rotary_dim: how many features of each head turn. Scaling as in transformers' `modeling_rope_utils`; a GGUF file
    carries Llama 3's as divisors in `rope_freq_factors`. Raises BuildError for a kind that is not known.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise BuildError(f"rope_scaling is {ascii(scaling)[:60]}; an object is needed: config.json is damaged")
    theta = positive_number(scaling if "rope_theta" in scaling else config, "rope_theta", default=10_000.0)
    frequencies = theta ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    divisors = config.get("rope_freq_factors")
    if divisors is not None:
        return Rope(name, tuple(frequencies / _divisors(divisors, len(frequencies), "rope_freqs")))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "su":  # what Phi-3's first configurations call it
        kind = "longrope"
    if kind not in _ROPE_TYPES:
        raise BuildError(f"rope scaling {kind!r} is not supported; these are: {', '.join(_ROPE_TYPES)}")
    if kind == "longrope":
        return _longrope(frequencies, scaling, config, name)
    if kind == "linear":
        frequencies = frequencies / positive_number(scaling, "factor")
    elif kind == "llama3":
        frequencies = _llama3_frequencies(frequencies, scaling)
    return Rope(name, tuple(frequencies))


def _llama3_frequencies(frequencies: NDArray[np.float64], scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """Stretch long wavelengths by `factor`, keep short ones, blend between (Llama 3.1's rope scaling)."""
    factor, low, high, original = (
        positive_number(scaling, key)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if high <= low:
        raise BuildError(f"rope scaling llama3 has high_freq_factor {high}; more than low_freq_factor {low} is needed")
    wavelengths = 2 * math.pi / frequencies
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies


def _longrope(
    frequencies: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any], name: str
) -> Rope:
    """Phi-3's: short factors for a sequence up to the original context length, which are the ones that are taken.

    transformers goes over to the long factors in the middle of a sequence that outgrows the original length, which
    makes every key in the cache wrong, and one caller's length would change another one's angles. So the context ends
    where the short factors do: 4,096 tokens for Phi-3-mini-128k and Phi-4-mini, 270 MB of KV for the latter.
    """
    # Phi-3's configuration has it beside rope_scaling, and transformers prefers it there.
    name_of_original = "original_max_position_embeddings"
    has_it = config if config.get(name_of_original) is not None else scaling
    original = whole_number(has_it, name_of_original, largest=MAX_POSITIONS)
    divisors = _divisors(scaling.get("short_factor"), len(frequencies), "short_factor")
    extended = whole_number(config, "max_position_embeddings", largest=MAX_POSITIONS) / original
    factor = positive_number(scaling, "factor", default=extended)
    computed = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    magnitude = positive_number(scaling, "attention_factor", default=computed)
    return Rope(name, tuple(frequencies / divisors), magnitude, original)


def _divisors(values: object, size: int, name: str) -> NDArray[np.float64]:
    try:
        divisors = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise BuildError(f"{name} holds something else than numbers: the configuration is damaged") from error
    if divisors.shape != (size,) or not np.all(np.isfinite(divisors) & (divisors > 0)):
        raise BuildError(f"{name} has shape {divisors.shape} or values that are not positive; {(size,)} is needed")
    return divisors
