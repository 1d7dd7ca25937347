"""Finds phrases in a text that comes in pieces, however it is cut, and says how much of it is certain to hold none.

One pass forward, a few operations on whole numbers for each character. Where a match began is found by running the
same automaton backwards over the characters that are held, of which there are never more than the widest match has.

Knows no rules: a match names its phrase's owner. Called by `screening`.
"""

from typing import Final, NamedTuple

from hearthd.policy.folding import Folder, Kind, Unit
from hearthd.policy.phrases import Automaton

__all__ = ["MAX_RUN", "Match", "Search"]

# `*` does not reach beyond so many letters in a row: text without spaces must not be held back for ever.
MAX_RUN: Final = 32
# Characters between two looks at which of them may be forgotten.
_TRIM: Final = 512


class Match(NamedTuple):
    """Characters [start, end) of the text are a phrase: of those that end there, the one that begins first."""

    start: int
    end: int
    owner: int


class _Held(NamedTuple):
    """A unit that was read, and what could be done with it."""

    unit: Unit
    is_within_word: bool
    """Whether the unit before it is of the same word."""
    can_repeat: bool


class Search:
    """Searches one text for the phrases of an automaton. `push` its pieces, `flush` at its end."""

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self._folder = Folder()
        self._live = 0
        self._held: list[_Held] = []
        self._is_in_word = False
        self._run = 0
        self._matches: list[Match] = []

    @property
    def certain(self) -> int:
        """How many characters, from the beginning, can be in no match that has not been told yet."""
        return self._held[0].unit.start if self._live else self._folder.position

    def push(self, text: str) -> list[Match]:
        """Take more of the text; return the matches that are certain now, in the order of their ends."""
        for unit in self._folder.push(text):
            self._take(unit)
        self._trim()
        return self._told()

    def flush(self) -> list[Match]:
        """Take the end of the text, which ends the last word too."""
        for unit in self._folder.flush():
            self._take(unit)
        self._tell(self._live & self._automaton.last)
        self._live = 0
        self._held.clear()
        return self._told()

    def _told(self) -> list[Match]:
        matches, self._matches = self._matches, []
        return matches

    def _take(self, unit: Unit) -> None:
        automaton, live, kind = self._automaton, self._live, unit.kind
        is_within_word = self._is_in_word and kind is Kind.WORD
        if live and kind is not Kind.MARK:
            # Only now is it known that the character before was the last of its word, or had all of its marks.
            self._tell(live & (automaton.last_within_word if is_within_word else automaton.last))
        can_repeat = self._run < MAX_RUN and kind in (Kind.WORD, Kind.UNSPACED)
        advanced = (live << 1) & automaton.not_first
        match kind:
            case Kind.MARK:
                live = advanced & automaton.marks.get(unit.char, 0) | live & (automaton.any | automaton.repeated)
            case Kind.SPACE:
                live = advanced & automaton.symbols.get(" ", 0)
                self._is_in_word = False
            case _:
                advanced |= automaton.first_within_word if is_within_word else automaton.first
                repeated = live & automaton.repeated if can_repeat else 0
                if kind is Kind.OTHER:
                    advanced &= ~automaton.letter
                live = advanced & automaton.symbols.get(unit.char, automaton.any) | repeated
                self._is_in_word = kind is Kind.WORD
        self._run = 0 if kind in (Kind.SPACE, Kind.OTHER) else self._run + 1
        self._live = live
        if not live:
            self._held.clear()
            return
        self._held.append(_Held(unit, is_within_word, can_repeat))
        if len(self._held) % _TRIM == 0:
            self._trim()

    def _trim(self) -> None:
        if self._live:
            del self._held[: self._find_start(self._live)]

    def _tell(self, reached: int) -> None:
        """Tell the match whose last elements these are; it ends with the unit that was read last."""
        if not reached:
            return
        automaton, num_held = self._automaton, len(self._held)
        highest = reached.bit_length() - 1
        varying = reached & automaton.varying
        found = []
        if (width := automaton.width_of.get(highest)) is not None:
            found.append((num_held - width, automaton.owner_of[highest]))
        if varying:
            lowest = (varying & -varying).bit_length() - 1
            found.append((self._find_start(varying), automaton.owner_of[lowest]))
        place, owner = min(found)
        self._matches.append(Match(self._held[place].unit.start, self._held[-1].unit.end, owner))

    def _find_start(self, states: int) -> int:
        """Find the first of the held units from which any of these elements was reached, running backwards."""
        automaton = self._automaton
        earliest = len(self._held) - 1
        for place in range(len(self._held) - 1, -1, -1):
            unit, is_within_word, can_repeat = self._held[place]
            if unit.kind is Kind.MARK:
                stayed = states & (automaton.any | automaton.repeated)
                read = states & automaton.marks.get(unit.char, 0)
            elif unit.kind is Kind.SPACE:
                stayed, read = 0, states & automaton.symbols.get(" ", 0)
            else:
                stayed = states & automaton.repeated if can_repeat else 0
                read = states & automaton.symbols.get(unit.char, automaton.any)
                if unit.kind is Kind.OTHER:
                    read &= ~automaton.letter
                if read & (automaton.first_within_word if is_within_word else automaton.first):
                    earliest = place
            states = (read & automaton.not_first) >> 1 | stayed
            if not states:
                break
        return earliest
