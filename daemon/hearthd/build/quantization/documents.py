"""The corpus as the model sees it: token ids, each document begun as every chat begins.

Knows the tokenizer and the corpus, no weights. Called by `builder` and `quality`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hearthd.build.quantization.corpus import Document
from hearthd.tokenizer import ChatTokenizer, Message

__all__ = ["MAX_DOCUMENT_TOKENS", "TokenDocument", "first_tokens", "tokenize"]

# A document's tokens beyond this are left out: the rest of a long one adds time and little else.
MAX_DOCUMENT_TOKENS = 1_024


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """A document's token ids and its kind, one of `corpus.KINDS` or `text`."""

    kind: str
    token_ids: tuple[int, ...]


def first_tokens(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """Return the token that every conversation starts with, or nothing if there is no such token.

    It carries activations a hundred times larger than the others' (it is what attention rests on), and its KV never
    changes: the bundle has it from the float32 graph.
    """
    user = Message("user", "Good morning.")
    plain = tokenizer.encode_chat([user])
    instructed = tokenizer.encode_chat([Message("system", "Answer in French."), user])
    return tuple(plain[:1]) if plain[:1] == instructed[:1] else ()


def tokenize(
    documents: Iterable[Document], tokenizer: ChatTokenizer, *, max_tokens: int, context_length: int
) -> tuple[TokenDocument, ...]:
    """Encode documents, at most `max_tokens` in all, of which each kind of text has an equal share.

    context_length: of the model; no document is longer.
    """
    longest = min(MAX_DOCUMENT_TOKENS, context_length)
    encoded = list(_encoded(documents, tokenizer, first_tokens(tokenizer), longest))
    kinds = list(dict.fromkeys(document.kind for document in encoded))
    of_kinds = [[document for document in encoded if document.kind == kind] for kind in kinds]
    return tuple(document for of_kind in of_kinds for document in _up_to(of_kind, max_tokens // len(kinds)))


def _encoded(
    documents: Iterable[Document], tokenizer: ChatTokenizer, begin: tuple[int, ...], longest: int
) -> Iterator[TokenDocument]:
    for document in documents:
        if document.messages is not None:
            messages = [Message(role, content) for role, content in document.messages]
            token_ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
        else:
            token_ids = [*begin, *tokenizer.encode_text(document.text or "")]
        # Two tokens are the fewest that have something to predict.
        if len(token_ids) > max(len(begin), 1) + 1:
            yield TokenDocument(document.kind, tuple(token_ids[:longest]))


def _up_to(documents: Sequence[TokenDocument], max_tokens: int) -> Iterator[TokenDocument]:
    left = max_tokens
    for document in documents:
        if left <= 8:
            return
        yield TokenDocument(document.kind, document.token_ids[:left])
        left -= len(document.token_ids)
