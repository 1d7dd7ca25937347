"""The policy file: TOML to rules, checked as a whole, read again when the daemon is told to.

docs/policy.md explains every key. Whatever is not known is refused, as in the configuration: a misspelt rule must not
silently be none. Errors name keys and rules, and quote no phrase and no prompt, which are nobody's business but the
owner's.

Knows no callers. Called by `life.parts`, and by `__main__` to check a configuration.
"""

import difflib
import logging
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from hearthd.errors import ConfigError
from hearthd.policy.phrases import Phrase, read_phrase
from hearthd.policy.rules import Policy, Scope, SystemPrompt
from hearthd.policy.screening import Action, PhraseRule

__all__ = ["PolicyFile", "parse_policy", "read_policy"]

_logger = logging.getLogger(__name__)

_MAX_FILE_BYTES: Final = 2**20
_MAX_RULES: Final = 256
_MAX_PROMPT_CHARS: Final = 32768
_MAX_TEXT_CHARS: Final = 2000
# Of all phrases together, and of those with wildcards: the cost of a character is in proportion.
_MAX_PHRASE_UNITS: Final = 16384
_MAX_VARYING_UNITS: Final = 1024
# Of a text that is to be appended: an answer that has them has it already.
_NUM_LAST_CHARS: Final = 100
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SECTIONS: Final = ("system", "blocked", "required")
_KEYS: Final = {
    "system": ("prompt", "own", "roles"),
    "blocked": ("name", "on", "roles", "phrases", "whole_words", "action", "text"),
    "required": ("name", "on", "roles", "phrases", "whole_words", "text"),
}
_SIDES: Final = ("input", "output")


class PolicyFile:
    """The policy of a file, and the next one once `reload` was called. Without a file, one that allows everything."""

    def __init__(self, path: Path | None, known_roles: Iterable[str] | None = None) -> None:
        """known_roles: which roles there are, so that none is misspelt; None: any. Raises ConfigError."""
        self._path = path
        self._known_roles = None if known_roles is None else frozenset(known_roles)
        self._check: Callable[[Policy], None] | None = None
        self.current = _read(path, self._known_roles)

    def add_check(self, check: Callable[[Policy], None]) -> None:
        """Let every policy pass a check, this one at once. Raises what it raises."""
        check(self.current)
        self._check = check

    def reload(self) -> None:
        """Read the file again. Raises ConfigError, and keeps what was, if it cannot be used."""
        self.prepare(self._path, self._known_roles)()

    def prepare(self, path: Path | None, known_roles: Iterable[str] | None) -> Callable[[], None]:
        """Read another file, or this one again; return what puts it in force, which cannot fail. Raises ConfigError."""
        roles = None if known_roles is None else frozenset(known_roles)
        policy = _read(path, roles)
        if self._check is not None:
            self._check(policy)

        def apply() -> None:
            self._path, self._known_roles, self.current = path, roles, policy
            if path:
                _logger.info("policy file %s read again", path)

        return apply


def _read(path: Path | None, known_roles: Iterable[str] | None) -> Policy:
    return Policy() if path is None else read_policy(path, known_roles)


def read_policy(path: Path, known_roles: Iterable[str] | None = None) -> Policy:
    """Read a policy file. Raises ConfigError: one line with the key and what is allowed."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"policy file {path} cannot be read: {error.strerror}") from None
    try:
        return parse_policy(data, known_roles)
    except ValueError as error:
        raise ConfigError(f"policy file {path}: {error}") from None


def parse_policy(data: bytes, known_roles: Iterable[str] | None = None) -> Policy:
    """Read a policy. Raises ValueError that says what is wrong, without a word of phrases and prompts."""
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"it has more than {_MAX_FILE_BYTES} bytes")
    try:
        tables = tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        # The message may quote a character of the file, and no more; the place is what helps.
        place = re.search(r"\(at (line [0-9]+, column [0-9]+|end of document)\)", str(error))
        raise ValueError(f"it is not TOML{f', at {place[1]}' if place else ''}") from None
    _refuse_unknown(tables, _SECTIONS, "the file", "section")
    for section in _SECTIONS:
        entries = tables.get(section, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{section} is no list of tables; write [[{section}]] above each")
    return _Reader(tables, known_roles).read()


class _Reader:
    """Reads one file's tables."""

    def __init__(self, tables: Mapping[str, list[Mapping[str, Any]]], known_roles: Iterable[str] | None) -> None:
        self._tables = tables
        self._known_roles = None if known_roles is None else frozenset(known_roles)
        self._names: set[str] = set()
        self._num_units = 0
        self._num_varying_units = 0

    def read(self) -> Policy:
        prompts = [
            self._read_prompt(f"[[system]] {number}", table)
            for number, table in enumerate(self._tables.get("system", []), 1)
        ]
        sides: dict[str, list[tuple[PhraseRule, Scope]]] = {side: [] for side in _SIDES}
        for section in ("blocked", "required"):
            for number, table in enumerate(self._tables.get(section, []), 1):
                rule, scope, on = self._read_rule(section, f"[[{section}]] {number}", table)
                for side in on:
                    sides[side].append((rule, scope))
        if len(self._names) > _MAX_RULES:
            raise ValueError(f"it has {len(self._names)} rules; give at most {_MAX_RULES}")
        return Policy(prompts, sides["input"], sides["output"])

    def _read_prompt(self, where: str, table: Mapping[str, Any]) -> tuple[SystemPrompt, Scope]:
        _refuse_unknown(table, _KEYS["system"], where, "key")
        prompt = _text(table, "prompt", where, _MAX_PROMPT_CHARS)
        if not prompt.strip():
            raise ValueError(f"{where}: prompt is empty; give instructions, or leave the section out")
        own = _word(table, "own", where, ("append", "refuse"))
        return SystemPrompt(prompt, allows_own=own == "append"), self._scope(table, where)

    def _read_rule(
        self, section: str, where: str, table: Mapping[str, Any]
    ) -> tuple[PhraseRule, Scope, tuple[str, ...]]:
        _refuse_unknown(table, _KEYS[section], where, "key")
        name = table.get("name")
        if name is None:
            raise ValueError(f"{where}: name is missing; give up to 64 of a-z, 0-9, '.', '_', '-'")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{where}: name must be up to 64 of a-z, 0-9, '.', '_', '-'")
        if name in self._names or name == "system":
            raise ValueError(f"{where}: name {name} is taken; the audit log tells rules apart by it")
        self._names.add(name)
        where = f"rule {name}"
        is_required = section == "required"
        on = _sides(table, where)
        text = _text(table, "text", where, _MAX_TEXT_CHARS)
        action = self._action(table, where, on, text, is_required=is_required)
        is_whole_words = table.get("whole_words", True)
        if not isinstance(is_whole_words, bool):
            raise ValueError(f"{where}: whole_words must be true or false")
        phrases = self._phrases(table, where, text, action, is_whole_words=is_whole_words)
        return PhraseRule(name, phrases, is_required, action, text), self._scope(table, where), on

    def _scope(self, table: Mapping[str, Any], where: str) -> Scope:
        roles = table.get("roles", [])
        if not isinstance(roles, list) or not all(isinstance(role, str) and _NAME.fullmatch(role) for role in roles):
            raise ValueError(f"{where}: roles must be a list of role names; leave it out for everybody")
        if self._known_roles is not None and (unknown := sorted(set(roles) - self._known_roles)):
            raise ValueError(
                f"{where}: roles has {unknown[0]}, which is no role; there are {', '.join(sorted(self._known_roles))}"
            )
        return Scope(frozenset(roles) or None)

    def _action(
        self, table: Mapping[str, Any], where: str, on: tuple[str, ...], text: str, *, is_required: bool
    ) -> Action:
        if is_required:
            if len(on) != 1:
                raise ValueError(
                    f'{where}: on has both; give one of "input" and "output", and the other in a rule of its own'
                )
            if on == ("input",):
                return Action.REFUSE
            if not text:
                raise ValueError(f"{where}: text is missing; it is appended to answers that have none of the phrases")
            return Action.APPEND
        action = Action(_word(table, "action", where, ("refuse", "stop", "replace")))
        if action is Action.STOP and "input" in on:
            raise ValueError(f'{where}: action "stop" is for output; give "refuse" or "replace"')
        if action is Action.REPLACE and not text.strip():
            # Without it, the rest would grow together, and might become the phrase.
            raise ValueError(f"{where}: text is empty; say what stands in place of the phrase")
        return action

    def _phrases(
        self, table: Mapping[str, Any], where: str, text: str, action: Action, *, is_whole_words: bool
    ) -> tuple[Phrase, ...]:
        written = table.get("phrases", [])
        if not isinstance(written, list) or not all(isinstance(each, str) for each in written):
            raise ValueError(f"{where}: phrases must be a list of strings")
        if not written and action is Action.APPEND:
            # An answer that ends so already needs it no second time.
            written = [re.sub(r"([\\*?])", r"\\\1", text.strip()[-_NUM_LAST_CHARS:])]
        if not written:
            raise ValueError(f"{where}: phrases is empty; give at least one")
        phrases = []
        for number, each in enumerate(written, 1):
            try:
                phrases.append(read_phrase(each, is_whole_words=is_whole_words))
            except ValueError as error:
                raise ValueError(f"{where}: phrase {number} {error}") from None
            self._num_units += phrases[-1].size
            if self._num_units > _MAX_PHRASE_UNITS:
                raise ValueError(f"all phrases together have more than {_MAX_PHRASE_UNITS} characters, the limit")
            self._num_varying_units += phrases[-1].size if phrases[-1].varies else 0
            if self._num_varying_units > _MAX_VARYING_UNITS:
                raise ValueError(f"all phrases with * or ? have more than {_MAX_VARYING_UNITS} characters, the limit")
        return tuple(phrases)


def _sides(table: Mapping[str, Any], where: str) -> tuple[str, ...]:
    on = table.get("on")
    if on is None:
        raise ValueError(f'{where}: on is missing; give "input", "output" or a list of both')
    sides = [on] if isinstance(on, str) else on
    if not isinstance(sides, list) or not sides or any(side not in _SIDES for side in sides):
        raise ValueError(f'{where}: on must be "input", "output" or a list of both')
    return tuple(side for side in _SIDES if side in sides)


def _text(table: Mapping[str, Any], key: str, where: str, most: int) -> str:
    text = table.get(key, "")
    if not isinstance(text, str):
        raise ValueError(f"{where}: {key} must be a string")
    if len(text) > most:
        raise ValueError(f"{where}: {key} has {len(text)} characters; give at most {most}")
    return text


def _word(table: Mapping[str, Any], key: str, where: str, words: tuple[str, ...]) -> str:
    word = table.get(key, words[0])
    if not isinstance(word, str) or word not in words:
        raise ValueError(f"{where}: {key} must be one of {', '.join(words)}")
    return word


def _refuse_unknown(found: Iterable[str], known: tuple[str, ...], where: str, noun: str) -> None:
    for name in found:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise ValueError(f"{where}: there is no {noun} {name[:40]!a}; did you mean {nearest[0]}?")
