"""Attention over the static KV buffers: norms of heads where an architecture has them, then one fused operator.

KV in int8, a scale for each channel, takes a quarter of the memory and of the reading of float32; but the operator's
kernel for it, which is fast for one token, takes twice as long as the float32 one for the many of a prompt. So the
graph has both (`If`), and they mean the same: a prompt's keys and values are rounded to the very int8 numbers that go
into the cache before anything attends to them. Where a prompt is cut, and how much of it comes from the cache, then
changes no bit.

Knows ONNX Runtime's GroupQueryAttention and what its CPU kernel refuses, no matmuls. Called by `graph`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.nodes import MICROSOFT, Nodes
from hearthd.build.decoder.weights import LayerWeights

__all__ = ["KVScales", "add_attention", "add_first_position"]

# Smaller channels than that hold nothing: the zeros of padded heads.
_SMALLEST_SCALE = 1e-6
_FIRST_POSITION = "first_position"


@dataclass(frozen=True, slots=True)
class KVScales:
    """What one step of the int8 cache stands for: float32 (layers, 2, kv_heads, padded_head_dim), keys come first."""

    values: NDArray[np.float32]

    @classmethod
    def from_peaks(cls, peaks: NDArray[np.float32]) -> KVScales:
        """Return the scales that hold channels up to these magnitudes."""
        return cls(np.maximum(peaks / 127, _SMALLEST_SCALE).astype(np.float32))

    def quantized(self, kv: NDArray[np.float32]) -> NDArray[np.int8]:
        """Return KV as the cache holds it. kv: (layers, 2, kv_heads, tokens, padded_head_dim)."""
        integers: NDArray[np.int8] = np.clip(np.rint(kv / self.values[:, :, :, None]), -128, 127).astype(np.int8)
        return integers


def add_first_position(nodes: Nodes) -> None:
    """Add the position of a run's first token, int64 (B,), which `add_attention` needs for an int8 cache."""
    length = nodes.node("Shape", ["input_ids"], "run_length", start=1, end=2)
    last = nodes.node("Cast", ["seqlens_k"], "last_position.int64", to=TensorProto.INT64)
    behind = nodes.node("Add", [last, nodes.integer("one.int64", 1)], "end_position")
    nodes.node("Sub", [behind, length], _FIRST_POSITION)


def add_attention(
    nodes: Nodes, spec: DecoderSpec, index: int, qkv: str, weights: LayerWeights, kv_scales: KVScales | None
) -> str:
    """Add layer `index`'s attention, rotary positions inside; returns its result, (B, S, q_size).

    The constants `<rope>.cos` and `<rope>.sin` of the layer's rope are there already. kv_scales: None for a float32
    cache.
    """
    query, key, value = qkv, "", ""
    if weights.q_norm is not None and weights.k_norm is not None:
        query, key, value = _normed_heads(nodes, spec, f"layers.{index}", qkv, weights.q_norm, weights.k_norm)
    layer = _Attention(spec, index)
    if kv_scales is None:
        layer.add_operator(nodes, (query, key, value), layer.float_cache, layer.result, turns=True)
        return layer.result[0]
    scales = kv_scales.values[index].reshape(2, -1)
    layer.add_choice(nodes, (query, key, value), scales)
    return layer.result[0]


class _Attention:
    """One layer's."""

    def __init__(self, spec: DecoderSpec, index: int) -> None:
        self._spec = spec
        self._layer = spec.layers[index]
        self._path = f"layers.{index}"
        self.float_cache = (f"past_key.{index}", f"past_value.{index}")
        self._int8_cache = (f"past_key_int8.{index}", f"past_value_int8.{index}")
        self.result = [f"{self._path}.attention", f"present_key.{index}", f"present_value.{index}"]
        self._int8_result = [f"present_key_int8.{index}", f"present_value_int8.{index}"]

    def add_operator(
        self,
        nodes: Nodes,
        qkv: tuple[str, str, str],
        cache: tuple[str, str],
        results: list[str],
        *,
        turns: bool,
        scales: tuple[str, str] | None = None,
    ) -> None:
        """qkv: or all three joined in the first. turns: by rotary positions. scales: of an int8 cache."""
        spec, rope = self._spec, self._layer.rope
        does_turn = turns and rope is not None
        inputs = [*qkv, *cache, "seqlens_k", "total_sequence_length"]
        inputs += [f"{rope.name}.cos", f"{rope.name}.sin"] if does_turn and rope else ["", ""] if scales else []
        quantized: dict[str, Any] = {}
        if scales:
            # Position ids, an attention bias and a head's sink, which nobody has.
            inputs += ["", "", "", *scales]
            quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        nodes.nodes(
            "GroupQueryAttention",
            inputs,
            results,
            domain=MICROSOFT,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            do_rotary=int(does_turn),
            rotary_interleaved=0,
            scale=spec.attention_scale,
            # How many tokens a token sees, itself included, in this kernel as in transformers; -1 for all.
            local_window_size=self._layer.window or -1,
            **quantized,
        )

    def add_choice(self, nodes: Nodes, qkv: tuple[str, str, str], scales: NDArray[np.float32]) -> None:
        """Add both kinds of attention. scales: (2, kv_size), of keys and of values."""
        branches: dict[str, Any] = {
            "then_branch": self._reading(nodes.branch(), qkv, scales),
            "else_branch": self._writing(nodes.branch(), qkv, scales),
        }
        nodes.nodes("If", ["is_prompt"], [*self.result, *self._int8_result], **branches)

    def _writing(self, nodes: Nodes, qkv: tuple[str, str, str], scales: NDArray[np.float32]) -> object:
        """One token of each sequence: over the int8 cache."""
        spec, path = self._spec, f"{self._path}.writing"
        shape = (spec.num_kv_heads, spec.padded_head_dim)
        names = [
            nodes.tensor(f"{self._path}.{part}_scale", scale.reshape(shape))
            for part, scale in zip(("key", "value"), scales, strict=True)
        ]
        results = [f"{path}.attention", f"{path}.key_int8", f"{path}.value_int8"]
        self.add_operator(nodes, qkv, self._int8_cache, results, turns=True, scales=(names[0], names[1]))
        # The float32 buffers are no business of this branch; they are bound to empty ones.
        untouched = [
            nodes.node("Identity", [past], f"{path}.{part}")
            for part, past in zip(("key", "value"), self.float_cache, strict=True)
        ]
        return _graph(nodes, path, [results[0], *untouched], results[1:])

    def _reading(self, nodes: Nodes, qkv: tuple[str, str, str], scales: NDArray[np.float32]) -> object:
        """Tokens of one prompt: over float32 buffers that hold the cache's int8 numbers.

        The scales of the keys go into the query instead, and those of the values into the result.
        """
        spec, path = self._spec, f"{self._path}.reading"
        query, key, value = qkv
        if not key:
            sizes = nodes.integer("qkv_sizes", [spec.q_size, spec.kv_size, spec.kv_size])
            parts = [f"{path}.{part}" for part in ("q", "k", "v")]
            nodes.nodes("Split", [query, sizes], parts, axis=-1)
            query, key, value = parts
        query = self._turned(nodes, query, f"{path}.q.turned", spec.num_heads)
        key = self._turned(nodes, key, f"{path}.k.turned", spec.num_kv_heads)
        key_scale, value_scale = scales
        query = nodes.node("Mul", [query, self._by_query_head(nodes, "key_scale.q", key_scale)], f"{path}.q.scaled")
        caches, rounded = [], []
        for part, name, scale in (("key", key, key_scale), ("value", value, value_scale)):
            inverse = nodes.tensor(f"{self._path}.{part}_scale.inverse", 1 / scale)
            scaled = nodes.node("Mul", [name, inverse], f"{path}.{part}.scaled")
            unit, zero = nodes.number("int8.step", 1.0), nodes.shared("int8.zero", np.asarray(0, np.int8))
            integers = nodes.node("QuantizeLinear", [scaled, unit, zero], f"{path}.{part}.integers")
            rounded.append(nodes.node("Cast", [integers], f"{path}.{part}.rounded", to=TensorProto.FLOAT))
            heads = nodes.integer("kv_heads", [0, 0, spec.num_kv_heads, spec.padded_head_dim])
            by_token = nodes.node("Reshape", [integers, heads], f"{path}.{part}.by_token")
            caches.append(nodes.node("Transpose", [by_token], f"{path}.{part}.new", perm=[0, 2, 1, 3]))
        results = [f"{path}.attended", f"{path}.key", f"{path}.value"]
        self.add_operator(nodes, (query, rounded[0], rounded[1]), self.float_cache, results, turns=False)
        value_scale_name = self._by_query_head(nodes, "value_scale.q", value_scale)
        results[0] = nodes.node("Mul", [results[0], value_scale_name], f"{path}.attention")
        return _graph(nodes, path, results, caches)

    def _by_query_head(self, nodes: Nodes, name: str, scale: NDArray[np.float32]) -> str:
        """Return a KV head's scales for each query head that looks at it, (q_size,)."""
        spec = self._spec
        heads = scale.reshape(spec.num_kv_heads, spec.padded_head_dim)
        return nodes.tensor(f"{self._path}.{name}", heads.repeat(spec.num_heads // spec.num_kv_heads, 0).reshape(-1))

    def _turned(self, nodes: Nodes, value: str, name: str, num_heads: int) -> str:
        rope = self._layer.rope
        if rope is None:
            return value
        inputs = [value, _FIRST_POSITION, f"{rope.name}.cos", f"{rope.name}.sin"]
        return nodes.node("RotaryEmbedding", inputs, name, domain=MICROSOFT, interleaved=0, num_heads=num_heads)


def _graph(nodes: Nodes, name: str, floats: list[str], integers: list[str]) -> object:
    """Make a branch of what its nodes give: attention and float32 buffers, then int8 ones."""
    outputs = [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in floats]
    outputs += [helper.make_tensor_value_info(each, TensorProto.INT8, None) for each in integers]
    return helper.make_graph(nodes.protos, name, [], outputs)


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
