"""How large each matmul's weights are, and how fine their int8 steps.

Reads one layer at a time, so that a checkpoint larger than the memory can be looked at. Knows weights, no graph and no
page. Called by `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.recipe import MatMulName
from hearthd.build.decoder.weights import DecoderWeights, Linear

__all__ = ["WeightRange", "weight_ranges"]


@dataclass(frozen=True, slots=True)
class WeightRange:
    """One matmul's weights, as the int8 graph has them before they are rounded.

    step: root mean square of the output features' int8 steps, each its largest magnitude / 127 (see `rounding`).
    """

    peak: float
    std: float
    step: float


def weight_ranges(
    weights: DecoderWeights, spec: DecoderSpec, report: Callable[[float], None]
) -> dict[MatMulName, WeightRange]:
    """Read every matmul. report: called with the share that is done, 0 to 1."""
    found: dict[MatMulName, WeightRange] = {}
    for index in range(spec.num_layers):
        for name, linear in _of_layer(weights, index):
            found[name] = _range(linear.weight)
        report((index + 1) / (spec.num_layers + 1))
    _, head = weights.head()
    found[MatMulName("lm_head")] = _range(head.weight)
    report(1.0)
    return found


def _of_layer(weights: DecoderWeights, index: int) -> Iterator[tuple[MatMulName, Linear]]:
    layer = weights.layer(index)
    of_kind = {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.gate_up, "down": layer.down}
    return ((MatMulName(kind, index), linear) for kind, linear in of_kind.items())


def _range(weight: NDArray[np.float32]) -> WeightRange:
    # Without a copy: a head may be a gigabyte.
    peaks = np.maximum(weight.max(axis=0), -weight.min(axis=0)).astype(np.float64)
    squares = np.einsum("ij,ij->j", weight, weight).astype(np.float64)
    mean = float(weight.mean(dtype=np.float64))
    variance = float(squares.sum()) / weight.size - mean**2
    return WeightRange(
        float(peaks.max()), float(np.sqrt(max(variance, 0.0))), float(np.sqrt(np.mean((peaks / 127) ** 2)))
    )
