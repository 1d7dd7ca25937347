"""Text as phrases are compared with it: without case, width, composition, invisible characters and kinds of spaces.

Each character becomes units, compatibility-decomposed (NFKD) and case-folded, as the Unicode Standard's compatibility
caseless matching (D146) has it; control characters and others without appearance are left out, and a run of spaces is
one space. A unit knows which characters of the original text it stands for. Look-alikes of other alphabets stay what
they are.

Works on text that comes in pieces: only combining marks wait, for the others of their run, whose order is made
canonical. Knows no phrases. Called by `phrases` and `search`.
"""

import enum
import functools
import unicodedata
from typing import Final, NamedTuple

__all__ = ["Folder", "Kind", "Unit"]

# Unicode's Stream-Safe Text Format (UAX 15): no honest text has longer runs of marks, and a run is held in memory.
_MAX_MARKS: Final = 30
# Default_Ignorable_Code_Point of DerivedCoreProperties.txt (Unicode 16), what is not assigned yet included, and without
# what is of category Cf, which is left out as a whole.
_INVISIBLE: Final = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x2065, 0x2065),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0F),
        (0xFFA0, 0xFFA0),
        (0xFFF0, 0xFFF8),
        (0xE0000, 0xE0FFF),
    )
    for code in range(first, last + 1)
)
# White_Space that is of category Cc, and two symbols that are an empty place: a braille cell without dots, and a note
# without a head. `str.isspace` takes control characters for spaces that nobody sees (U+001C to U+001F).
_BLANK: Final = frozenset("\t\n\v\f\r\x85\u2800\U0001d159")
# Scripts that write no spaces between words: Thai and Lao, Burmese, Khmer, Han and kana.
_UNSPACED: Final = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
# Vowels and final consonants of decomposed Korean syllables.
_FIRST_JAMO_VOWEL: Final = 0x1160
_LAST_JAMO: Final = 0x11FF


class Kind(enum.Enum):
    """What a unit is, for the question where words and characters end."""

    OTHER = 0
    WORD = 1
    """A letter or digit of a script that puts spaces between words. `_` is none: `_gun_` is emphasis in Markdown."""
    MARK = 2
    """Part of the character before it."""
    SPACE = 3
    UNSPACED = 4
    """A letter of a script that puts no spaces between words: nobody can tell where one ends."""


class Unit(NamedTuple):
    """One character as it is compared, and where the characters stand that it comes from."""

    char: str
    kind: Kind
    start: int
    end: int


class Folder:
    """Folds one text. `push` its pieces, `flush` at its end."""

    def __init__(self) -> None:
        self._position = 0
        self._marks: list[Unit] = []
        self._is_after_space = False

    @property
    def position(self) -> int:
        """Characters that were pushed."""
        return self._position

    def push(self, text: str) -> list[Unit]:
        """Take more of the text; return the units that are certain."""
        units: list[Unit] = []
        for character in text:
            start, self._position = self._position, self._position + 1
            for char, kind in _fold(character):
                if kind is Kind.SPACE and self._is_after_space:
                    continue
                self._is_after_space = kind is Kind.SPACE
                unit = Unit(char, kind, start, start + 1)
                if kind is Kind.MARK and unicodedata.combining(char):
                    self._marks.append(unit)
                    if len(self._marks) < _MAX_MARKS:
                        continue
                    units += self._take_marks()
                    continue
                if self._marks:
                    units += self._take_marks()
                units.append(unit)
        return units

    def flush(self) -> list[Unit]:
        """Take the end of the text; return what waited."""
        return self._take_marks()

    def _take_marks(self) -> list[Unit]:
        marks, self._marks = self._marks, []
        end = max((mark.end for mark in marks), default=0)
        # Python's sort is stable, as the canonical ordering algorithm has to be.
        return [mark._replace(end=end) for mark in sorted(marks, key=lambda mark: unicodedata.combining(mark.char))]


@functools.lru_cache(maxsize=4096)
def _fold(character: str) -> tuple[tuple[str, Kind], ...]:
    folded = character
    for _ in range(2):
        folded = unicodedata.normalize("NFKD", folded).casefold()
    units = []
    for char in unicodedata.normalize("NFKD", folded):
        category = unicodedata.category(char)
        if char in _BLANK or category[0] == "Z":
            units.append((" ", Kind.SPACE))
        elif category in ("Cc", "Cf") or char in _INVISIBLE:
            continue
        elif category[0] == "M" or _FIRST_JAMO_VOWEL <= ord(char) <= _LAST_JAMO:
            units.append((char, Kind.MARK))
        else:
            units.append((char, _kind(char, category)))
    return tuple(units)


def _kind(char: str, category: str) -> Kind:
    if category[0] not in "LN":
        return Kind.OTHER
    return Kind.UNSPACED if any(first <= ord(char) <= last for first, last in _UNSPACED) else Kind.WORD
