"""Token ids to text, one at a time: what `tokenizers` would decode from all of them, as early as it is certain.

A tokenizer's decoder is a list of steps over token strings. Each step that the supported models use is done here again,
for a stream: its output, concatenated, equals that of the original on the whole list. Nothing is decoded twice, so the
cost of a token does not grow with the answer.

Knows no control tokens (`tokenizer` gives it none) and no stop strings. Called by `tokenizer`.
"""

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from hearthd.errors import BundleError

__all__ = ["IncrementalDecoder", "Step", "decoder_steps", "token_bytes"]

# Two characters that Rust's u8::from_str_radix(_, 16) takes.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>", re.ASCII)


class Step(Protocol):
    """One step of a decoder: pieces in, pieces out."""

    @property
    def is_holding(self) -> bool:
        """Whether a part of what came in has not come out, and will."""

    def push(self, piece: str) -> str:
        """Take the next piece; return what is certain now."""

    def flush(self) -> str:
        """Take the end; return the rest."""


class _Replace:
    """Replaces a string within every token."""

    is_holding = False

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content

    def push(self, piece: str) -> str:
        return piece.replace(self._pattern, self._content)

    def flush(self) -> str:
        return ""


class _ByteLevel:
    """Maps every character back to the byte that it stands for, and decodes UTF-8.

    Python's decoder and Rust's `from_utf8_lossy` both give one U+FFFD for each maximal ill-formed part.
    """

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def is_holding(self) -> bool:
        return self._utf8.getstate()[0] != b""

    def push(self, piece: str) -> str:
        return self._utf8.decode(_byte_level_bytes(piece))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteFallback:
    """Joins runs of byte tokens, such as <0xE2>.

    A run that is not UTF-8 as a whole becomes U+FFFD for each byte, the good characters in it too. So nothing of a run
    is certain before its end.
    """

    def __init__(self) -> None:
        self._run = bytearray()

    @property
    def is_holding(self) -> bool:
        return bool(self._run)

    def push(self, piece: str) -> str:
        byte = _BYTE_TOKEN.fullmatch(piece)
        if byte is None:
            return self.flush() + piece
        self._run.append(int(byte[1], 16))
        return ""

    def flush(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(run)


class _Metaspace:
    """Turns the space marks of every token into spaces, and drops those of the first one."""

    is_holding = False

    def __init__(self, mark: str, prepend_scheme: str) -> None:
        self._mark = mark
        self._first = " " if prepend_scheme == "never" else ""

    def push(self, piece: str) -> str:
        space, self._first = self._first, " "
        return piece.replace(self._mark, space)

    def flush(self) -> str:
        return ""


class _StripStart:
    """Drops a character from the beginning of the whole text, so many times."""

    is_holding = False

    def __init__(self, character: str, most: int) -> None:
        self._character = character
        self._left = most

    def push(self, piece: str) -> str:
        if not piece or not self._left:
            return piece
        start = 0
        while start < min(self._left, len(piece)) and piece[start] == self._character:
            start += 1
        self._left = self._left - start if start == len(piece) else 0
        return piece[start:]

    def flush(self) -> str:
        return ""


class _Spaced:
    """Puts a space between tokens: what a tokenizer without a decoder does."""

    is_holding = False

    def __init__(self) -> None:
        self._separator = ""

    def push(self, piece: str) -> str:
        separator, self._separator = self._separator, " "
        return separator + piece

    def flush(self) -> str:
        return ""


def _flat(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """List a decoder's steps, of `tokenizer.json`."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flat(part)]
    return [decoder]


def decoder_steps(decoder: Mapping[str, Any] | None) -> Callable[[], list[Step]]:
    """Read the `decoder` of a `tokenizer.json`; return what makes the steps for one answer.

    Raises BundleError for a decoder that cannot be streamed exactly.
    """
    configs = _flat(decoder)
    if not configs:
        return lambda: [_Spaced()]
    makers: list[Callable[[], Step]] = []
    # ByteFallback may join tokens, Fuse and ByteLevel join all: a step that works token by token comes before them, one
    # that works on the text after them.
    joined = "nothing"
    for config in configs:
        match config:
            case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if joined == "nothing":
                makers.append(partial(_Replace, pattern, content))
            case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme} if joined == "nothing":
                makers.append(partial(_Metaspace, mark, scheme))
            case {"type": "ByteFallback"} if joined == "nothing":
                makers.append(_ByteFallback)
                joined = "some"
            case {"type": "ByteLevel"} if joined == "nothing":
                makers.append(_ByteLevel)
                joined = "all"
            case {"type": "Fuse"}:
                joined = "all"
            case {"type": "Strip", "content": character, "start": most, "stop": 0} if joined == "all":
                makers.append(partial(_StripStart, character, most))
            case _:
                kinds = " + ".join(config["type"] for config in configs)
                raise BundleError(
                    f"tokenizer.json has the decoder {kinds}, whose part {config['type']} cannot be streamed there; "
                    "ByteLevel, Metaspace, and Replace + ByteFallback + Fuse + Strip can"
                )
    return lambda: [make() for make in makers]


def token_bytes(decoder: Mapping[str, Any] | None, token: str) -> bytes:
    """Give the bytes that a token stands for, wherever it stands: no space is dropped at the beginning."""
    for step in _flat(decoder):
        match step:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                token = token.replace(pattern, content)
            case {"type": "ByteFallback"} if byte := _BYTE_TOKEN.fullmatch(token):
                return bytes([int(byte[1], 16)])
            case {"type": "Metaspace", "replacement": str(mark)}:
                token = token.replace(mark, " ")
            case {"type": "ByteLevel"}:
                return _byte_level_bytes(token)
    return token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE. Source: Radford et al. 2019, GPT-2, encoder.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # an added token, which is plain text
        return token.encode()


class IncrementalDecoder:
    """Decodes one answer. `push` each token, `flush` at the end: together exactly the text of all tokens."""

    def __init__(self, steps: Sequence[Step], token_of: Callable[[int], str | None]) -> None:
        """`token_of`: a token's string, None if it has no text."""
        self._steps = steps
        self._token_of = token_of

    @property
    def is_holding(self) -> bool:
        """Whether text of some token has still to come: the first bytes of a character, say."""
        return any(step.is_holding for step in self._steps)

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now, whole characters."""
        text = self._token_of(token_id)
        if text is None:
            return ""
        for step in self._steps:
            text = step.push(text)
        return text

    def flush(self) -> str:
        """Take the end of the answer; return the rest. A broken character becomes U+FFFD, as in a full decode."""
        rest = ""
        for step in self._steps:
            rest = step.push(rest) + step.flush() if rest else step.flush()
        return rest
