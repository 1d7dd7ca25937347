"""Phrases of a policy, compiled to one automaton that reads each character once.

A phrase is compared literally, but for `?`, any one character but a space, and `*`, any run of letters and digits or
none; a backslash before one of the three means the character itself. Each element of a phrase is one bit of a whole
number: reading a character is a shift and a few ANDs for all phrases together (Shift-And, Baeza-Yates and Gonnet 1992),
so the cost of a text is its length times the size of the policy, whatever the one and the other say.

Knows no rules: whoever compiles gives each phrase an owner. Called by `rules` and `search`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from hearthd.policy.folding import Folder, Kind

__all__ = ["MAX_PHRASE_UNITS", "Automaton", "Phrase", "read_phrase"]

MAX_PHRASE_UNITS: Final = 128
_MAX_WILDCARDS: Final = 4


@dataclass(frozen=True, slots=True)
class _Element:
    """What one unit of a text has to be; None: any. is_repeated: a run of letters may follow. is_letter: of a run."""

    char: str | None
    is_mark: bool = False
    is_repeated: bool = False
    is_letter: bool = False


@dataclass(frozen=True, slots=True)
class Phrase:
    """A phrase that has been read. More than one alternative only if it begins with `*`."""

    alternatives: tuple[tuple[_Element, ...], ...]
    is_whole_words: bool

    @property
    def size(self) -> int:
        """Bits that it takes."""
        return sum(map(len, self.alternatives))

    @property
    def varies(self) -> bool:
        """Whether it has wildcards."""
        return any(map(_varies, self.alternatives))


def read_phrase(text: str, *, is_whole_words: bool) -> Phrase:
    """Read a phrase. Raises ValueError that says what is wrong with it."""
    elements: list[_Element] = []
    begins_with_run = False
    num_wildcards = 0
    for part in _parts(" ".join(text.split())):
        if isinstance(part, str):
            elements += _literal(part)
            continue
        num_wildcards += 1
        if part is _ANY:
            elements.append(_Element(None))
        elif elements:
            elements[-1] = replace(elements[-1], is_repeated=True)
        else:
            begins_with_run = True
    if all(element.char in (None, " ") for element in elements):
        raise ValueError("has nothing but spaces and wildcards; give a word")
    if num_wildcards > _MAX_WILDCARDS:
        raise ValueError(f"has {num_wildcards} wildcards; give at most {_MAX_WILDCARDS}")
    if len(elements) >= MAX_PHRASE_UNITS:
        raise ValueError(f"has {len(elements)} characters; give fewer than {MAX_PHRASE_UNITS}")
    alternatives = [tuple(elements)]
    if begins_with_run and is_whole_words:  # otherwise it says nothing: the phrase may begin anywhere
        alternatives.append((_Element(None, is_repeated=True, is_letter=True), *elements))
    return Phrase(tuple(alternatives), is_whole_words)


class _Wildcard:
    """`?` or `*`."""


_ANY: Final = _Wildcard()
_RUN: Final = _Wildcard()


def _parts(text: str) -> list[str | _Wildcard]:
    parts: list[str | _Wildcard] = []
    literal = ""
    characters = iter(text)
    for character in characters:
        if character in "?*":
            parts += [literal] if literal else []
            parts.append(_ANY if character == "?" else _RUN)
            literal = ""
            continue
        if character == "\\":
            character = next(characters, "")  # noqa: PLW2901
            if character not in ("\\", "?", "*"):
                raise ValueError("has a backslash before neither *, ? nor another backslash; write two for one")
        literal += character
    return [*parts, literal] if literal else parts


def _literal(text: str) -> list[_Element]:
    folder = Folder()
    units = [*folder.push(text), *folder.flush()]
    if units and units[0].kind is Kind.MARK:
        raise ValueError("has a combining mark without its letter; write the letter before it")
    return [_Element(unit.char, is_mark=unit.kind is Kind.MARK) for unit in units]


@dataclass(slots=True)
class Automaton:
    """All phrases side by side. Bit i set: element i was reached. Owners are whatever numbers the caller has chosen."""

    symbols: dict[str, int] = field(default_factory=dict)
    """For each character that is no mark, the elements that it may be; for those not here, `any` alone."""
    marks: dict[str, int] = field(default_factory=dict)
    """The same for combining marks, which are never a whole character."""
    any: int = 0
    letter: int = 0
    """Those of `any` that must be a letter or digit: a run that begins a phrase."""
    repeated: int = 0
    first: int = 0
    """Elements that begin a phrase."""
    first_within_word: int = 0
    """Those of them that may do so within a word."""
    not_first: int = 0
    last: int = 0
    last_within_word: int = 0
    owner_of: dict[int, int] = field(default_factory=dict)
    """Of each last element."""
    width_of: dict[int, int] = field(default_factory=dict)
    """Of each last element, the units of every match; not of phrases with wildcards, whose matches vary.

    Those with wildcards have the low bits, so that the numbers are small where only they matter; then come the others
    by width, so that of several that end together the highest bit is the one that began first.
    """
    varying: int = 0
    """The elements of phrases with wildcards."""

    @classmethod
    def of(cls, phrases: Iterable[tuple[Phrase, int]]) -> "Automaton":
        """Compile phrases with their owners."""
        automaton = cls()
        parts = [(elements, owner, phrase) for phrase, owner in phrases for elements in phrase.alternatives]
        parts.sort(key=lambda part: (0, 0, part[1]) if _varies(part[0]) else (1, len(part[0]), -part[1]))
        place = 0
        for elements, owner, phrase in parts:
            automaton._add(place, elements, owner, is_whole_words=phrase.is_whole_words)
            place += len(elements)
        automaton.not_first = (1 << place) - 1 & ~automaton.first
        for char in automaton.symbols:
            if char != " ":
                automaton.symbols[char] |= automaton.any
        return automaton

    def _add(self, start: int, elements: tuple[_Element, ...], owner: int, *, is_whole_words: bool) -> None:
        for place, element in enumerate(elements, start):
            bit = 1 << place
            if element.char is None:
                self.any |= bit
                self.letter |= bit if element.is_letter else 0
            else:
                table = self.marks if element.is_mark else self.symbols
                table[element.char] = table.get(element.char, 0) | bit
            if element.is_repeated:
                self.repeated |= bit
        end = start + len(elements) - 1
        self.first |= 1 << start
        self.last |= 1 << end
        if not is_whole_words:
            self.first_within_word |= 1 << start
            self.last_within_word |= 1 << end
        self.owner_of[end] = owner
        if _varies(elements):
            self.varying |= (1 << end + 1) - (1 << start)
        else:
            self.width_of[end] = len(elements)


def _varies(elements: tuple[_Element, ...]) -> bool:
    return any(element.char is None or element.is_repeated for element in elements)
