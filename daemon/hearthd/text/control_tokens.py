"""Keeps a caller's text from becoming a control token: marks it before the template, and tells it apart afterwards.

Every added token counts, whether it is flagged special or not, but for plain runs of white space, which Gemma lists
among them: those are text, in whoever's words they stand. Before a conversation is rendered, `mark` puts a mark,
one character that stands nowhere else, before each place in the callers' texts where a control token could begin, or
could be completed by the template's text beside it. After rendering, `split` takes as control tokens only what the
template itself wrote: no match may begin at a mark or reach across one. Texts without such places are not changed, so
that templates which look at them do what they do elsewhere.

Knows strings and ids, no vocabulary and no template. Called by `tokenizer`.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

from hearthd.errors import InvalidRequestError

__all__ = ["ControlToken", "ControlTokens"]

# Unicode's White_Space, which Rust's `\s` is; str.isspace also takes U+001C to U+001F.
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(code) for code in range(0x2000, 0x200B)
}
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token that a caller's text must never become; its flags are those of `tokenizer.json`."""

    token_id: int
    content: str
    is_special: bool = True
    is_normalized: bool = False
    strips_left: bool = False
    strips_right: bool = False
    is_single_word: bool = False
    is_added: bool = True
    """Whether `tokenizers` looks for it in text. If not, the template cannot write it either."""

    @property
    def is_text(self) -> bool:
        """Whether this is nothing but a run of line ends, tabs or spaces ("▁" in a vocabulary), and stands for them."""
        plain = not (self.is_special or self.is_normalized or self.strips_left or self.strips_right)
        return plain and not self.is_single_word and not self.content.strip("\t\n\r ▁")

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Read an entry of `added_tokens`."""
        return cls(
            token_id=entry["id"],
            content=entry["content"],
            is_special=entry["special"],
            is_normalized=entry["normalized"],
            strips_left=entry["lstrip"],
            strips_right=entry["rstrip"],
            is_single_word=entry["single_word"],
        )


class ControlTokens:
    """A model's control tokens, ready to be looked for. Cost is linear in the text, whatever it holds."""

    def __init__(self, tokens: Iterable[ControlToken]) -> None:
        self._by_content = {token.content: token for token in tokens}
        contents = list(self._by_content)
        # A match at every place where one begins, also inside of another.
        self._beginning = re.compile(f"(?={_longest_of(contents)})")
        self._most_edge = max(map(len, contents), default=1) - 1
        self._prefixes = {content[:size] for content in contents for size in range(1, len(content))}
        self._suffixes = {content[-size:] for content in contents for size in range(1, len(content))}
        # As `tokenizers` does: first those that are looked for in the text as it is, then, in what is left, the others.
        added = [token for token in self._by_content.values() if token.is_added]
        self._passes = [
            re.compile(_longest_of([token.content for token in added if token.is_normalized == late]))
            for late in (False, True)
        ]

    def mark(self, texts: Sequence[str], template: str) -> tuple[str, list[str]]:
        """Mark the places where a text could become, or could complete, a control token.

        template: the source of what will stand around the texts; its characters are not used as the mark.
        Returns the mark, "" if none was needed, and the texts. Raises InvalidRequestError if no character is free.
        """
        places = [self._places(text) for text in texts]
        if not any(places):
            return "", list(texts)
        mark = _free_character(chain(texts, [template], self._by_content))
        return mark, [_with_marks(text, at, mark) for text, at in zip(texts, places, strict=True)]

    def _places(self, text: str) -> list[int]:
        places = {match.start() for match in self._beginning.finditer(text)}
        # A template may strip a text, so its edges are looked at without and with the white space.
        for start, stop in {(0, len(text)), (len(text) - len(text.lstrip()), len(text.rstrip()))}:
            most = min(self._most_edge, stop - start)
            completes = any(text[start : start + size] in self._suffixes for size in range(1, most + 1))
            is_short = 0 < stop - start <= self._most_edge
            if completes or (is_short and any(text[start:stop] in content for content in self._by_content)):
                places.add(start)
            places.update(stop - size for size in range(1, most + 1) if text[stop - size : stop] in self._prefixes)
        return sorted(places)

    def split(self, rendered: str, mark: str) -> Iterator[tuple[int, str | ControlToken]]:
        """Cut a rendered conversation into its template's control tokens and the plain texts between them.

        Yields (the place in the text without marks, a token or a text that is not empty).
        """
        parts = rendered.split(mark) if mark else [rendered]
        text = "".join(parts)
        marks: list[int] = []
        for part in parts[:-1]:
            marks.append(len(part) + (marks[-1] if marks else 0))
        pieces: list[tuple[int, str | ControlToken]] = [(0, text)] if text else []
        for pattern in self._passes:
            pieces = [
                smaller
                for start, piece in pieces
                for smaller in (
                    self._find(pattern, piece, start, marks) if isinstance(piece, str) else [(start, piece)]
                )
            ]
        return iter(pieces)

    def _find(
        self, pattern: re.Pattern[str], text: str, offset: int, marks: Sequence[int]
    ) -> list[tuple[int, str | ControlToken]]:
        """Do as `find_matches` of `tokenizers` does, with marks as walls. offset: of `text` among the marks."""
        pieces: list[tuple[int, str | ControlToken]] = []
        done = 0
        for match in _matches(pattern, text, offset, marks):
            token = self._by_content[match[0]]
            start, stop = match.span()
            if token.is_single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])):
                continue
            while token.strips_left and start > done and text[start - 1] in _WHITE_SPACE:
                start -= 1
            while token.strips_right and stop < len(text) and text[stop] in _WHITE_SPACE:
                stop += 1
            if start < done:  # inside of the white space that the one before it took
                continue
            if start > done:
                pieces.append((offset + done, text[done:start]))
            pieces.append((offset + start, token))
            done = stop
        if done < len(text):
            pieces.append((offset + done, text[done:]))
        return pieces


def _matches(pattern: re.Pattern[str], text: str, offset: int, marks: Sequence[int]) -> Iterator[re.Match[str]]:
    """Find the leftmost longest matches that neither begin at a mark nor reach across one."""
    place = 0
    number = bisect_right(marks, offset)  # of the next mark after `place`
    starts_at_mark = number > 0 and marks[number - 1] == offset
    while True:
        wall = marks[number] - offset if number < len(marks) else len(text)
        wall = min(wall, len(text))
        while match := pattern.search(text, place, wall):
            if starts_at_mark and match.start() == place:
                place, starts_at_mark = place + 1, False
                continue
            yield match
            place, starts_at_mark = match.end(), False
        if wall == len(text):
            return
        place, starts_at_mark = wall, True
        number = bisect_right(marks, offset + wall)


def _longest_of(contents: Sequence[str]) -> str:
    """Write a pattern for the longest of these strings; one that never matches if there is none.

    A tree of shared beginnings: a plain alternation would try hundreds of reserved tokens at each of their beginnings.
    """
    if not contents:
        return r"(?!)"
    contents = sorted(contents)
    branches: list[str] = []
    start = 0
    while start < len(contents):
        first = contents[start]
        stop = start + 1
        if not first:
            start = stop
            continue
        while stop < len(contents) and contents[stop][0] == first[0]:
            stop += 1
        last = contents[stop - 1]
        size = next(
            (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
        )
        rests = sorted({content[size:] for content in contents[start:stop]})
        branch = re.escape(first[:size])
        if rests != [""]:
            branch += _longest_of(rests)
        branches.append(branch)
        start = stop
    return f"(?:{'|'.join(branches)}){'' if contents[0] else '?'}"


def _with_marks(text: str, places: Sequence[int], mark: str) -> str:
    return mark.join(text[start:stop] for start, stop in zip([0, *places], [*places, len(text)], strict=True))


def _free_character(texts: Iterable[str]) -> str:
    used = set().union(*texts)
    for code in chain(*_PRIVATE_USE):
        if chr(code) not in used:
            return chr(code)
    raise InvalidRequestError("messages", "use every private-use character of Unicode; leave at least one free")


def _is_word(character: str) -> bool:
    """Whether Rust's `\\w` takes it: letters, marks, decimal digits, connectors, joiners."""
    if not character:
        return False
    return unicodedata.category(character)[0] in "LM" or (
        unicodedata.category(character) in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"
    )
