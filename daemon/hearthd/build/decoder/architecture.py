"""What a checkpoint's configuration says about its decoder, in the few numbers that the graph needs.

Knows no weights, no ONNX and no files. Called by `builder`; `weights` and `graph` read the result. An architecture
is a row of `ARCHITECTURES`: which of the optional parts it has. Everything that is not in a row is refused by name.
docs/architectures.md shows how the next row is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from hearthd.build.decoder.config_values import MAX_POSITIONS, positive_number, whole_number
from hearthd.build.decoder.layers import Layer, LayerRule, all_alike, all_windowed, some_sliding, some_without_rope
from hearthd.build.decoder.rope import Rope
from hearthd.errors import BuildError

__all__ = ["ARCHITECTURES", "Activation", "Architecture", "DecoderSpec", "Multipliers"]

# Of the gate in the MLP; the values are what configurations call it.
Activation = Literal["silu", "gelu_pytorch_tanh"]


@dataclass(frozen=True, slots=True)
class Multipliers:
    """Fixed factors, none of which costs anything when the decoder runs: `weights` folds them in.

    embedding: of a token's row, where the residual stream begins. branch: of what attention and MLP add to the stream.
    attention: of the scores before softmax, None for 1 / sqrt(head_dim). logits: of the result.
    """

    embedding: float = 1.0
    branch: float = 1.0
    attention: float | None = None
    logits: float = 1.0


def granite_multipliers(config: Mapping[str, Any]) -> Multipliers:
    """Return the four numbers of a Granite configuration; what it leaves out is 1, also for attention."""
    return Multipliers(
        embedding=positive_number(config, "embedding_multiplier", default=1.0),
        branch=positive_number(config, "residual_multiplier", default=1.0),
        attention=positive_number(config, "attention_multiplier", default=1.0),
        logits=1 / positive_number(config, "logits_scaling", default=1.0),
    )


def gemma_multipliers(config: Mapping[str, Any]) -> Multipliers:
    """Return Gemma's: rows as large as the stream's other parts, and scores scaled by a number of its own."""
    scalar = positive_number(config, "query_pre_attn_scalar", default=256.0)
    return Multipliers(embedding=math.sqrt(_size(config, "hidden_size")), attention=scalar**-0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Which optional parts the layers of an architecture have.

    A bias of None: the checkpoint's configuration says so (`attention_bias`, `mlp_bias`). qk_norm: a norm over each
    head of q and k. fused_projections: q, k and v are one tensor in the checkpoint, gate and up another. branch_norms:
    what attention and MLP give is normalised before it is added to the stream. norm_offset: what a norm's weights lack
    in the checkpoint. partial_rotary: only the first features of a head turn, if the configuration says so. layers: the
    rule for what each layer attends to. multipliers: reads fixed factors, where there are.
    """

    qkv_bias: bool | None = False
    o_bias: bool | None = False
    mlp_bias: bool | None = False
    qk_norm: bool = False
    fused_projections: bool = False
    branch_norms: bool = False
    norm_offset: float = 0.0
    partial_rotary: bool = False
    activation: Activation = "silu"
    layers: LayerRule = all_alike
    multipliers: Callable[[Mapping[str, Any]], Multipliers] | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    # SmolLM2, TinyLlama, Llama 3.x
    "LlamaForCausalLM": Architecture(qkv_bias=None, o_bias=None, mlp_bias=None),
    # Qwen2, Qwen2.5
    "Qwen2ForCausalLM": Architecture(qkv_bias=True),
    "Qwen3ForCausalLM": Architecture(qkv_bias=None, o_bias=None, qk_norm=True),
    "SmolLM3ForCausalLM": Architecture(qkv_bias=None, o_bias=None, mlp_bias=None, layers=some_without_rope),
    # Phi-3, Phi-3.5, Phi-4-mini
    "Phi3ForCausalLM": Architecture(fused_projections=True, partial_rotary=True, layers=all_windowed),
    # Gemma 3 for text: 270M, 1B
    "Gemma3ForCausalLM": Architecture(
        qkv_bias=None,
        o_bias=None,
        qk_norm=True,
        branch_norms=True,
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        layers=some_sliding,
        multipliers=gemma_multipliers,
    ),
    # Granite 3.x
    "GraniteForCausalLM": Architecture(qkv_bias=None, o_bias=None, mlp_bias=None, multipliers=granite_multipliers),
}

_HEAD_DIM_STEP = 16

# A header may say anything: these bounds keep a hostile one from asking for all of the memory.
_MAX_SIZE = {
    "hidden_size": 65_536,
    "num_hidden_layers": 512,
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
    "head_dim": 1_024,
    "intermediate_size": 262_144,
    "vocab_size": 1_048_576,
    "max_position_embeddings": MAX_POSITIONS,
}


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder's shape. Sizes are counts of features, heads, layers or tokens.

    rotary_dim: features of each head that turn with the position, from the first one on.
    """

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
    fused_projections: bool
    branch_norms: bool
    norm_offset: float
    activation: Activation
    rotary_dim: int
    layers: tuple[Layer, ...]
    multipliers: Multipliers

    @property
    def rotatable(self) -> bool:
        """Whether the residual stream may be rotated (`weights` says how).

        Not where a norm's elementwise weight stands between a branch and the stream: it does not commute with rotation.
        """
        return not self.branch_norms

    @property
    def padded_head_dim(self) -> int:
        """A head's features in the graph and in the KV buffers: ONNX Runtime's attention takes multiples of 16."""
        return -(-self.head_dim // _HEAD_DIM_STEP) * _HEAD_DIM_STEP

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Each rope that some layer has, once."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by before softmax."""
        scale = self.multipliers.attention
        return self.head_dim**-0.5 if scale is None else scale

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
        num_layers = _size(config, "num_hidden_layers")
        rotary_dim = _rotary_dim(config, head_dim, parts.partial_rotary)
        layers = parts.layers(config, num_layers, rotary_dim)
        max_context_length = _size(config, "max_position_embeddings")
        for layer in layers:
            if layer.rope is not None and layer.rope.max_positions is not None:
                max_context_length = min(max_context_length, layer.rope.max_positions)
        attention_bias = bool(config.get("attention_bias", False))
        mlp_bias = bool(config.get("mlp_bias", False))
        return cls(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=_size(config, "intermediate_size"),
            vocab_size=_size(config, "vocab_size"),
            max_context_length=max_context_length,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied_embedding=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias if parts.qkv_bias is None else parts.qkv_bias,
            o_bias=attention_bias if parts.o_bias is None else parts.o_bias,
            mlp_bias=mlp_bias if parts.mlp_bias is None else parts.mlp_bias,
            qk_norm=parts.qk_norm,
            fused_projections=parts.fused_projections,
            branch_norms=parts.branch_norms,
            norm_offset=parts.norm_offset,
            activation=parts.activation,
            rotary_dim=rotary_dim,
            # A window that no context outgrows is none.
            layers=tuple(
                replace(layer, window=None) if layer.window and layer.window >= max_context_length else layer
                for layer in layers
            ),
            multipliers=parts.multipliers(config) if parts.multipliers else Multipliers(),
        )


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
    return whole_number(config, key, largest=_MAX_SIZE[key], default=default)


def _refuse_unknown_parts(config: Mapping[str, Any], architecture: str) -> None:
    activation = config.get("hidden_act", ARCHITECTURES[architecture].activation)
    expected = ARCHITECTURES[architecture].activation
    if activation != expected and (activation, expected) != ("swish", "silu"):
        raise BuildError(f"hidden_act {activation!r} is not supported with {architecture}; {expected} is")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if config.get(key):
            raise BuildError(f"{key} {config[key]!r} is not supported with {architecture}; none is")


def _rotary_dim(config: Mapping[str, Any], head_dim: int, may_be_partial: bool) -> int:
    factor = config.get("partial_rotary_factor", 1.0)
    if factor == 1.0:
        return head_dim
    if not may_be_partial:
        raise BuildError(f"partial_rotary_factor {factor} is not supported with this architecture; 1.0 is")
    size = int(head_dim * positive_number(config, "partial_rotary_factor", default=1.0))
    if size % 2 or not 2 <= size <= head_dim:
        raise BuildError(
            f"partial_rotary_factor {factor} of head_dim {head_dim} is {size}; an even number up to that is needed"
        )
    return size
