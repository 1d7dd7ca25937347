"""What a checkpoint's configuration says about its decoder, in the few numbers that the graph needs.

Knows no weights, no ONNX and no files. Called by `builder`; `weights` and `graph` read the result. An architecture
is a row of `ARCHITECTURES`: which of the optional parts it has. Everything that is not in a row is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hearthd.errors import BuildError

__all__ = ["ARCHITECTURES", "DecoderSpec", "rope_tables"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Which optional parts the layers of an architecture have.

    None means that the checkpoint's configuration says so (`attention_bias`, `mlp_bias`).
    """

    qkv_bias: bool | None
    o_bias: bool | None
    mlp_bias: bool | None
    qk_norm: bool


ARCHITECTURES: Mapping[str, Architecture] = {
    # SmolLM2, TinyLlama, Llama 3.x
    "LlamaForCausalLM": Architecture(qkv_bias=None, o_bias=None, mlp_bias=None, qk_norm=False),
    # Qwen2, Qwen2.5
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, o_bias=False, mlp_bias=False, qk_norm=False),
    "Qwen3ForCausalLM": Architecture(qkv_bias=None, o_bias=None, mlp_bias=False, qk_norm=True),
}

_HEAD_DIM_STEP = 16
_ROPE_TYPES = ("default", "linear", "llama3")

# A header may say anything: these bounds keep a hostile one from asking for all of the memory.
_MAX_SIZE = {
    "hidden_size": 65_536,
    "num_hidden_layers": 512,
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
    "head_dim": 1_024,
    "intermediate_size": 262_144,
    "vocab_size": 1_048_576,
    "max_position_embeddings": 16_777_216,
}


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder's shape. Sizes are counts of features, heads, layers or tokens."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context_length: int
    rms_norm_eps: float
    tied_embedding: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope_inverse_frequencies: tuple[float, ...]

    @property
    def rotatable(self) -> bool:
        """Whether the residual stream may be rotated (`weights` says how).

        Not where a norm's elementwise weight stands between a branch and the stream: it does not commute with rotation.
        """
        return True

    @property
    def padded_head_dim(self) -> int:
        """A head's features in the graph and in the KV buffers: ONNX Runtime's attention takes multiples of 16."""
        return -(-self.head_dim // _HEAD_DIM_STEP) * _HEAD_DIM_STEP

    @property
    def q_size(self) -> int:
        """Features of all query heads together, in the graph."""
        return self.num_heads * self.padded_head_dim

    @property
    def kv_size(self) -> int:
        """Features of all key heads together, in the graph; as many as of all value heads."""
        return self.num_kv_heads * self.padded_head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Hugging Face configuration.

        Raises BuildError, with the list of what works, for anything that the graph could not follow exactly.
        """
        architecture = _architecture_name(config)
        parts = ARCHITECTURES[architecture]
        hidden_size = _size(config, "hidden_size")
        num_heads = _size(config, "num_attention_heads")
        num_kv_heads = _size(config, "num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise BuildError(
                f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}: "
                "this checkpoint's config.json is damaged"
            )
        if config.get("head_dim") is None and hidden_size % num_heads:
            raise BuildError(
                f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}; no head_dim: "
                "this checkpoint's config.json is damaged"
            )
        head_dim = _size(config, "head_dim", default=hidden_size // num_heads)
        if head_dim % 2:
            raise BuildError(f"head_dim {head_dim} is odd, which rotary positions cannot be: config.json is damaged")
        _refuse_unknown_parts(config, architecture)
        attention_bias = bool(config.get("attention_bias", False))
        mlp_bias = bool(config.get("mlp_bias", False))
        return cls(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=_size(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=_size(config, "intermediate_size"),
            vocab_size=_size(config, "vocab_size"),
            max_context_length=_size(config, "max_position_embeddings"),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied_embedding=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias if parts.qkv_bias is None else parts.qkv_bias,
            o_bias=attention_bias if parts.o_bias is None else parts.o_bias,
            mlp_bias=mlp_bias if parts.mlp_bias is None else parts.mlp_bias,
            qk_norm=parts.qk_norm,
            rope_inverse_frequencies=tuple(_inverse_frequencies(config, head_dim)),
        )


def rope_tables(spec: DecoderSpec, context_length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cosines and sines of every position's angles, each float32 (context_length, padded_head_dim / 2)."""
    frequencies = np.zeros(spec.padded_head_dim // 2)
    frequencies[: spec.head_dim // 2] = spec.rope_inverse_frequencies
    angles = np.outer(np.arange(context_length, dtype=np.float64), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _architecture_name(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, (list, tuple)) and names else None
    if name not in ARCHITECTURES:
        raise BuildError(
            f"architecture {name or config.get('model_type') or 'without a name'!s} is not supported; "
            f"these are: {', '.join(sorted(ARCHITECTURES))}"
        )
    return str(name)


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIZE[key]:
        raise BuildError(f"{key} is {value!r} in this checkpoint's configuration; 1 to {_MAX_SIZE[key]} is allowed")
    return value


def _refuse_unknown_parts(config: Mapping[str, Any], architecture: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise BuildError(f"hidden_act {activation!r} is not supported with {architecture}; silu is")
    if config.get("use_sliding_window"):
        raise BuildError(f"use_sliding_window is not supported with {architecture}; full attention is")
    layer_types = config.get("layer_types")
    if layer_types and set(layer_types) != {"full_attention"}:
        raise BuildError(
            f"layer types {sorted(set(layer_types))} are not supported with {architecture}; full_attention is"
        )
    factor = config.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise BuildError(f"partial_rotary_factor {factor} is not supported with {architecture}; 1.0 is")


def _inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> NDArray[np.float64]:
    """Return the rope's angle for each step of position, float64 (head_dim / 2,).

    Scaling as in transformers' `modeling_rope_utils` (`linear`, `llama3`); a GGUF file carries Llama 3's as divisors in
    `rope_freq_factors`.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    factors = config.get("rope_freq_factors")
    if factors is not None:
        divisors = np.asarray(factors, dtype=np.float64)
        if divisors.shape != frequencies.shape or not np.all(np.isfinite(divisors) & (divisors > 0)):
            raise BuildError(
                f"rope_freqs has shape {divisors.shape} or values that are not positive; {frequencies.shape} is needed"
            )
        return frequencies / divisors
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_TYPES:
        raise BuildError(f"rope scaling {kind!r} is not supported; these are: {', '.join(_ROPE_TYPES)}")
    if kind == "linear":
        return frequencies / float(rope["factor"])
    if kind == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies


def _llama3_frequencies(frequencies: NDArray[np.float64], rope: Mapping[str, Any]) -> NDArray[np.float64]:
    """Stretch long wavelengths by `factor`, keep short ones, blend between (Llama 3.1's rope scaling)."""
    try:
        factor = float(rope["factor"])
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        original = float(rope["original_max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as error:
        raise BuildError(f"rope scaling llama3 lacks a number: {error}") from error
    wavelengths = 2 * math.pi / frequencies
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies
