"""The texts that a build runs a model on: the two sets that ship with Hearth, or a file of the user's own.

`calibration` decides how activations are scaled, `evaluation` how faithful the result is; the sets are disjoint and
`texts/README.md` says why. This module knows neither tokenizers nor chat templates: it hands out conversations as roles
and contents, and prose as text. The calibration and the quality check of a build call it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from hearthd.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.resources.abc import Traversable
    from pathlib import Path

Role: TypeAlias = Literal["system", "user", "assistant"]
CorpusName: TypeAlias = Literal["calibration", "evaluation"]

MAX_FILE_BYTES: Final = 8 * 1024 * 1024
"""A user's file must not be larger. At 4 bytes a token this is 2 million tokens: days of prefill on a board."""

MAX_DOCUMENT_CHARACTERS: Final = 4096
"""Paragraphs of a user's file are joined up to this length: about a thousand tokens, which fits every context."""

_CONVERSATION_KINDS: Final = ("chat", "home")
_TEXT_KINDS: Final = ("prose", "code", "numbers", "multilingual")
KINDS: Final = _CONVERSATION_KINDS + _TEXT_KINDS
"""The kinds of document that each of the two sets holds."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text or one conversation: exactly one of `text` and `messages` is set.

    kind: one of KINDS, or "text" for a user's own file.
    """

    kind: str
    text: str | None = None
    messages: tuple[tuple[Role, str], ...] | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise ValueError(f"a {self.kind} document needs either text or messages")


def load(which: CorpusName) -> tuple[Document, ...]:
    """Read one of the two sets that ship with Hearth, in a fixed order.

    Raises BuildError if the installation lacks the texts or they are damaged.
    """
    directory = resources.files("hearthd").joinpath("build", "quantization", "texts", which)
    documents: list[Document] = []
    for kind in _CONVERSATION_KINDS:
        name = f"{kind}.jsonl"
        # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
        lines = _read_shipped(directory, name).removesuffix("\n").split("\n")
        for number, line in enumerate(lines, start=1):
            documents.append(_conversation(kind, line, f"{which}/{name} line {number}"))
    for kind in _TEXT_KINDS:
        text = _read_shipped(directory, f"{kind}.txt")
        parts = _join_paragraphs(text) if kind == "prose" else (part.strip("\n") for part in text.split("\n---\n"))
        documents += [Document(kind=kind, text=part) for part in parts]
    return tuple(documents)


def from_file(path: Path) -> tuple[Document, ...]:
    """Read a user's own plain text file as documents of kind "text".

    Paragraphs (divided by blank lines) stay whole and are joined up to MAX_DOCUMENT_CHARACTERS; only a longer
    paragraph is cut. Raises BuildError if the file cannot be read, is too large, is not UTF-8 or holds no text.
    """
    try:
        with path.open("rb") as file:
            # One byte more than allowed tells a file that is too large, a growing one and a device too.
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BuildError(f"cannot read the text file {path}: {error.strerror}; check the path and its mode") from error
    if len(data) > MAX_FILE_BYTES:
        raise BuildError(f"the text file {path} is larger than the limit of {MAX_FILE_BYTES} bytes; pass a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BuildError(
            f"the text file {path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert it"
        ) from error
    if "\0" in text:
        raise BuildError(
            f"the text file {path} is not text: zero byte at offset {data.index(0)}; pass a plain text file"
        )
    documents = tuple(Document(kind="text", text=part) for part in _join_paragraphs(text))
    if not documents:
        raise BuildError(f"the text file {path} holds no text; pass a file with at least one paragraph")
    return documents


def _read_shipped(directory: Traversable, name: str) -> str:
    try:
        return directory.joinpath(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"the shipped text {directory.name}/{name} cannot be read; install Hearth again") from error


def _conversation(kind: str, line: str, where: str) -> Document:
    try:
        messages = tuple((_role(message["role"]), str(message["content"])) for message in json.loads(line)["messages"])
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(f"the shipped text {where} is not a conversation; install Hearth again") from error
    return Document(kind=kind, messages=messages)


def _role(value: object) -> Role:
    match value:
        case "system" | "user" | "assistant":
            return value
        case _:
            raise ValueError("unknown role")


def _join_paragraphs(text: str) -> Iterator[str]:
    """Yield runs of whole paragraphs, each run as long as MAX_DOCUMENT_CHARACTERS allows."""
    run = ""
    for paragraph in _paragraphs(text):
        joined = f"{run}\n\n{paragraph}" if run else paragraph
        if len(joined) <= MAX_DOCUMENT_CHARACTERS:
            run = joined
            continue
        if run:
            yield run
        *full, run = _pieces(paragraph)
        yield from full
    if run:
        yield run


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*text.replace("\r\n", "\n").split("\n"), ""]:
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            yield "\n".join(lines)
            lines = []


def _pieces(paragraph: str) -> list[str]:
    """Cut a paragraph into pieces of at most MAX_DOCUMENT_CHARACTERS, at a space or line end where there is one."""
    pieces: list[str] = []
    start = 0
    while start < len(paragraph):
        stop = start + MAX_DOCUMENT_CHARACTERS
        if stop < len(paragraph):
            cut = max(paragraph.rfind(mark, start, stop + 1) for mark in " \n")
            stop = cut if cut > start else stop
        pieces.append(paragraph[start:stop].strip())
        start = stop
    return [piece for piece in pieces if piece]
