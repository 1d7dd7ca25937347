"""Tiny random checkpoints of every supported architecture, as a Hugging Face directory and as GGUF, without torch.

The GGUF side does what llama.cpp's conversion does (its names, its order of q and k rows), written down here a second
time, so that reading back is proved against it. Used by the tests of checkpoints, builder and engine.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import gguf
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from chat_templates import GEMMA3, GRANITE, LLAMA3, PHI3, PHI4, QWEN2_5, QWEN3, SMOLLM2, SMOLLM3, ZEPHYR

Weights = dict[str, NDArray[np.float32]]
TokenizerStyle = Literal["smollm", "qwen2", "llama3", "smollm3", "granite", "phi4", "sentencepiece", "phi3", "gemma"]

CORPUS: Final = (
    """
The kettle is on and the lamp in the hall is low. What shall we cook tonight? There are two onions, a bag of lentils and
some rice. Please remind me at 18:45 to water the plants, and at 7:30 to feed the cat. It isn't raining any more; we'll
open the windows. They've moved the meeting to 12 March 2026, I'd say that's too early, and you're right to ask.
Die Tür zum Garten klemmt, die Küche riecht nach Kaffee. Où est le thé ? El niño comió una manzana. 今日はいい天気です。
Привет, как дела? Ελληνικά 🙂 👩‍👩‍👧 naïve café — “quoted”, x = 3.14159 * r ** 2; if (a < b) { return c[0]; } ...
def answer(question: str) -> str:
    return "yes" if question.endswith("?") else "no"
"""
    * 3
)

LLAMA3_ROPE: Final = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Of six pairs of features; the short ones hold up to the original length.
LONGROPE: Final = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5],
    "long_factor": [1.0, 1.3, 2.0, 4.0, 9.0, 16.0],
}


@dataclass(frozen=True, slots=True)
class TinyModel:
    """One tiny model: Hugging Face configuration (transformers 4 spelling), tokenizer style and chat template."""

    name: str
    gguf_architecture: str
    config: dict[str, Any]
    style: TokenizerStyle
    template: str
    pre: str
    generation: dict[str, Any] = field(default_factory=dict)

    def weights(self, seed: int = 0) -> Weights:
        """Random weights by Hugging Face name, of sizes that make the layers matter."""
        return random_weights(self.config, seed)


def _model(
    name: str, architecture: str, model_type: str, style: TokenizerStyle, template: str, pre: str, **changes: Any
) -> TinyModel:
    generation = changes.pop("generation", {})
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    } | changes
    tokenizer = make_tokenizer(style)
    config["vocab_size"] = -(-tokenizer.get_vocab_size() // 32) * 32
    start, end = _TURN[style]
    config["bos_token_id"] = tokenizer.token_to_id(start)
    config["eos_token_id"] = config["pad_token_id"] = tokenizer.token_to_id(end)
    return TinyModel(name, model_type.removesuffix("_text"), config, style, template, pre, generation)


# Style -> (bos token, eos token)
_TURN: Final = {
    "smollm": ("<|im_start|>", "<|im_end|>"),
    "qwen2": ("<|endoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "smollm3": ("<|begin_of_text|>", "<|im_end|>"),
    "granite": ("<|end_of_text|>", "<|end_of_text|>"),
    "phi4": ("<|endoftext|>", "<|endoftext|>"),
    "sentencepiece": ("<s>", "</s>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "gemma": ("<bos>", "<end_of_turn>"),
}


@cache
def tiny_models() -> dict[str, TinyModel]:
    """Every supported architecture, with each of its optional parts somewhere."""
    llama, qwen2, qwen3 = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
    models_ = [
        _model("smollm2", llama, "llama", "smollm", SMOLLM2, "smollm", tie_word_embeddings=True, rope_theta=100_000.0),
        _model("tinyllama", llama, "llama", "sentencepiece", ZEPHYR, "default"),
        _model(
            "llama3",
            llama,
            "llama",
            "llama3",
            LLAMA3,
            "llama-bpe",
            tie_word_embeddings=True,
            head_dim=32,
            rope_theta=500_000.0,
            rope_scaling=LLAMA3_ROPE,
            generation={"temperature": 0.6, "top_p": 0.9, "do_sample": True},
        ),
        _model("llama-bias", llama, "llama", "smollm", SMOLLM2, "smollm", attention_bias=True, num_key_value_heads=4),
        _model(
            "qwen2",
            qwen2,
            "qwen2",
            "qwen2",
            QWEN2_5,
            "qwen2",
            tie_word_embeddings=True,
            rope_theta=1_000_000.0,
            rms_norm_eps=1e-6,
            use_sliding_window=False,
            sliding_window=2048,
            max_window_layers=3,
            generation={"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
        ),
        _model(
            "qwen3",
            qwen3,
            "qwen3",
            "qwen2",
            QWEN3,
            "qwen2",
            tie_word_embeddings=True,
            head_dim=32,
            num_key_value_heads=1,
            attention_bias=False,
            rms_norm_eps=1e-6,
            rope_theta=1_000_000.0,
        ),
        _model(
            "smollm3",
            "SmolLM3ForCausalLM",
            "smollm3",
            "smollm3",
            SMOLLM3,
            "smaug-bpe",
            tie_word_embeddings=True,
            # Each fourth layer is without rope.
            num_hidden_layers=5,
            rope_theta=50_000.0,
            rms_norm_eps=1e-6,
        ),
        _model(
            "granite",
            "GraniteForCausalLM",
            "granite",
            "granite",
            GRANITE,
            "refact",
            tie_word_embeddings=True,
            embedding_multiplier=3.0,
            residual_multiplier=0.6,
            attention_multiplier=0.125,
            logits_scaling=0.5,
        ),
        # Full rope, and a window in each layer.
        _model("phi3", "Phi3ForCausalLM", "phi3", "phi3", PHI3, "default", sliding_window=9, num_key_value_heads=4),
        _model(
            "phi4",
            "Phi3ForCausalLM",
            "phi3",
            "phi4",
            PHI4,
            "gpt-4o",
            tie_word_embeddings=True,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=128,
            rope_scaling=LONGROPE,
            sliding_window=262_144,
        ),
        _model(
            "gemma3",
            "Gemma3ForCausalLM",
            "gemma3_text",
            "gemma",
            GEMMA3,
            "default",
            tie_word_embeddings=True,
            # A number of heads that is not hidden_size / head_dim, five layers of seven with a window.
            head_dim=32,
            num_key_value_heads=1,
            num_hidden_layers=7,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=32,
            sliding_window=7,
            sliding_window_pattern=6,
            rope_theta=1_000_000.0,
            rope_local_base_freq=10_000.0,
            rms_norm_eps=1e-6,
            generation={"temperature": 1.0, "top_k": 64, "top_p": 0.95},
        ),
    ]
    return {model.name: model for model in models_}


def random_weights(config: Mapping[str, Any], seed: int = 0) -> Weights:
    """Random weights by Hugging Face name."""
    random = np.random.default_rng(seed)
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    qkv_bias = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    is_gemma = config["model_type"] == "gemma3_text"
    # Gemma's norms multiply by 1 more than their weights.
    norm_mean = 0.0 if is_gemma else 1.0

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return (random.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)).astype(np.float32)

    def vector(size: int, mean: float) -> NDArray[np.float32]:
        return (mean + 0.2 * random.standard_normal(size)).astype(np.float32)

    # Not so large behind its multiplier that the layers would hardly change what the last token says.
    size = 4 / (math.sqrt(hidden) if is_gemma else config.get("embedding_multiplier", 1.0))
    weights: Weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden) * np.float32(size)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = vector(hidden, norm_mean)
        for name, rows in (("q", query), ("k", key), ("v", key)):
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(rows, hidden)
            if qkv_bias:
                weights[f"{prefix}.self_attn.{name}_proj.bias"] = vector(rows, 0.0)
        weights[f"{prefix}.self_attn.o_proj.weight"] = matrix(hidden, query)
        if config.get("attention_bias", False):
            weights[f"{prefix}.self_attn.o_proj.bias"] = vector(hidden, 0.0)
        if config["model_type"] in ("qwen3", "gemma3_text"):
            weights[f"{prefix}.self_attn.q_norm.weight"] = vector(head_dim, norm_mean)
            weights[f"{prefix}.self_attn.k_norm.weight"] = vector(head_dim, norm_mean)
        weights[f"{prefix}.post_attention_layernorm.weight"] = vector(hidden, norm_mean)
        if is_gemma:
            weights[f"{prefix}.pre_feedforward_layernorm.weight"] = vector(hidden, norm_mean)
            weights[f"{prefix}.post_feedforward_layernorm.weight"] = vector(hidden, norm_mean)
        weights[f"{prefix}.mlp.gate_proj.weight"] = matrix(inner, hidden)
        weights[f"{prefix}.mlp.up_proj.weight"] = matrix(inner, hidden)
        weights[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, inner)
        if config.get("mlp_bias", False):
            for name, rows in (("gate", inner), ("up", inner), ("down", hidden)):
                weights[f"{prefix}.mlp.{name}_proj.bias"] = vector(rows, 0.0)
        if config["model_type"] == "phi3":
            _fuse(
                weights, f"{prefix}.self_attn.qkv_proj.weight", [f"{prefix}.self_attn.{x}_proj.weight" for x in "qkv"]
            )
            _fuse(
                weights, f"{prefix}.mlp.gate_up_proj.weight", [f"{prefix}.mlp.{x}_proj.weight" for x in ("gate", "up")]
            )
    weights["model.norm.weight"] = vector(hidden, norm_mean)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return weights


def _fuse(weights: Weights, name: str, parts: list[str]) -> None:
    weights[name] = np.concatenate([weights.pop(part) for part in parts])


@cache
def make_tokenizer(style: TokenizerStyle) -> Tokenizer:
    """Train a small tokenizer whose parts are those of the family's."""
    if style in _FIRST_PIECES:
        return _sentencepiece_tokenizer(style)
    tokenizer = Tokenizer(models.BPE(ignore_merges=style in ("llama3", "smollm3")))
    tokenizer.pre_tokenizer = pre_tokenizer(style)
    tokenizer.decoder = decoders.ByteLevel()
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    first = {
        "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "granite": ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"],
    }.get(style, [])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=first, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    if style == "qwen2":
        tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    elif style == "llama3":
        tokenizer.add_special_tokens(
            ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        )
    elif style == "phi4":
        tokenizer.add_special_tokens(["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    elif style == "smollm3":
        tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"])
        tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return tokenizer


def pre_tokenizer(style: TokenizerStyle) -> pre_tokenizers.PreTokenizer:
    """How the family cuts text into words, as its tokenizer.json says."""
    if style in ("smollm", "granite"):
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if style == "phi4":
        return _split(O200K_PATTERN)
    digits = r"\p{N}" if style == "qwen2" else r"\p{N}{1,3}"
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return _split(pattern)


# Of GPT-4o's tokenizer, which Phi-4-mini has: an ending in capitals or small letters, contractions with their word.
O200K_PATTERN: Final = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# What stands before the bytes in a SentencePiece vocabulary.
_FIRST_PIECES: Final[Mapping[str, list[str]]] = {
    "sentencepiece": ["<unk>", "<s>", "</s>"],
    "phi3": ["<unk>", "<s>", "</s>"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
}
# Gemma has runs of line ends and of spaces as tokens, which its tokenizer.json also lists as added ones.
GEMMA_WHITE_SPACE: Final = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁"]


def _sentencepiece_tokenizer(style: TokenizerStyle) -> Tokenizer:
    """A SentencePiece BPE as converted by transformers: byte fallback, "▁" for a space, one before the text.

    Gemma's puts none before the text, and joins line ends and spaces before anything else.
    """
    is_gemma = style == "gemma"
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Without spaces inside of pieces, as SentencePiece keeps them.
    trained.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trained.train_from_iterator(
        CORPUS.splitlines(), trainers.BpeTrainer(vocab_size=330, limit_alphabet=60, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    white = GEMMA_WHITE_SPACE if is_gemma else []
    merges = [(run[:cut], run[cut:]) for run in white for cut in range(1, len(run))]
    merges.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
    merges += [(left, right) for left, right in model["merges"]]
    merged = [left + right for left, right in model["merges"]]
    letters = sorted(set(model["vocab"]) - set(merged))
    first = _FIRST_PIECES[style]
    pieces = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys([*white, *merged]), *letters]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = space if is_gemma else normalizers.Sequence([normalizers.Prepend("▁"), space])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if is_gemma else [*steps, decoders.Strip(" ", 1, 0)])
    # Phi-3's "</s>" takes the white space behind it along, as its turns' tokens do.
    ends = {"</s>"} if style == "phi3" else set()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=token in ends) for token in first])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in white])
    if style == "phi3":
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
        # Its line end belongs to a turn's token.
        turns = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=True) for token in turns])
    return tokenizer


def write_huggingface(
    path: Path,
    model: TinyModel,
    *,
    weights: Weights | None = None,
    dtype: Literal["F32", "F16", "BF16"] = "F32",
    num_shards: int = 1,
    transformers_5: bool = False,
    template: Literal["jinja", "string", "list"] = "jinja",
) -> Weights:
    """Write a checkpoint directory; returns the weights as they can be read back."""
    path.mkdir(parents=True, exist_ok=True)
    weights = model.weights() if weights is None else weights
    stored, readable = _as_dtype(weights, dtype)
    names = list(stored)
    if num_shards == 1:
        _write_safetensors(path / "model.safetensors", stored, dtype)
    else:
        where: dict[str, str] = {}
        for shard in range(num_shards):
            file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
            part = names[shard::num_shards]
            _write_safetensors(path / file, {name: stored[name] for name in part}, dtype)
            where |= dict.fromkeys(part, file)
        _write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    config = dict(model.config)
    if transformers_5:
        rope = (config.pop("rope_scaling") or {"rope_type": "default"}) | {"rope_theta": config.pop("rope_theta")}
        if "partial_rotary_factor" in config:
            rope["partial_rotary_factor"] = config.pop("partial_rotary_factor")
        if "rope_local_base_freq" in config:
            near = {"rope_type": "default", "rope_theta": config.pop("rope_local_base_freq")}
            rope = {"full_attention": rope, "sliding_attention": near}
            pattern = config.pop("sliding_window_pattern")
            kinds = ["full_attention", *["sliding_attention"] * (pattern - 1)]
            config["layer_types"] = [kinds[(index + 1) % pattern] for index in range(config["num_hidden_layers"])]
        config["rope_parameters"] = rope
        config["dtype"] = config.pop("torch_dtype")
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"eos_token_id": [config["eos_token_id"]], **model.generation})
    make_tokenizer(model.style).save(str(path / "tokenizer.json"))
    bos, eos = _TURN[model.style]
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": {"__type": "AddedToken", "content": eos, "normalized": False, "special": True},
        # transformers would otherwise take blanks before punctuation out of decoded text.
        "clean_up_tokenization_spaces": False,
    }
    if template == "jinja":
        (path / "chat_template.jinja").write_text(model.template, encoding="utf-8")
    elif template == "string":
        tokenizer_config["chat_template"] = model.template
    else:
        other = {"name": "tool_use", "template": "{{ tools }}"}
        tokenizer_config["chat_template"] = [other, {"name": "default", "template": model.template}]
    _write_json(path / "tokenizer_config.json", tokenizer_config)
    return readable


def _as_dtype(weights: Weights, dtype: str) -> tuple[dict[str, NDArray[Any]], Weights]:
    if dtype == "F32":
        return dict(weights), weights
    if dtype == "F16":
        halves = {name: values.astype(np.float16) for name, values in weights.items()}
        return dict(halves), {name: values.astype(np.float32) for name, values in halves.items()}
    # bfloat16 by cutting: the upper two bytes of each float32.
    upper = {name: (values.view(np.uint32) >> 16).astype(np.uint16) for name, values in weights.items()}
    return dict(upper), {name: (values.astype(np.uint32) << 16).view(np.float32) for name, values in upper.items()}


def _write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]], dtype: str) -> None:
    if dtype != "BF16":
        safetensors.numpy.save_file({name: np.ascontiguousarray(each) for name, each in tensors.items()}, path)
        return
    # NumPy has no bfloat16, so the file is put together here: length of the header, header, data.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, each in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(each.shape), "data_offsets": [end, end + each.nbytes]}
        end += each.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(each.tobytes() for each in tensors.values()))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


_GGUF_NAMES: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
_GEMMA_GGUF_NAMES: Final = _GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


# Conversions that derive from llama's, and with it from its order of q and k rows.
_PERMUTED: Final = ("llama", "smollm3", "granite")


def write_gguf(
    path: Path,
    model: TinyModel,
    *,
    weights: Weights | None = None,
    encoding: str = "F32",
    more: Weights | None = None,
    **metadata: Any,
) -> Weights:
    """Write a GGUF file as llama.cpp's conversion would; returns the weights as they can be read back.

    Matrices are stored in `encoding`, norms and biases in F32. `more` are tensors by their GGUF names; `metadata`
    replaces single entries, dots written "__".
    """
    weights = model.weights() if weights is None else weights
    config = model.config
    writer = gguf.GGUFWriter(path, model.gguf_architecture)
    writer.add_name(model.name)
    writer.add_license("apache-2.0")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(int(config["head_dim"] * config.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, model)
    if model.gguf_architecture == "granite":
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if model.gguf_architecture == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    if model.gguf_architecture == "phi3":
        _add_phi3(writer, config)
    elif config["rope_scaling"]:
        writer.add_tensor("rope_freqs.weight", llama3_rope_factors(config))
    for key, value in metadata.items():
        _add(writer, key.replace("__", "."), value)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    quantization = gguf.GGMLQuantizationType[encoding]
    readable: Weights = {}
    for name, values in weights.items():
        readable[name] = values
        if values.ndim == 2:
            stored = gguf.quants.quantize(values, quantization)
            readable[name] = np.array(gguf.quants.dequantize(stored, quantization), np.float32)
        written = _reorder(name, values, config) if model.gguf_architecture in _PERMUTED else values
        names = _GEMMA_GGUF_NAMES if model.gguf_architecture == "gemma3" else _GGUF_NAMES
        if values.ndim == 2:
            stored = gguf.quants.quantize(written, quantization)
            writer.add_tensor(_gguf_name(name, names), stored, raw_dtype=quantization)
            continue
        if model.gguf_architecture == "gemma3":
            # Every norm is written as what it multiplies by; there are no other vectors.
            written = values + np.float32(1)
            readable[name] = written - np.float32(1)
        writer.add_tensor(_gguf_name(name, names), written)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return readable


def _add_phi3(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """As Phi3MiniModel of the conversion does: a window of 0 for none, the attention factor computed."""
    original = config.get("original_max_position_embeddings", config["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_sliding_window(config.get("sliding_window") or 0)
    if config["rope_scaling"]:
        scale = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for kind in ("long", "short"):
            factors = np.asarray(config["rope_scaling"][f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)


def _gguf_name(name: str, names: Mapping[str, str]) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{names[part]}.{kind}"
    return f"{names[stem]}.{kind}"


def _reorder(name: str, values: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """LlamaModel.permute of convert_hf_to_gguf.py, row by row: row 2i of a head is row i, row 2i+1 is row i + half."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return values
    half = config["head_dim"] // 2
    order = [
        head + offset + pair for head in range(0, len(values), 2 * half) for pair in range(half) for offset in (0, half)
    ]
    return np.ascontiguousarray(values[order])


def llama3_rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32]:
    """What Llama 3's inverse frequencies are divided by, as convert_hf_to_gguf.py's generate_extra_tensors has it."""
    rope = config["rope_scaling"]
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for dimension in range(0, config["head_dim"], 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (dimension / config["head_dim"])
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def _add_tokenizer(writer: gguf.GGUFWriter, model: TinyModel) -> None:
    content = json.loads(make_tokenizer(model.style).to_str())
    tokens: dict[int, str] = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    for token_id in range(len(tokens), model.config["vocab_size"]):
        tokens[token_id], types[token_id] = f"[PAD{token_id}]", gguf.TokenType.UNUSED
    if model.style in _FIRST_PIECES:
        for token_id, token in tokens.items():
            if token.startswith("<0x"):
                types[token_id] = gguf.TokenType.BYTE
            if token == "<unk>":
                types[token_id] = gguf.TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        # Better pieces come first, as sentencepiece numbers them; control and byte tokens score 0.
        first = len(_FIRST_PIECES[model.style]) + 256
        scores = {token_id: min(0.0, first - 1.0 - token_id) for token_id in tokens}
        # What the conversion gives to all that tokenizer_config.json lists.
        scores |= {added["id"]: -1000.0 for added in content["added_tokens"]}
        writer.add_token_scores([scores[token_id] for token_id in sorted(tokens)])
        if model.style == "gemma":
            writer.add_add_space_prefix(False)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_tokenizer_pre(model.pre)
    writer.add_token_list([tokens[token_id] for token_id in sorted(tokens)])
    writer.add_token_types([types[token_id] for token_id in sorted(tokens)])
    writer.add_bos_token_id(model.config["bos_token_id"])
    writer.add_eos_token_id(model.config["eos_token_id"])
    writer.add_chat_template(model.template)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    for data in writer.kv_data:
        data.pop(key, None)
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
