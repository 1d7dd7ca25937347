"""The tokenizer of a GGUF file, written as the `tokenizers` JSON that the original checkpoint has.

GGUF keeps a vocabulary, scores or merges, a type for each token and the name of a pre-tokenizer; the rest is known by
that name. Gives the same ids as the original for any text (tests compare). Knows nothing of weights. Called by
gguf_checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from tokenizers import Tokenizer

from hearthd.build.checkpoints.gguf_pre_tokenizers import IGNORES_MERGES, NORMALIZES_NFC, PRE_TOKENIZERS, byte_level
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hearthd.build.checkpoints.gguf_file import MetadataValue


class TokenType(IntEnum):
    """tokenizer.ggml.token_type, as in llama.h."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """A `tokenizers` file's text, and what a chat template needs beside it."""

    json: str
    chat_template: str
    bos_id: int | None
    bos_token: str
    eos_ids: tuple[int, ...]
    eos_token: str


# Control tokens that end a turn or a text, whichever of them tokenizer.ggml.eos_token_id names.
_END_TOKENS: Final = frozenset(
    {
        *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "</s>"),
        *("<eos>", "<end_of_turn>"),
    }
)
# No file says it: the line end behind one of Phi-3's tokens belongs to the token, but for these. As in llama.cpp.
_PHI3_WITHOUT_LINE_END: Final = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_MAX_VOCABULARY: Final = 1_048_576


def read_tokenizer(path: Path, metadata: Mapping[str, MetadataValue]) -> GgufTokenizer:
    """Make the tokenizer file of a GGUF file. `path` is only for messages.

    Raises BuildError when the file has no tokenizer or template, or one of a kind that would be tokenised wrongly.
    """
    return _Conversion(path, metadata).convert()


class _Conversion:
    def __init__(self, path: Path, metadata: Mapping[str, MetadataValue]) -> None:
        self._path = path
        self._metadata = metadata
        self._tokens = self._strings("tokenizer.ggml.tokens")
        if not 1 <= len(self._tokens) <= _MAX_VOCABULARY:
            raise self._error(f"has {len(self._tokens)} tokens; 1 to {_MAX_VOCABULARY} are allowed")
        if len(set(self._tokens)) != len(self._tokens):
            raise self._error("has two tokens of the same text")
        self._types = self._token_types()

    def convert(self) -> GgufTokenizer:
        model = self._metadata.get("tokenizer.ggml.model")
        if model == "gpt2":
            content = self._byte_level_bpe()
        elif model == "llama":
            content = self._sentencepiece_bpe()
        else:
            raise self._error(f"has a {model!r} tokenizer; gpt2 (byte-level BPE) and llama (SentencePiece) work")
        text = json.dumps(content, ensure_ascii=False)
        self._verify(text, content["added_tokens"])
        bos_id = self._token_id("bos_token_id")
        eos_id = self._token_id("eos_token_id")
        if eos_id is None:
            raise self._error("has no tokenizer.ggml.eos_token_id, so that an answer would never end")
        return GgufTokenizer(
            json=text,
            chat_template=self._chat_template(),
            bos_id=bos_id,
            bos_token="" if bos_id is None else self._tokens[bos_id],
            eos_ids=self._end_ids(eos_id),
            eos_token=self._tokens[eos_id],
        )

    def _byte_level_bpe(self) -> dict[str, Any]:
        name = self._metadata.get("tokenizer.ggml.pre")
        if str(self._metadata.get("general.architecture")).startswith("gemma"):
            # What the conversion writes where the SentencePiece file is missing: pieces of another kind.
            raise self._error("has a Gemma vocabulary without scores; build from the Hugging Face checkpoint instead")
        if not isinstance(name, str) or name not in PRE_TOKENIZERS:
            found = "names no pre-tokenizer (an old conversion)" if name is None else f"has the pre-tokenizer {name!r}"
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise self._error(f"{found}; these are known: {known}. Build from the Hugging Face checkpoint instead")
        merges = [tuple(merge.split(" ")) for merge in self._strings("tokenizer.ggml.merges")]
        if any(len(merge) != 2 for merge in merges):
            raise self._error("has a merge that is not two tokens with a space between")
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            "normalizer": {"type": "NFC"} if name in NORMALIZES_NFC else None,
            "pre_tokenizer": PRE_TOKENIZERS[name],
            "post_processor": None,
            "decoder": byte_level(use_regex=True),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": name in IGNORES_MERGES,
                "vocab": self._vocabulary(),
                "merges": merges,
            },
        }

    def _sentencepiece_bpe(self) -> dict[str, Any]:
        add_space = self._metadata.get("tokenizer.ggml.add_space_prefix", True)
        prepend = [{"type": "Prepend", "prepend": "▁"}] if add_space else []
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_space else []
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        restore = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        unknown = [token for token, kind in zip(self._tokens, self._types, strict=True) if kind == TokenType.UNKNOWN]
        vocabulary = self._vocabulary()
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": unknown[0] if unknown else None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": vocabulary,
                "merges": self._merges_from_scores(vocabulary),
            },
        }

    def _merges_from_scores(self, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
        """SentencePiece joins the pair whose piece scores best: one merge for each way to cut a piece in two.

        Order as in transformers' `generate_merges`: by score, then as the pieces stand in the vocabulary. Gemma's runs
        of line ends and spaces, which a file marks as added tokens, are pieces too, and better than any other.
        """
        scores = self._metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) != len(self._tokens):
            raise self._error("has no tokenizer.ggml.scores for its tokens")
        merges: list[tuple[float, str, str]] = []
        for token, score, kind in zip(self._tokens, scores, self._types, strict=True):
            is_white_space = kind == TokenType.USER_DEFINED and not token.strip("\t\n▁")
            if kind != TokenType.NORMAL and not is_white_space:
                continue
            if not isinstance(score, int | float) or score != score:
                raise self._error("has a score that is not a number")
            cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            halves = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
            halves.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
            merges += [(0.0 if is_white_space else score, left, right) for left, right in halves]
        merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
        return [(left, right) for _, left, right in merges]

    def _vocabulary(self) -> dict[str, int]:
        """All tokens but unused ones, and but the added tokens at the end, which `tokenizers` numbers on from here."""
        added = (TokenType.CONTROL, TokenType.USER_DEFINED)
        end = len(self._tokens)
        while end and self._types[end - 1] == TokenType.UNUSED:
            end -= 1
        while end and self._types[end - 1] in added:
            end -= 1
        # A hole before the end would shift the numbers.
        holes = TokenType.UNUSED in self._types[:end]
        return {
            token: token_id
            for token_id, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind != TokenType.UNUSED and (token_id < end or holes)
        }

    def _added_tokens(self) -> list[dict[str, Any]]:
        is_phi3 = (
            self._metadata.get("general.architecture") == "phi3"
            and self._metadata.get("tokenizer.ggml.model") == "llama"
        )
        special = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
        return [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": is_phi3 and token not in _PHI3_WITHOUT_LINE_END,
                "normalized": False,
                "special": special[kind],
            }
            for token_id, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind in special
        ]

    def _end_ids(self, eos_id: int) -> tuple[int, ...]:
        named = [self._token_id("eot_token_id"), self._token_id("eom_token_id")]
        known = [
            token_id
            for token_id, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind == TokenType.CONTROL and token in _END_TOKENS
        ]
        others = {token_id for token_id in (*named, *known) if token_id is not None} - {eos_id}
        return (eos_id, *sorted(others))

    def _chat_template(self) -> str:
        template = self._metadata.get("tokenizer.chat_template")
        if not isinstance(template, str) or not template.strip():
            raise self._error("has no chat template (a base model?); build from an instruct or chat model")
        return template

    def _token_types(self) -> list[TokenType]:
        values = self._metadata.get("tokenizer.ggml.token_type", [int(TokenType.NORMAL)] * len(self._tokens))
        if not isinstance(values, list) or len(values) != len(self._tokens):
            raise self._error("has not one tokenizer.ggml.token_type for each token")
        known = {int(kind): kind for kind in TokenType}
        # `in` on a dict of ints also takes True for 1; a hostile file gains nothing by that.
        if any(value not in known for value in values):
            raise self._error("has a tokenizer.ggml.token_type outside of 1 to 6")
        return [known[int(value)] for value in values]

    def _token_id(self, key: str) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self._tokens):
            raise self._error(f"has tokenizer.ggml.{key} {value!r}; it has {len(self._tokens)} tokens")
        return value

    def _strings(self, key: str) -> list[str]:
        values = self._metadata.get(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self._error(f"has no {key}, a list of strings")
        return [str(value) for value in values]

    def _verify(self, text: str, added_tokens: list[dict[str, Any]]) -> None:
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise self._error(f"has a tokenizer that does not load: {ascii(str(error))[:200]}") from error
        for token in added_tokens:
            if tokenizer.token_to_id(token["content"]) != token["id"]:
                raise self._error(f"has the added token {token['content']!r} at an id that `tokenizers` cannot give it")

    def _error(self, message: str) -> BuildError:
        return BuildError(f"{self._path}: {message}")
