"""What rules do to a text as it comes: refuse it, stop it, replace phrases, append what is missing.

Phrases are looked for in the text as it was written: what replaces one is not looked at again. Where matches overlap,
they are replaced as one, by the text of the rule whose match begins first. What is let out is certain to hold no
blocked phrase, and nothing else is kept waiting.

Knows no file, no role and no message. Called by `rules` (what callers send) and `answer` (what the model writes).
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from hearthd.errors import PolicyRefusedError
from hearthd.policy.phrases import Automaton, Phrase
from hearthd.policy.search import Match, Search

__all__ = ["Action", "PhraseRule", "RuleSet", "Screen"]

_SLICE: Final = 4096


class Action(enum.Enum):
    """What happens when a rule applies."""

    REFUSE = "refuse"
    """The call ends with an error, whose text is the rule's."""
    STOP = "stop"
    """The answer ends before the phrase, with the rule's text if it has one."""
    REPLACE = "replace"
    """The rule's text stands in place of the phrase."""
    APPEND = "append"
    """The rule's text is put behind a text that has none of the phrases."""


@dataclass(frozen=True, slots=True)
class PhraseRule:
    """A rule of the policy."""

    name: str
    phrases: tuple[Phrase, ...]
    is_required: bool
    """Whether the phrases must be there; otherwise they must not."""
    action: Action
    text: str

    def refusal(self) -> PolicyRefusedError:
        """Return what the caller is told."""
        return PolicyRefusedError(
            self.text or f"the policy of this daemon does not allow that (rule {self.name})", self.name
        )


class RuleSet:
    """Rules that apply together, compiled once for all texts."""

    def __init__(self, rules: Iterable[PhraseRule]) -> None:
        self.rules = tuple(rules)
        # Replaced ones apart: whatever is replaced around it, what ends a text is found.
        blocked = [number for number, rule in enumerate(self.rules) if not rule.is_required]
        self.replacing = self._compile(n for n in blocked if self.rules[n].action is Action.REPLACE)
        self.ending = self._compile(n for n in blocked if self.rules[n].action is not Action.REPLACE)
        # And required ones: nothing has to wait for a phrase that may be there.
        self.required = {n: self._compile([n]) for n, rule in enumerate(self.rules) if rule.is_required}

    def _compile(self, numbers: Iterable[int]) -> Automaton:
        return Automaton.of((phrase, number) for number in numbers for phrase in self.rules[number].phrases)


class Screen:
    """Screens one text. `push` its pieces, `flush` at its end; both raise PolicyRefusedError."""

    def __init__(self, rules: RuleSet) -> None:
        self._rules = rules.rules
        self._ending = Search(rules.ending)
        self._replacing = Search(rules.replacing)
        self._missing = {number: Search(automaton) for number, automaton in rules.required.items()}
        self._waiting = ""
        self._num_passed = 0
        self._replaced: list[tuple[Match, set[str]]] = []
        """Matches in their order, none overlapping, each with the names of all rules that are part of it."""
        self._is_stopped = False
        self.fired: set[str] = set()
        """The names of the rules that have applied."""

    @property
    def is_stopped(self) -> bool:
        """Whether a rule has ended the text. Nothing comes out any more."""
        return self._is_stopped

    def push(self, text: str) -> str:
        """Take more of the text; return what may be passed on."""
        passed = ""
        # In slices: nothing is searched behind a place where the text has ended.
        for start in range(0, len(text), _SLICE):
            if self._is_stopped:
                break
            piece = text[start : start + _SLICE]
            self._waiting += piece
            self._missing = {number: search for number, search in self._missing.items() if not search.push(piece)}
            passed += self._pass_on(self._ending.push(piece), self._replacing.push(piece))
        return passed

    def flush(self) -> str:
        """Take the end of the text; return the rest, with what rules append."""
        if self._is_stopped:
            return ""
        rest = self._pass_on(self._ending.flush(), self._replacing.flush())
        if self._is_stopped:
            return rest
        for number, search in self._missing.items():
            if search.flush():
                continue
            rule = self._rules[number]
            self.fired.add(rule.name)
            if rule.action is Action.REFUSE:
                raise rule.refusal()
            rest += rule.text
        return rest

    def _pass_on(self, ending: list[Match], replaced: list[Match]) -> str:
        for match in replaced:
            if not ending or (match.start < ending[0].start and match.end <= ending[0].end):
                self._replace(match)
        if ending:
            return self._end(ending[0])
        return self._take(min(self._ending.certain, self._replacing.certain))

    def _end(self, match: Match) -> str:
        rule = self._rules[match.owner]
        self.fired.add(rule.name)
        passed = self._take(match.start, is_last=True)
        if rule.action is Action.REFUSE:
            raise rule.refusal()
        self._is_stopped = True
        self._waiting = ""
        return passed + rule.text

    def _replace(self, match: Match) -> None:
        names = {self._rules[match.owner].name}
        while self._replaced and match.start < self._replaced[-1][0].end:
            before, names_before = self._replaced.pop()
            first = min(before, match, key=lambda each: (each.start, each.owner))
            match = Match(first.start, max(before.end, match.end), first.owner)
            names |= names_before
        self._replaced.append((match, names))

    def _take(self, end: int, *, is_last: bool = False) -> str:
        """Take the text before a place from what waits. A phrase that reaches beyond it waits, unless it is the last.

        Where a longer match may still come, the place lies before its beginning, and so within the shorter one.
        """
        taken = ""
        while self._replaced and self._replaced[0][0].start < end:
            match, names = self._replaced[0]
            if match.end > end and not is_last:
                end = match.start
                break
            taken += self._cut(match.start) + self._rules[match.owner].text
            self._cut(match.end)
            self.fired |= names
            del self._replaced[0]
        return taken + self._cut(end)

    def _cut(self, end: int) -> str:
        """Take the text before a place, as it is."""
        length = max(end - self._num_passed, 0)
        cut, self._waiting = self._waiting[:length], self._waiting[length:]
        self._num_passed += len(cut)
        return cut
