"""A GGUF file as a checkpoint: llama.cpp's names and row order turned back into Hugging Face's.

llama.cpp's conversion renames every tensor and, for llama and what derives from it, reorders the rows of the q and k
projections for interleaved rope; both are undone here. Knows nothing of the container's bytes (gguf_file) nor of
tokenizer files (gguf_tokenizer). Called by checkpoint.open_checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hearthd.build.checkpoints.checkpoint import Checkpoint, one_line, unsupported_architecture
from hearthd.build.checkpoints.gguf_file import GgufFile
from hearthd.build.checkpoints.gguf_tokenizer import read_tokenizer
from hearthd.build.decoder.architecture import ARCHITECTURES
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_TOP_LEVEL: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What a `general.architecture` of llama.cpp is in Hugging Face's words.

    architecture: config.json's. reorders_qk: whether the rows of q and k are in the order of interleaved rope. names:
    of a layer's tensors. numbers: config.json's keys that this family alone has, and the file's key, whose default
    is 1. fixed: what llama.cpp knows of the family and no file says. norm_offset: what the conversion added to norms.
    """

    architecture: str
    reorders_qk: bool = False
    names: Mapping[str, str] = field(default_factory=lambda: _IN_LAYER)
    numbers: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    norm_offset: float = 0.0


_FAMILIES: Final = {
    "llama": _Family(architecture="LlamaForCausalLM", reorders_qk=True),
    "qwen2": _Family(architecture="Qwen2ForCausalLM"),
    "qwen3": _Family(architecture="Qwen3ForCausalLM"),
    "smollm3": _Family(architecture="SmolLM3ForCausalLM", reorders_qk=True, fixed={"no_rope_layer_interval": 4}),
    "granite": _Family(
        architecture="GraniteForCausalLM",
        reorders_qk=True,
        numbers={
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "attention_multiplier": "attention.scale",
            "logits_scaling": "logit_scale",
        },
    ),
    "phi3": _Family(
        architecture="Phi3ForCausalLM",
        names={**_IN_LAYER, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "gemma3": _Family(
        architecture="Gemma3ForCausalLM",
        names={
            **_IN_LAYER,
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        fixed={"model_type": "gemma3_text", "hidden_act": "gelu_pytorch_tanh"},
        norm_offset=1.0,
    ),
}
_LAYER_TENSOR: Final = re.compile(r"blk\.(\d{1,4})\.([a-z_]+)\.(weight|bias)")
_ROPE_FACTORS: Final = "rope_freqs.weight"
# 64-wide tensors of positions that old converters wrote; they can be computed.
_LONGROPE_FACTORS: Final = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
_IGNORED: Final = re.compile(r"blk\.\d+\.attn_rot_embd\.weight|blk\.\d+\.attn_rot_embd")


class GgufCheckpoint(Checkpoint):
    """A GGUF file of one of the architectures above. Tensors are dequantised one at a time."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises BuildError when it is damaged or of another architecture."""
        self._path = path
        self._file = GgufFile(path)
        try:
            name = str(self._file.metadata.get("general.architecture", ""))
            if name not in _FAMILIES:
                raise unsupported_architecture(path, name)
            self._architecture = name
            self._family = _FAMILIES[name]
            self._names = self._hugging_face_names()
            tokenizer = read_tokenizer(path, self._file.metadata)
            self.config = self._config()
            self.config["bos_token_id"] = tokenizer.bos_id
            self.config["eos_token_id"] = list(tokenizer.eos_ids)
            self.tokenizer_json = tokenizer.json
            self.chat_template = tokenizer.chat_template
            self.bos_token = tokenizer.bos_token
            self.eos_token = tokenizer.eos_token
            self.generation = {}
            self.source = one_line(f"GGUF file {path.name}", 200)
            self.license = one_line(self._file.metadata.get("general.license"), 200)
        except BaseException:
            self._file.close()
            raise

    @property
    def tensor_names(self) -> frozenset[str]:
        """Hugging Face names of the tensors in the file."""
        return frozenset(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first."""
        return self._file.tensors[self._gguf_name(name)].shape

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor, dequantised, in Hugging Face's order of rows."""
        gguf_name = self._gguf_name(name)
        shape = self._file.tensors[gguf_name].shape
        if len(shape) > 2:
            raise BuildError(f"{self._path}: tensor {gguf_name!r} has {len(shape)} dimensions; 1 or 2 are expected")
        values = self._file.rows(gguf_name, 0, shape[0] if len(shape) == 2 else 1).reshape(shape)
        if self._family.norm_offset and name.endswith("norm.weight"):
            return values - np.float32(self._family.norm_offset)
        num_heads = self._reordered_heads(name)
        if not num_heads:
            return values
        if shape[0] % (2 * num_heads):
            raise BuildError(f"{self._path}: tensor {gguf_name!r} has {shape[0]} rows, not pairs for {num_heads} heads")
        return _half_split_rope_order(values, num_heads)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a matrix; of q and k, whose rows are reordered, all are read."""
        gguf_name = self._gguf_name(name)
        if self._reordered_heads(name):
            return self.tensor(name)[start:stop]
        return self._file.rows(gguf_name, start, stop)

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()

    def _gguf_name(self, name: str) -> str:
        try:
            return self._names[name]
        except KeyError:
            raise BuildError(f"{self._path}: there is no tensor for {name!r}; the file is incomplete") from None

    def _reordered_heads(self, name: str) -> int:
        """Into how many heads the rows of this tensor were reordered; 0 for a tensor that was not."""
        if not self._family.reorders_qk:
            return 0
        if ".q_proj." in name:
            return int(self.config["num_attention_heads"])
        return int(self.config["num_key_value_heads"]) if ".k_proj." in name else 0

    def _hugging_face_names(self) -> dict[str, str]:
        names: dict[str, str] = {}
        for gguf_name in self._file.tensors:
            if gguf_name in _TOP_LEVEL:
                names[_TOP_LEVEL[gguf_name]] = gguf_name
            elif match := _LAYER_TENSOR.fullmatch(gguf_name):
                layer, part, kind = match.groups()
                if part in self._family.names:
                    names[f"model.layers.{int(layer)}.{self._family.names[part]}.{kind}"] = gguf_name
                    continue
                if not _IGNORED.fullmatch(gguf_name):
                    # A tensor that is left out would change the answers without a word (experts, for example).
                    raise BuildError(f"{self._path}: tensor {gguf_name!r} has no place in {self._architecture}")
            elif gguf_name not in (_ROPE_FACTORS, *_LONGROPE_FACTORS.values()):
                raise BuildError(f"{self._path}: tensor {gguf_name!r} has no place in {self._architecture}")
        return names

    def _config(self) -> dict[str, Any]:
        hidden_size = self._number("embedding_length")
        num_heads = self._number("attention.head_count")
        head_dim = self._number("attention.key_length", default=hidden_size // num_heads)
        if self._number("attention.value_length", default=head_dim) != head_dim:
            raise BuildError(f"{self._path}: key and value heads of different size are not supported")
        if self._number("expert_count", default=0):
            raise BuildError(f"{self._path}: mixtures of experts are not supported")
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise BuildError(f"{self._path}: has no token_embd.weight matrix; the file is incomplete")
        config: dict[str, Any] = {
            "architectures": [self._family.architecture],
            "model_type": self._architecture,
            "hidden_size": hidden_size,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._number("attention.head_count_kv", default=num_heads),
            "head_dim": head_dim,
            # The embedding's rows, not the tokens': Qwen pads it.
            "vocab_size": embedding.shape[0],
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": self._decimal("attention.layer_norm_rms_epsilon", default=1e-6),
            "rope_theta": self._decimal("rope.freq_base", default=10_000.0),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            # Qwen2's qkv bias is a part of the architecture, not of its configuration.
            "attention_bias": self._architecture != "qwen2" and "blk.0.attn_q.bias" in self._file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._file.tensors,
            "hidden_act": "silu",
        }
        config |= self._family.fixed
        config |= {key: self._decimal(name, default=1.0) for key, name in self._family.numbers.items()}
        rotary_dim = self._number("rope.dimension_count", default=head_dim)
        if rotary_dim != head_dim:
            if not ARCHITECTURES[self._family.architecture].partial_rotary:
                raise BuildError(f"{self._path}: rope over a part of each head is not supported")
            config["partial_rotary_factor"] = rotary_dim / head_dim
        # Only of files that have it, and 0 for none: the other families have windows in no layer.
        window = self._number("attention.sliding_window", default=0)
        if window:
            config["sliding_window"] = window
        if self._architecture == "gemma3":
            config |= self._gemma_config(hidden_size // num_heads)
        if self._architecture == "phi3":
            config["original_max_position_embeddings"] = self._number(
                "rope.scaling.original_context_length", default=config["max_position_embeddings"]
            )
        if _ROPE_FACTORS in self._file.tensors:
            config["rope_freq_factors"] = self._file.rows(_ROPE_FACTORS, 0, 1)[0]
        return config

    def _gemma_config(self, hidden_share: int) -> dict[str, Any]:
        """Return what llama.cpp derives from the size of the model: hidden_share is hidden_size / heads."""
        head_dim = self._number("attention.key_length", default=hidden_share)
        # A file without a window is one of a model that has none in any layer.
        has_window = self._number("attention.sliding_window", default=0) > 0
        config: dict[str, Any] = {
            # Of 27B, which alone has 62 layers, and of all others.
            "query_pre_attn_scalar": hidden_share if self._number("block_count") == 62 else head_dim,
            "sliding_window_pattern": self._number("attention.sliding_window_pattern", default=6) if has_window else 1,
            "rope_local_base_freq": self._decimal("rope.freq_base_swa", default=10_000.0),
        }
        for key in ("final_logit_softcapping", "attn_logit_softcapping"):
            # Refused with the configuration, like anywhere else.
            config[key] = self._file.metadata.get(f"{self._architecture}.{key}")
        return config

    def _rope_scaling(self) -> dict[str, Any] | None:
        if all(name in self._file.tensors for name in _LONGROPE_FACTORS.values()):
            factors = {key: self._file.rows(name, 0, 1)[0].tolist() for key, name in _LONGROPE_FACTORS.items()}
            magnitude = self._decimal("rope.scaling.attn_factor", default=1.0)
            return {"rope_type": "longrope", "attention_factor": magnitude} | factors
        kind = self._file.metadata.get(f"{self._architecture}.rope.scaling.type", "none")
        if kind == "none":
            return None
        # Any other kind than "linear" (yarn, longrope) goes through by its name and is refused with the configuration.
        return {"rope_type": str(kind), "factor": self._decimal("rope.scaling.factor", default=1.0)}

    def _number(self, key: str, *, default: int | None = None) -> int:
        key = f"{self._architecture}.{key}"
        value = self._file.metadata.get(key, default)
        least = 0 if default == 0 else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            # Per-layer lists (OpenELM, pruned models) end here too.
            shown = "not there" if value is None else repr(value)[:80]
            raise BuildError(f"{self._path}: metadata {key!r} is {shown}; one positive whole number is needed")
        return value

    def _decimal(self, key: str, *, default: float) -> float:
        key = f"{self._architecture}.{key}"
        value = self._file.metadata.get(key, default)
        if not isinstance(value, int | float) or not np.isfinite(value) or value <= 0:
            raise BuildError(f"{self._path}: metadata {key!r} is {repr(value)[:80]}; a positive number is needed")
        # float32 in the file: 9.999999747378752e-06 was meant to be 1e-05.
        return float(f"{value:.7g}")


def _half_split_rope_order(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's reordering of q or k rows, (num_heads * head_dim, ...) in and out.

    Its convert_hf_to_gguf.py moves rows from [first half, second half] of a head to pairs, as interleaved rope wants
    them; GroupQueryAttention and transformers rotate halves.
    """
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
