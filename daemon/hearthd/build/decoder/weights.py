"""A checkpoint's weights as the fused graph wants them: one layer at a time, transposed, joined, and rotated if asked.

Rotation. With the norms' weights folded into the matmuls behind them, an RMS norm commutes with any orthogonal matrix
Q: norm(x Q) = norm(x) Q. So the residual stream can be kept as x Q, with Q folded into the embedding and into every
matrix that writes to the stream, and its transpose into every one that reads from it; the decoder computes the same,
at no cost when it runs. But the few features that are a hundred times larger than the others are spread over all of
them: each matmul behind a norm then sees values close to a standard normal distribution, with peaks near 4.5 where
they were up to 60, and one fixed scale of 8 bits suits every token. Ashkboos et al. 2024 (QuaRot), Liu et al. 2024
(SpinQuant); measured here on SmolLM2-135M, mean KL to float32 on held text: 0.036 with SmoothQuant factors instead,
0.0087 rotated.

Knows the module paths of Hugging Face checkpoints, no ONNX. Called by `graph`. Only the layer in hand is in memory, so
that a checkpoint larger than the memory can be built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hearthd.build.decoder.architecture import DecoderSpec
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
    """One decoder layer. Norms are float32 (hidden_size,), q and k norms (padded_head_dim,) or None.

    post_attention_norm: behind attention, before the MLP. attention_branch_norm, mlp_branch_norm: of what o and down
    give, before it is added to the stream; None but for a decoder with `branch_norms`.
    """

    input_norm: Array
    qkv: Linear
    q_norm: Array | None
    k_norm: Array | None
    o: Linear
    attention_branch_norm: Array | None
    post_attention_norm: Array
    gate_up: Linear
    down: Linear
    mlp_branch_norm: Array | None


class DecoderWeights:
    """Reads a decoder's weights, the residual stream rotated or as the checkpoint has it."""

    def __init__(self, source: TensorSource, spec: DecoderSpec, *, rotated: bool) -> None:
        assert spec.rotatable or not rotated, f"{spec.architecture} cannot be rotated"
        self._source = source
        self._spec = spec
        self._rotation = _orthogonal(spec.hidden_size) if rotated else None

    def embedding(self) -> Array:
        """Return the token embedding, float32 (vocab_size, hidden_size)."""
        embedding = _times(self._embedding(), self._spec.multipliers.embedding)
        return embedding if self._rotation is None else embedding @ self._rotation

    def head(self) -> tuple[Array, Linear]:
        """Return the final norm (hidden_size,) and the LM head (hidden_size, vocab_size)."""
        spec = self._spec
        norm = self._norm("model.norm")
        if spec.tied_embedding:
            weight = self._embedding()
        else:
            weight = self._tensor("lm_head.weight", (spec.vocab_size, spec.hidden_size))
        return self._reading(norm, Linear(_times(weight.T, spec.multipliers.logits), None))

    def layer(self, index: int) -> LayerWeights:
        """Return one layer's weights, those of the same input joined: q, k and v; gate and up."""
        spec = self._spec
        path = f"model.layers.{index}"
        attention, mlp = f"{path}.self_attn", f"{path}.mlp"
        hidden, inner = spec.hidden_size, spec.intermediate_size
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        if spec.fused_projections:
            qkv = self._padded_outputs(
                self._linear(f"{attention}.qkv_proj", hidden, q_size + 2 * kv_size, spec.qkv_bias)
            )
            gate_up = self._linear(f"{mlp}.gate_up_proj", hidden, 2 * inner, spec.mlp_bias)
        else:
            qkv = _join(
                self._padded_outputs(self._linear(f"{attention}.q_proj", hidden, q_size, spec.qkv_bias)),
                self._padded_outputs(self._linear(f"{attention}.k_proj", hidden, kv_size, spec.qkv_bias)),
                self._padded_outputs(self._linear(f"{attention}.v_proj", hidden, kv_size, spec.qkv_bias)),
            )
            gate_up = _join(
                self._linear(f"{mlp}.gate_proj", hidden, inner, spec.mlp_bias),
                self._linear(f"{mlp}.up_proj", hidden, inner, spec.mlp_bias),
            )
        o = self._linear(f"{attention}.o_proj", q_size, hidden, spec.o_bias)
        o = Linear(self._padded(o.weight.T).T, o.bias)
        input_norm, qkv = self._reading(self._norm(f"{path}.input_layernorm"), qkv)
        # With norms of branches, "post attention" is the branch's in the checkpoint.
        post_norm_name = "pre_feedforward_layernorm" if spec.branch_norms else "post_attention_layernorm"
        post_norm, gate_up = self._reading(self._norm(f"{path}.{post_norm_name}"), gate_up)
        return LayerWeights(
            input_norm=input_norm,
            qkv=qkv,
            q_norm=self._head_norm(f"{attention}.q_norm") if spec.qk_norm else None,
            k_norm=self._head_norm(f"{attention}.k_norm") if spec.qk_norm else None,
            o=self._writing(o),
            attention_branch_norm=self._norm(f"{path}.post_attention_layernorm") if spec.branch_norms else None,
            post_attention_norm=post_norm,
            gate_up=gate_up,
            down=self._writing(self._linear(f"{mlp}.down_proj", inner, hidden, spec.mlp_bias)),
            mlp_branch_norm=self._norm(f"{path}.post_feedforward_layernorm") if spec.branch_norms else None,
        )

    def _padded(self, rows: Array) -> Array:
        """Fill up the last axis, heads of head_dim features, with zeros to heads of padded_head_dim.

        The graph turns feature i of a head's first half with feature i of its second. So each half is filled up; and
        where only some features turn, each half begins with its half of those, and the others, at angle 0, follow.
        """
        spec = self._spec
        heads = rows.reshape(*rows.shape[:-1], -1, spec.head_dim)
        if spec.rotary_dim != spec.head_dim:
            heads = heads[..., _halves_of_turned_first(spec.rotary_dim, spec.head_dim)]
        missing = (spec.padded_head_dim - spec.head_dim) // 2
        if missing:
            halves = heads.reshape(*heads.shape[:-1], 2, spec.head_dim // 2)
            heads = np.pad(halves, [(0, 0)] * (halves.ndim - 1) + [(0, missing)])
        return heads.reshape(*rows.shape[:-1], -1)

    def _padded_outputs(self, linear: Linear) -> Linear:
        return Linear(self._padded(linear.weight), None if linear.bias is None else self._padded(linear.bias))

    def _head_norm(self, name: str) -> Array:
        """Return the weight of a norm over a head; the zeros of a padded one make its mean square smaller."""
        spec = self._spec
        weight = self._norm(name, spec.head_dim)
        return self._padded(weight) * np.float32((spec.head_dim / spec.padded_head_dim) ** 0.5)

    def _norm(self, path: str, size: int | None = None) -> Array:
        """Return what a norm multiplies by; over hidden_size features unless `size` says otherwise."""
        weight = self._tensor(f"{path}.weight", (self._spec.hidden_size if size is None else size,))
        return weight + np.float32(self._spec.norm_offset)

    def _reading(self, norm: Array, linear: Linear) -> tuple[Array, Linear]:
        """Turn a norm and the matmul behind it to read from the rotated stream."""
        if self._rotation is None:
            return norm, linear
        return np.ones_like(norm), Linear(self._rotation.T @ (norm[:, None] * linear.weight), linear.bias)

    def _writing(self, linear: Linear) -> Linear:
        """Give a matmul's result the size that the stream takes it in, and turn it to write to the rotated stream."""
        factor = self._spec.multipliers.branch
        linear = Linear(_times(linear.weight, factor), None if linear.bias is None else _times(linear.bias, factor))
        if self._rotation is None:
            return linear
        return Linear(linear.weight @ self._rotation, None if linear.bias is None else linear.bias @ self._rotation)

    def _embedding(self) -> Array:
        return self._tensor("model.embed_tokens.weight", (self._spec.vocab_size, self._spec.hidden_size))

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


def _join(*parts: Linear) -> Linear:
    biases = [part.bias for part in parts if part.bias is not None]
    assert len(biases) in (0, len(parts)), "a bias on some of the joined projections only"
    return Linear(np.concatenate([part.weight for part in parts], axis=1), np.concatenate(biases) if biases else None)


def _times(values: Array, factor: float) -> Array:
    """Return values * factor, without a copy of a whole embedding where the factor is 1."""
    return values if factor == 1 else np.asarray(values * np.float32(factor), np.float32)


def _halves_of_turned_first(rotary_dim: int, head_dim: int) -> NDArray[np.int64]:
    """Return the order of a head's features: half of those that turn, half of the others, and the same again."""
    turned = np.arange(rotary_dim).reshape(2, -1)
    others = np.arange(rotary_dim, head_dim).reshape(2, -1)
    return np.concatenate([turned, others], axis=1).reshape(-1)


def _orthogonal(size: int) -> Array:
    """Return a random orthogonal matrix, float32 (size, size), the same at each call.

    The signs make it uniform over the orthogonal group (Mezzadri 2007).
    """
    q, r = np.linalg.qr(np.random.default_rng(size).standard_normal((size, size)))
    return (q * np.sign(np.diag(r))).astype(np.float32)
