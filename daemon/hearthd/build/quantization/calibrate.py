"""What goes into each matmul, and into the KV cache, on calibration text: how large, and how features move together.

Runs the decoder in float32 over the text, its residual stream rotated where that is possible (`weights` says why).
Knows graphs and sessions, no files but those of its own graph and the moments. Called by `search`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.graph import GraphOptions, write_graph
from hearthd.build.decoder.matmuls import input_features, matmul_names
from hearthd.build.decoder.recipe import MatMulName, Recipe
from hearthd.build.decoder.weights import DecoderWeights, TensorSource
from hearthd.build.quantization.documents import TokenDocument
from hearthd.build.quantization.session import GraphSession

__all__ = ["Calibration", "InputStatistics", "calibrate"]

# What the moments of the matmuls that one pass over the text gathers may take: a board of 2 GB has room for it. More
# matmuls mean more passes.
_MOMENTS_BYTES = 448 * 2**20
# Tokens' inputs that are kept before they are multiplied: a wide product instead of many narrow ones.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """A matmul's input on calibration text.

    peak: the largest magnitude. row_peak_rms: the root mean square of each token's own largest magnitude, at most
    `peak`; the nearer to it, the better a fixed scale suits.
    """

    peak: float
    row_peak_rms: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a decoder's numbers look like on calibration text.

    kv_peaks: the largest magnitude of each channel of keys and values, the preset's included, float32 (layers, 2,
    kv_heads, padded_head_dim).
    """

    inputs: Mapping[MatMulName, InputStatistics]
    kv_peaks: NDArray[np.float32]


@dataclass(slots=True)
class _Gathered:
    """Sums over tokens."""

    peak: float = 0.0
    row_peak_squares: float = 0.0
    num_tokens: int = 0
    products: NDArray[np.float32] | None = None
    waiting: list[NDArray[np.float32]] = field(default_factory=list)

    def include(self, values: NDArray[np.float32]) -> None:
        """values: (tokens, features)."""
        peaks = np.abs(values).max(axis=1)
        self.peak = max(self.peak, float(peaks.max()))
        self.row_peak_squares += float(np.sum(peaks.astype(np.float64) ** 2))
        self.num_tokens += len(values)
        self.waiting.append(values)
        if sum(map(len, self.waiting)) >= _ROWS:
            self._multiply()

    def _multiply(self) -> None:
        rows = np.concatenate(self.waiting)
        product = rows.T @ rows
        self.products = product if self.products is None else self.products + product
        self.waiting.clear()

    def moments(self) -> NDArray[np.float32]:
        """Return the mean of x x', float32 (features, features)."""
        if self.waiting:
            self._multiply()
        assert self.products is not None, "no token was included"
        return self.products / np.float32(self.num_tokens)

    def statistics(self) -> InputStatistics:
        return InputStatistics(self.peak, float(np.sqrt(self.row_peak_squares / self.num_tokens)))


def calibrate(
    source: TensorSource,
    spec: DecoderSpec,
    documents: Sequence[TokenDocument],
    *,
    directory: Path,
    moments_directory: Path,
    preset: NDArray[np.float32] | None,
    num_threads: int,
    report: Callable[[float], None],
) -> Calibration:
    """Gather each input's statistics, and write its moments as `rounding.ErrorFeedback` reads them.

    directory: an empty one with room for 4 bytes a weight. preset: see `session.GraphSession`; its tokens are not
    calibrated for. report: called with the share that is done, 0 to 1.
    """
    start = 0 if preset is None else preset.shape[3]
    longest = max(len(document.token_ids) for document in documents)
    recipe = Recipe({}, rotated=spec.rotatable)
    weights = DecoderWeights(source, spec, rotated=recipe.rotated)
    options = GraphOptions(context_length=longest, capture=True)
    path = write_graph(directory, spec, weights, recipe, options)
    session = GraphSession(
        path.read_bytes(),
        spec,
        data_directory=directory,
        context_length=longest,
        num_threads=num_threads,
        preset=preset,
    )
    statistics: dict[MatMulName, InputStatistics] = {}
    kv_peaks = np.zeros((spec.num_layers, 2, spec.num_kv_heads, spec.padded_head_dim), np.float32)
    passes = list(_passes(spec))
    for at, names in enumerate(passes):
        gathered = {str(name): _Gathered() for name in names}
        for index, document in enumerate(documents):
            for _, captured in session.run(document.token_ids, start=start, captures=tuple(gathered)):
                for matmul, values in captured.items():
                    gathered[matmul].include(values)
            np.maximum(kv_peaks, session.kv_peaks(len(document.token_ids)), out=kv_peaks)
            report((at + (index + 1) / len(documents)) / len(passes))
        for name in names:
            one = gathered.pop(str(name))
            np.save(moments_directory / f"{name}.npy", one.moments())
            statistics[name] = one.statistics()
    return Calibration(statistics, kv_peaks)


def _passes(spec: DecoderSpec) -> Iterator[tuple[MatMulName, ...]]:
    """Divide the matmuls so that the moments of each part fit."""
    names: list[MatMulName] = []
    size = 0
    for name in matmul_names(spec):
        needed = 4 * input_features(spec, name) ** 2
        if names and size + needed > _MOMENTS_BYTES:
            yield tuple(names)
            names, size = [], 0
        names.append(name)
        size += needed
    yield tuple(names)
