"""Encodes text into a model's tokens, but never into a control token.

`tokenizers` looks for added tokens in any text that it is given. Here it is given none to look for but those that are
text (`ControlToken.is_text`); and where the vocabulary itself has the text of a control token in reach, that entry gets
a name which no text can have. Each id that comes out is checked all the same.

Knows no conversation and no template. Called by `tokenizer`.
"""

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from hearthd.errors import BundleError, InvalidRequestError

__all__ = ["PlainTextEncoder"]


class PlainTextEncoder:
    """The tokenizer of a model without its added tokens."""

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any], control_ids: Collection[int]) -> None:
        """tokenizer: the model's own, not changed. config: its `to_str()`, parsed. control_ids: what never comes out.

        Raises BundleError if the vocabulary cannot do without them.
        """
        self._control_ids = frozenset(control_ids)
        model = _model_out_of_reach(config["model"], self._control_ids)
        if model is None:
            source = tokenizer
        else:
            source = Tokenizer.from_str(
                json.dumps({**config, "model": model, "added_tokens": [], "post_processor": None})
            )
        # Both share the model, which is most of a tokenizer's memory: 40 MB for 49,152 tokens.
        text = [entry["content"] for entry in config["added_tokens"] if entry["id"] not in self._control_ids]
        self._beginning = _bare(source, config["pre_tokenizer"], text)
        self._later = _bare(source, _without_first_space(config["pre_tokenizer"]), text)

    def encode(self, field: str, text: str, *, is_beginning: bool = True) -> list[int]:
        """Encode a text that has been checked to be Unicode.

        field: the request field that is named if it cannot be encoded. is_beginning: whether nothing stands before the
        text; some tokenizers put a space before the first word of all.
        Raises InvalidRequestError for a character that the vocabulary cannot express.
        """
        try:
            ids = (self._beginning if is_beginning else self._later).encode(text, add_special_tokens=False).ids
        except Exception as error:  # the only type that tokenizers raises
            raise InvalidRequestError(field, "has a character that the model's vocabulary cannot express") from error
        if not self._control_ids.isdisjoint(ids):
            raise InvalidRequestError(field, "has a character that the model's vocabulary cannot express")
        return list(ids)


def _bare(source: Tokenizer, pre_tokenizer: Mapping[str, Any] | None, added_text: Sequence[str]) -> Tokenizer:
    bare = Tokenizer(source.model)
    if source.normalizer is not None:
        bare.normalizer = source.normalizer
    if pre_tokenizer is not None:
        bare.pre_tokenizer = _pre_tokenizer(pre_tokenizer)
    # Those that the vocabulary has keep their ids; another one would get an id of something else.
    known = [AddedToken(text, normalized=False) for text in added_text if source.model.token_to_id(text) is not None]
    bare.add_tokens(known)
    return bare


def _pre_tokenizer(config: Mapping[str, Any]) -> pre_tokenizers.PreTokenizer:
    # The library reads a single part only as part of a whole tokenizer.
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    part = Tokenizer.from_str(
        json.dumps({"version": "1.0", "model": empty, "pre_tokenizer": config, "added_tokens": []})
    )
    result: pre_tokenizers.PreTokenizer = part.pre_tokenizer
    return result


def _without_first_space(config: Any) -> Any:
    """Change every Metaspace that puts a space before the first word of all into one that puts none."""
    if isinstance(config, list):
        return [_without_first_space(part) for part in config]
    if not isinstance(config, dict):
        return config
    if config.get("type") == "Metaspace" and config.get("prepend_scheme") == "first":
        return {**config, "prepend_scheme": "never"}
    return {key: _without_first_space(value) for key, value in config.items()}


def _model_out_of_reach(model: Mapping[str, Any], control_ids: Collection[int]) -> dict[str, Any] | None:
    """Rename the vocabulary entries of control tokens, so that no text leads to them; None if none does anyway."""
    nonce = secrets.token_hex(16)
    match model:
        case {"type": "Unigram", "vocab": list(pieces)}:
            renamed = [
                [f"{nonce}{place}", score] if place in control_ids else [piece, score]
                for place, (piece, score) in enumerate(pieces)
            ]
            return {**model, "vocab": renamed} if renamed != pieces else None
        case {"type": "BPE", "vocab": dict(vocab)}:
            names = {token for token, token_id in vocab.items() if token_id in control_ids}
            merges = [pair for pair in model["merges"] if names.isdisjoint((*pair, _merged(model, pair)))]
            if not _has_direct_way(model, names) and len(merges) == len(model["merges"]):
                return None
            return _renamed(model, names, nonce) | {"merges": merges}
        case {"type": "WordLevel" | "WordPiece", "vocab": dict(vocab)}:
            names = {token for token, token_id in vocab.items() if token_id in control_ids}
            return _renamed(model, names, nonce) if names else None
        case _:
            raise BundleError(f"tokenizer.json has the model {model['type']}; BPE, Unigram and WordLevel are supported")


def _renamed(model: Mapping[str, Any], names: Collection[str], nonce: str) -> dict[str, Any]:
    vocab = {f"{nonce}{token_id}" if name in names else name: token_id for name, token_id in model["vocab"].items()}
    unknown = model.get("unk_token")
    if unknown in names:
        unknown = f"{nonce}{model['vocab'][unknown]}"
    return {**model, "vocab": vocab, "unk_token": unknown}


def _merged(model: Mapping[str, Any], pair: list[str]) -> str:
    prefix = model.get("continuing_subword_prefix") or ""
    return pair[0] + pair[1].removeprefix(prefix)


def _has_direct_way(model: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether text can become one of these tokens without a merge."""
    characters = {name for name in names if len(name) == 1}
    if characters and not model["byte_fallback"] and model["unk_token"] is None:
        # Without it, the character would be left out of every text without a word.
        raise BundleError(
            f"tokenizer.json has the added token {characters.pop()!r}, which is a character of its alphabet"
        )
    return bool(characters) or (bool(names) and model["ignore_merges"])
