"""The matmuls of a decoder, in the order in which they run, and their sizes.

Knows shapes only. Called by `calibrate`, `sensitivity` and `search`.
"""

from __future__ import annotations

from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.recipe import MatMulName

__all__ = ["input_features", "matmul_names", "output_features"]


def matmul_names(spec: DecoderSpec) -> tuple[MatMulName, ...]:
    """Return every matmul; q, k and v are one, and so are gate and up."""
    kinds = ("qkv", "o", "gate_up", "down")
    layers = (MatMulName(kind, layer) for layer in range(spec.num_layers) for kind in kinds)
    return (*layers, MatMulName("lm_head"))


def input_features(spec: DecoderSpec, name: MatMulName) -> int:
    """Return the features of a matmul's input."""
    return {"o": spec.q_size, "down": spec.intermediate_size}.get(name.kind, spec.hidden_size)


def output_features(spec: DecoderSpec, name: MatMulName) -> int:
    """Return the features of a matmul's result."""
    return {
        "qkv": spec.q_size + 2 * spec.kv_size,
        "gate_up": 2 * spec.intermediate_size,
        "lm_head": spec.vocab_size,
    }.get(name.kind, spec.hidden_size)
