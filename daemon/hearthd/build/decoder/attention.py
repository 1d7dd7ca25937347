"""Attention over the static KV buffers: norms of heads where an architecture has them, then one fused operator.

Knows ONNX Runtime's GroupQueryAttention and what its CPU kernel refuses, no matmuls. Called by `graph`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.nodes import MICROSOFT, Nodes
from hearthd.build.decoder.weights import LayerWeights

__all__ = ["add_attention"]


def add_attention(nodes: Nodes, spec: DecoderSpec, index: int, qkv: str, weights: LayerWeights) -> str:
    """Add layer `index`'s attention, rotary positions inside; returns its result, (B, S, q_size).

    The constants `<rope>.cos` and `<rope>.sin` of the layer's rope are there already.
    """
    path = f"layers.{index}"
    query, key, value = qkv, "", ""
    if weights.q_norm is not None and weights.k_norm is not None:
        query, key, value = _normed_heads(nodes, spec, path, qkv, weights.q_norm, weights.k_norm)
    layer = spec.layers[index]
    tables = [] if layer.rope is None else [f"{layer.rope.name}.cos", f"{layer.rope.name}.sin"]
    output = f"{path}.attention"
    nodes.nodes(
        "GroupQueryAttention",
        [
            *(query, key, value),
            *(f"past_key.{index}", f"past_value.{index}", "seqlens_k", "total_sequence_length"),
            *tables,
        ],
        [output, f"present_key.{index}", f"present_value.{index}"],
        domain=MICROSOFT,
        num_heads=spec.num_heads,
        kv_num_heads=spec.num_kv_heads,
        do_rotary=int(layer.rope is not None),
        rotary_interleaved=0,
        scale=spec.attention_scale,
        # How many tokens a token sees, itself included, in this kernel as in transformers; -1 for all.
        local_window_size=layer.window or -1,
    )
    return output


def _normed_heads(
    nodes: Nodes, spec: DecoderSpec, path: str, qkv: str, q_norm: NDArray[np.float32], k_norm: NDArray[np.float32]
) -> tuple[str, str, str]:
    """Divide q, k and v, and normalise each head of q and k.

    GroupQueryAttention lists inputs for these norms, but its CPU kernel refuses them (onnxruntime 1.31.1).
    """
    sizes = nodes.integer("qkv_sizes", [spec.q_size, spec.kv_size, spec.kv_size])
    q, k, v = f"{path}.q", f"{path}.k", f"{path}.v"
    nodes.nodes("Split", [qkv, sizes], [q, k, v], axis=-1)
    # Over the zeros of padded heads the mean square is smaller by this share; `weights` makes up for it in gamma.
    epsilon = spec.rms_norm_eps * spec.head_dim / spec.padded_head_dim
    normed = []
    for name, norm, size in ((q, q_norm, spec.q_size), (k, k_norm, spec.kv_size)):
        heads = nodes.integer(f"heads_of_{size}", [0, 0, size // spec.padded_head_dim, spec.padded_head_dim])
        joined = nodes.integer(f"joined_{size}", [0, 0, size])
        split = nodes.node("Reshape", [name, heads], f"{name}.heads")
        gamma = nodes.tensor(f"{name}_norm.weight", norm)
        inputs = [split, gamma]
        split = nodes.node("SimplifiedLayerNormalization", inputs, f"{name}_norm", axis=-1, epsilon=epsilon)
        normed.append(nodes.node("Reshape", [split, joined], f"{name}.normed"))
    return normed[0], normed[1], v
