"""How text is cut into words, by the names that llama.cpp gives to pre-tokenizers, as parts of a `tokenizers` file.

Knows no vocabulary and no GGUF. Called by gguf_tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["IGNORES_MERGES", "NORMALIZES_NFC", "PRE_TOKENIZERS", "byte_level"]

# The patterns are the models' own (their tokenizer.json); the names are llama.cpp's (convert_hf_to_gguf_update.py).
_LLAMA3_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-4o's (o200k), which Phi-4-mini has.
_O200K_WORDS: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
_O200K_PATTERN: Final = "|".join(_O200K_WORDS) + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2_PATTERN: Final = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    """Write down the step that makes bytes to letters; use_regex: and cuts text into words as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level(use_regex=False)]}


_GPT2: Final = byte_level(use_regex=True)
_SMOLLM: Final[dict[str, Any]] = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2],
}
PRE_TOKENIZERS: Final[Mapping[str, dict[str, Any]]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "gpt-4o": _split(_O200K_PATTERN),
    "llama-bpe": _split(_LLAMA3_PATTERN),
    "llama3": _split(_LLAMA3_PATTERN),
    # What llama.cpp takes Llama 3's for where no text begins with a token: SmolLM3.
    "smaug-bpe": _split(_LLAMA3_PATTERN),
    "llama-v3": _split(_LLAMA3_PATTERN),
    "qwen2": _split(_QWEN2_PATTERN),
    "deepseek-r1-qwen": _split(_QWEN2_PATTERN),
}
# Words that are tokens as a whole are taken without going through the merges.
IGNORES_MERGES: Final = frozenset({"llama-bpe", "llama3", "llama-v3", "smaug-bpe"})
NORMALIZES_NFC: Final = frozenset({"qwen2"})
