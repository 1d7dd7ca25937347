"""How much each matmul's coarser activations change what the decoder predicts.

One graph has every matmul in all of its int8 forms, switched by inputs; all in two terms, the most exact form, is the
base. Then one matmul at a time runs with a single term by row, and the mean Kullback-Leibler divergence from the base
is what that costs. Such small errors are independent of each other: the sum over matmuls predicts what all of them
together cost (SmolLM2-135M, all by row: sum 0.018, measured 0.014).

Knows graphs and sessions, no choice of forms. Called by `search`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.graph import GraphOptions, write_graph
from hearthd.build.decoder.linear import SECOND_TERM, switch_names
from hearthd.build.decoder.matmuls import matmul_names
from hearthd.build.decoder.recipe import MatMulForm, MatMulName, MatMulRecipe, Recipe
from hearthd.build.decoder.rounding import Rounding
from hearthd.build.decoder.weights import DecoderWeights, TensorSource
from hearthd.build.quantization.divergence import kl_divergence, log_softmax
from hearthd.build.quantization.documents import TokenDocument
from hearthd.build.quantization.session import GraphSession

__all__ = ["measure_sensitivity"]

# Tokens that every matmul is tried on, an equal share of each kind of text, in pieces of consecutive ones.
_TOKENS = 192
_PIECE = 32


def measure_sensitivity(
    source: TensorSource,
    spec: DecoderSpec,
    documents: Sequence[TokenDocument],
    *,
    directory: Path,
    rounding: Rounding,
    preset: NDArray[np.float32] | None,
    num_threads: int,
    report: Callable[[float], None],
) -> Mapping[MatMulName, float]:
    """Return the divergence, in nats, that each matmul causes when its activations have one term by row.

    directory: an empty one with room for 1 byte a weight. report: called with the share that is done, 0 to 1.
    """
    start = 0 if preset is None else preset.shape[3]
    token_ids = _mixture(documents, start)
    names = matmul_names(spec)
    recipe = Recipe({name: MatMulRecipe(MatMulForm.SWITCHED) for name in names}, rotated=spec.rotatable)
    weights = DecoderWeights(source, spec, rotated=recipe.rotated)
    options = GraphOptions(context_length=len(token_ids), int8_embedding=True)
    path = write_graph(directory, spec, weights, recipe, options, rounding)
    session = GraphSession(
        path.read_bytes(),
        spec,
        data_directory=directory,
        context_length=len(token_ids),
        num_threads=num_threads,
        preset=preset,
        prepacked=True,
    )
    base = log_softmax(session.run_once(token_ids, start=start, inputs=_switches(names, ())))
    found: dict[MatMulName, float] = {}
    for index, name in enumerate(names):
        logits = session.run_once(token_ids, start=start, inputs=_switches(names, (name,)))
        # float32 probabilities do not add up to quite 1: a divergence near zero may come out below it.
        found[name] = max(float(kl_divergence(base, log_softmax(logits)).mean()), 0.0)
        report((index + 1) / len(names))
    return found


def _mixture(documents: Sequence[TokenDocument], start: int) -> tuple[int, ...]:
    """Return one document of pieces of all kinds of text, begun as each of them begins."""
    kinds = list(dict.fromkeys(document.kind for document in documents))
    token_ids = list(documents[0].token_ids[:start])
    for kind in kinds:
        wanted = _TOKENS // len(kinds)
        for document in documents:
            if document.kind == kind and wanted > 0:
                begin = max(start, document.num_given)
                piece = document.token_ids[begin : begin + min(_PIECE, wanted)]
                token_ids += piece
                wanted -= len(piece)
    return tuple(token_ids)


def _switches(names: Sequence[MatMulName], single_term: Collection[MatMulName]) -> dict[str, NDArray[np.float32]]:
    inputs: dict[str, NDArray[np.float32]] = {}
    for name in names:
        step, second_term = switch_names(name)
        inputs[step] = np.zeros((), np.float32)
        inputs[second_term] = np.asarray(0.0 if name in single_term else SECOND_TERM, np.float32)
    return inputs
