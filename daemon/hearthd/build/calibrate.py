"""The recipe of a checkpoint: the form of each kind of matmul, and the scales that its inputs have on calibration text.

Runs the rotated decoder in float32 over the text and keeps each input's smallest and largest value. Behind a norm the
rotation has made the values so even that one fixed scale holds (`weights` says why): qkv and gate_up are static. The
inputs of o and of the LM head differ more from token to token, so each row has a scale of its own. The input of down
is a product of two activations: on a few tokens it peaks at thirty times what it is on all others, so it gets a second
term for what the first one rounds away.

Measured on SmolLM2-135M, mean KL to float32 on 5,940 held tokens, and x86-64 decode and prefill in tokens/s in one run:

    down in two terms, the others static      0.0114    106    1,506
    o by row too                              0.0082    110    1,537
    o and LM head by row (this)               0.0077    113    1,503
    all by row                                0.0059    110    1,405
    all in two terms: the weights' own error  0.0034    100    1,141

All by row cost next to nothing there; on Arm its further kernels count for more: one such matmul cost 17 % more on an
emulated Cortex-A72, 35 % on an A76.

Knows graphs and sessions, no files but those of its own graph. Called by `builder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hearthd.build.architecture import DecoderSpec
from hearthd.build.documents import TokenDocument
from hearthd.build.graph import GraphOptions, write_graph
from hearthd.build.recipe import MatMulForm, MatMulName, MatMulRecipe, Recipe
from hearthd.build.session import GraphSession
from hearthd.build.weights import DecoderWeights, TensorSource

__all__ = ["calibrate", "matmul_names"]

_FORMS: Mapping[str, MatMulForm] = {
    "qkv": MatMulForm.STATIC,
    "o": MatMulForm.PER_ROW,
    "gate_up": MatMulForm.STATIC,
    "down": MatMulForm.PER_ROW_TWO_TERMS,
    "lm_head": MatMulForm.PER_ROW,
}
# Room above the calibration text's extremes: other text reaches a little further, and what is beyond is clipped.
_MARGIN = 1.05


@dataclass(slots=True)
class _Range:
    low: float = 0.0
    high: float = 0.0

    def include(self, values: NDArray[np.float32]) -> None:
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

    def recipe(self) -> MatMulRecipe:
        """uint8 over the range with zero exactly representable."""
        low, high = self.low * _MARGIN, self.high * _MARGIN
        scale = (high - low) / 255 or 1.0
        return MatMulRecipe(MatMulForm.STATIC, scale, round(-low / scale))


def matmul_names(spec: DecoderSpec) -> tuple[MatMulName, ...]:
    """Return every matmul of a decoder, in the order in which it runs."""
    kinds = ("qkv", "o", "gate_up", "down")
    layers = (MatMulName(kind, layer) for layer in range(spec.num_layers) for kind in kinds)
    return (*layers, MatMulName("lm_head"))


def calibrate(
    source: TensorSource,
    spec: DecoderSpec,
    documents: Sequence[TokenDocument],
    *,
    directory: Path,
    preset: NDArray[np.float32] | None,
    num_threads: int,
    report: Callable[[float], None],
) -> Recipe:
    """Choose a recipe.

    directory: an empty one with room for 4 bytes a weight. preset: see `session.GraphSession`; its tokens are not
    calibrated for.

    report: called with the share that is done, 0 to 1.
    """
    start = 0 if preset is None else preset.shape[3]
    longest = max(len(document.token_ids) for document in documents)
    ranges = {name: _Range() for name in matmul_names(spec)}
    weights = DecoderWeights(source, spec, rotated=spec.rotatable)
    options = GraphOptions(context_length=longest, all_logits=True, capture=True)
    path = write_graph(directory, spec, weights, Recipe({}, rotated=spec.rotatable), options)
    session = GraphSession(
        path.read_bytes(),
        spec,
        data_directory=directory,
        context_length=longest,
        num_threads=num_threads,
        preset=preset,
    )
    for index, document in enumerate(documents):
        for _, captured in session.run(document.token_ids, start=start):
            for name, values in ranges.items():
                values.include(captured[str(name)])
        report((index + 1) / len(documents))
    return Recipe({name: _chosen(name, values) for name, values in ranges.items()}, rotated=spec.rotatable)


def _chosen(name: MatMulName, values: _Range) -> MatMulRecipe:
    form = _FORMS[name.kind]
    return values.recipe() if form is MatMulForm.STATIC else MatMulRecipe(form)
