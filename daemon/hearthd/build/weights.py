"""A checkpoint's weights as the fused graph wants them: one layer at a time, transposed, joined, smoothed.

Knows the module paths of Hugging Face checkpoints, no ONNX. Called by `graph`, and by `calibrate` for the weights alone.
Only the layer in hand is in memory, so that a checkpoint larger than the memory can be built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hearthd.build.architecture import DecoderSpec
from hearthd.build.recipe import MatMulName, Recipe
from hearthd.errors import BuildError

__all__ = ["DecoderWeights", "LayerWeights", "Linear", "TensorSource"]

Array = NDArray[np.float32]


class TensorSource(Protocol):
    """Weights by module path, for example `model.layers.0.self_attn.q_proj.weight`; float32 (out, in)."""

    def tensor(self, name: str) -> Array:
        """Return the tensor; raises BuildError if there is none."""

    def has_tensor(self, name: str) -> bool:
        """Say whether there is one."""


@dataclass(frozen=True, slots=True)
class Linear:
    """weight: float32 (in, out), as MatMul takes it. bias: float32 (out,) or None."""

    weight: Array
    bias: Array | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Norms are float32 (hidden_size,), q and k norms (head_dim,) or None."""

    input_norm: Array
    qkv: Linear
    q_norm: Array | None
    k_norm: Array | None
    o: Linear
    post_attention_norm: Array
    gate_up: Linear
    down: Linear


class DecoderWeights:
    """Reads a decoder's weights, with a recipe's smoothing folded in."""

    def __init__(self, source: TensorSource, spec: DecoderSpec, recipe: Recipe | None = None) -> None:
        self._source = source
        self._spec = spec
        self._smoothing = recipe.smoothing if recipe else {}

    def embedding(self) -> Array:
        """Return the token embedding, float32 (vocab_size, hidden_size)."""
        return self._tensor("model.embed_tokens.weight", (self._spec.vocab_size, self._spec.hidden_size))

    def head(self) -> tuple[Array, Linear]:
        """Return the final norm and the LM head (hidden_size, vocab_size)."""
        spec = self._spec
        factors = self._smoothing.get(MatMulName("lm_head"))
        norm = self._tensor("model.norm.weight", (spec.hidden_size,))
        if spec.tied_embedding:
            weight = self.embedding()
        else:
            weight = self._tensor("lm_head.weight", (spec.vocab_size, spec.hidden_size))
        if factors is not None:
            norm = norm / factors
            weight = weight * factors
        return norm, Linear(weight.T, None)

    def layer(self, index: int) -> LayerWeights:
        """Return one layer's weights, those of the same input joined: q, k and v; gate and up."""
        spec = self._spec
        path = f"model.layers.{index}"
        attention, mlp = f"{path}.self_attn", f"{path}.mlp"
        hidden, inner = spec.hidden_size, spec.intermediate_size
        q = self._linear(f"{attention}.q_proj", hidden, spec.q_size, spec.qkv_bias)
        k = self._linear(f"{attention}.k_proj", hidden, spec.kv_size, spec.qkv_bias)
        v = self._linear(f"{attention}.v_proj", hidden, spec.kv_size, spec.qkv_bias)
        o = self._linear(f"{attention}.o_proj", spec.q_size, hidden, spec.o_bias)
        gate = self._linear(f"{mlp}.gate_proj", hidden, inner, spec.mlp_bias)
        up = self._linear(f"{mlp}.up_proj", hidden, inner, spec.mlp_bias)
        down = self._linear(f"{mlp}.down_proj", inner, hidden, spec.mlp_bias)
        input_norm = self._tensor(f"{path}.input_layernorm.weight", (hidden,))
        post_norm = self._tensor(f"{path}.post_attention_layernorm.weight", (hidden,))

        factors = self._smoothing.get(MatMulName("down", index))
        if factors is not None:
            up, down = _divide_outputs(up, factors), _multiply_inputs(down, factors)
        factors = self._smoothing.get(MatMulName("o", index))
        if factors is not None:
            v, o = _divide_outputs(v, self._per_kv_feature(factors)), _multiply_inputs(o, factors)
        qkv, gate_up = _join((q, k, v)), _join((gate, up))
        factors = self._smoothing.get(MatMulName("qkv", index))
        if factors is not None:
            input_norm, qkv = input_norm / factors, _multiply_inputs(qkv, factors)
        factors = self._smoothing.get(MatMulName("gate_up", index))
        if factors is not None:
            post_norm, gate_up = post_norm / factors, _multiply_inputs(gate_up, factors)
        return LayerWeights(
            input_norm=input_norm,
            qkv=qkv,
            q_norm=self._tensor(f"{attention}.q_norm.weight", (spec.head_dim,)) if spec.qk_norm else None,
            k_norm=self._tensor(f"{attention}.k_norm.weight", (spec.head_dim,)) if spec.qk_norm else None,
            o=o,
            post_attention_norm=post_norm,
            gate_up=gate_up,
            down=down,
        )

    def _per_kv_feature(self, factors: Array) -> Array:
        """Take one factor for each feature of v, (kv_size,), from o's (q_size,), equal within a group of query heads."""
        spec = self._spec
        groups = factors.reshape(spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_dim)
        assert np.array_equal(groups, np.broadcast_to(groups[:, :1], groups.shape)), "o's factors differ within a group"
        return np.ascontiguousarray(groups[:, 0].reshape(-1))

    def _linear(self, path: str, in_features: int, out_features: int, has_bias: bool) -> Linear:
        weight = self._tensor(f"{path}.weight", (out_features, in_features))
        return Linear(weight.T, self._tensor(f"{path}.bias", (out_features,)) if has_bias else None)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        tensor = self._source.tensor(name)
        if tensor.shape != shape:
            raise BuildError(f"{name} has shape {tensor.shape}; the checkpoint's configuration says {shape}")
        if not np.all(np.isfinite(tensor)):
            raise BuildError(f"{name} holds values that are not finite: the checkpoint is damaged")
        return tensor


def _join(parts: Sequence[Linear]) -> Linear:
    biases = [part.bias for part in parts if part.bias is not None]
    assert len(biases) in (0, len(parts)), "a bias on some of the joined projections only"
    return Linear(np.concatenate([part.weight for part in parts], axis=1), np.concatenate(biases) if biases else None)


def _divide_outputs(linear: Linear, factors: Array) -> Linear:
    return Linear(linear.weight / factors, None if linear.bias is None else linear.bias / factors)


def _multiply_inputs(linear: Linear, factors: Array) -> Linear:
    return Linear(linear.weight * factors[:, None], linear.bias)
