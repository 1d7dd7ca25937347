"""The corpus as the model sees it: token ids, each document begun as every chat begins.

Knows the tokenizer and the corpus, no weights. Called by `builder` and `quality`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hearthd.build.quantization.corpus import Document
from hearthd.text.tokenizer import ChatTokenizer, Message

__all__ = ["MAX_DOCUMENT_TOKENS", "TokenDocument", "first_tokens", "num_shared", "tokenize"]

# A document's tokens beyond this are left out: the rest of a long one adds time and little else.
MAX_DOCUMENT_TOKENS = 1_024


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """A document's token ids and its kind, one of `corpus.KINDS` or `text`.

    num_given: how many of the first are the chat template's and not the document's.
    """

    kind: str
    token_ids: tuple[int, ...]
    num_given: int = 0


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
            token_ids, num_given = tokenizer.encode_chat(messages, add_generation_prompt=False), 0
        else:
            token_ids, num_given = _as_served(document.text or "", tokenizer)
        # Two tokens are the fewest that have something to predict.
        if min(len(token_ids), longest) > max(len(begin), num_given - 1, 1) + 1:
            yield TokenDocument(document.kind, tuple(token_ids[:longest]), num_given)


def _as_served(text: str, tokenizer: ChatTokenizer) -> tuple[list[int], int]:
    """Return a text as a chat's message has it, up to its end, and how many tokens the template puts before it.

    Not just behind the first token of all chats: what stands there is always a role, and some models have a state of
    their own for anything else, which would be judged although no chat ever comes to it.
    """
    token_ids, other = (
        tokenizer.encode_chat([Message("user", each)], add_generation_prompt=False) for each in (text, f"- {text} -")
    )
    before = num_shared(token_ids, other)
    behind = min(num_shared(token_ids[::-1], other[::-1]), len(token_ids) - before)
    return token_ids[: len(token_ids) - behind], before


def num_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return with how many equal tokens both begin."""
    return next((n for n, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))


def _up_to(documents: Sequence[TokenDocument], max_tokens: int) -> Iterator[TokenDocument]:
    left = max_tokens
    for document in documents:
        if left <= 8:
            return
        given = document.num_given
        yield TokenDocument(document.kind, document.token_ids[: given + left], given)
        left -= len(document.token_ids) - given
