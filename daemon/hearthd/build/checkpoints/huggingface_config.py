"""A Hugging Face config.json in the one spelling that `checkpoint.Checkpoint` promises, by transformers 4 or 5.

Knows no files and no weights; values are checked where they are used. Called by huggingface_checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hearthd.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["one_spelling"]

# What transformers takes for a key that config.json leaves out, where the architectures differ.
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "Qwen2ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "Qwen3ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "SmolLM3ForCausalLM": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
    "Phi3ForCausalLM": {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "Gemma3ForCausalLM": {
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": 1_000_000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "GraniteForCausalLM": {"max_position_embeddings": 2048},
}


def one_spelling(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Return config.json with the keys and defaults that `Checkpoint` promises; values are checked where used."""
    same: dict[str, Any] = {
        **_DEFAULTS[architecture],
        **{key: value for key, value in config.items() if value is not None},
    }
    heads, hidden = same.get("num_attention_heads"), same.get("hidden_size")
    if "head_dim" not in same and type(heads) is int and type(hidden) is int and heads > 0:
        same["head_dim"] = hidden // heads
    same.setdefault("num_key_value_heads", heads)
    same.setdefault("rms_norm_eps", 1e-6)
    same.setdefault("tie_word_embeddings", False)
    same.setdefault("attention_bias", False)
    same.setdefault("mlp_bias", False)
    same["hidden_act"] = same.pop("hidden_activation", same.get("hidden_act", "silu"))
    same.setdefault("bos_token_id", None)
    same["architectures"] = [architecture]
    # transformers 5 has all of the rope in rope_parameters, transformers 4 rope_theta beside rope_scaling.
    rope = dict(same.pop("rope_parameters", None) or same.get("rope_scaling") or {})
    if "full_attention" in rope or "sliding_attention" in rope:
        rope = _one_rope(same, rope)
    if "partial_rotary_factor" in rope:
        same["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    same["rope_theta"] = rope.pop("rope_theta", None) or same.get("rope_theta", 10_000.0)
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    same["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return same


def _one_rope(same: dict[str, Any], ropes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope of the layers without a window, and note the base of the others as transformers 4 does."""
    near, far = ropes.get("sliding_attention") or {}, ropes.get("full_attention") or {}
    if not isinstance(near, dict) or not isinstance(far, dict) or near.get("rope_type", "default") != "default":
        raise BuildError("rope_parameters scales the rope of sliding_attention; only that of full_attention may be")
    if "rope_theta" in near:
        same["rope_local_base_freq"] = near["rope_theta"]
    return dict(far)
