"""The kinds of configuration keys: what each accepts, from a TOML value and from an environment variable's text.

`config` annotates its fields with these. A kind raises ValueError that says what is allowed; `config` puts the key's
name, and where the value stands, before it.
"""
# ruff: noqa: D102 - what the methods do is said once, in Kind

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ByteSize",
    "FileMode",
    "Flag",
    "Kind",
    "Number",
    "Pairs",
    "Place",
    "Strings",
    "Text",
    "Whole",
    "Word",
    "Words",
]


class Kind(ABC):
    """What a key accepts."""

    __slots__ = ()

    @abstractmethod
    def read(self, value: object) -> object:
        """Check a TOML value and return the value of the field. Raises ValueError."""

    def from_text(self, text: str) -> object:
        """Turn an environment variable's text into the TOML value that it means, or into something `read` refuses."""
        return text


@dataclass(frozen=True, slots=True)
class Whole(Kind):
    """A whole number from low to high."""

    low: int
    high: int

    def read(self, value: object) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise ValueError(f"give a whole number from {self.low} to {self.high}")
        return value

    def from_text(self, text: str) -> object:
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text


@dataclass(frozen=True, slots=True)
class ByteSize(Kind):
    """A number of bytes up to `high`: a whole number, or a string that ends in K, M or G, powers of 1024."""

    high: int

    def read(self, value: object) -> int:
        if isinstance(value, str) and (found := re.fullmatch(r"([0-9]{1,12})([KMG])", value)):
            value = int(found[1]) << {"K": 10, "M": 20, "G": 30}[found[2]]
        if type(value) is not int or not 0 <= value <= self.high:
            raise ValueError(
                f'give 0 to {self.high} bytes, or a string such as "64M": a whole number with K, M or G, powers of 1024'
            )
        return value

    def from_text(self, text: str) -> object:
        return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else text


@dataclass(frozen=True, slots=True)
class Number(Kind):
    """A finite number from low to high."""

    low: float
    high: float

    def read(self, value: object) -> float:
        # NaN compares false with everything, so the range must be asked for, not its opposite.
        if not isinstance(value, int | float) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise ValueError(f"give a number from {self.low:g} to {self.high:g}")
        return float(value)

    def from_text(self, text: str) -> object:
        try:
            return float(text)
        except ValueError:
            return math.nan


@dataclass(frozen=True, slots=True)
class Flag(Kind):
    """True or false."""

    def read(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("give true or false")
        return value

    def from_text(self, text: str) -> object:
        return {"true": True, "false": False}.get(text.lower(), text)


@dataclass(frozen=True, slots=True)
class Text(Kind):
    """A string that matches a pattern as a whole; `form` says in words what does."""

    pattern: str
    form: str

    def read(self, value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(self.pattern, value):
            raise ValueError(f"give {self.form}")
        return value


@dataclass(frozen=True, slots=True)
class Word(Kind):
    """One of several words."""

    words: tuple[str, ...]

    def read(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError(f"give one of {', '.join(self.words)}")
        return value


@dataclass(frozen=True, slots=True)
class FileMode(Kind):
    """Permission bits. A string, so that the decimal number 660 of TOML cannot be meant."""

    def read(self, value: object) -> int:
        if not isinstance(value, str) or not re.fullmatch(r"0[0-7]{3}", value):
            raise ValueError('give permission bits as an octal string such as "0660"')
        return int(value, 8)


@dataclass(frozen=True, slots=True)
class Place(Kind):
    """An absolute path. `auto`, where there is such a thing, finds the one that "auto" means; `config` calls it."""

    auto: Callable[[Mapping[str, str]], Path] | None = None
    may_be_none: bool = True
    max_bytes: int = 4095

    def read(self, value: object) -> Path | None:
        if value == "" and self.may_be_none:
            return None
        if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
            auto = ', or "auto"' if self.auto else ""
            none = ', or "" for none' if self.may_be_none else ""
            raise ValueError(f"give an absolute path{auto}{none}")
        if len(os.fsencode(value)) > self.max_bytes:
            raise ValueError(f"it has {len(os.fsencode(value))} bytes; give at most {self.max_bytes}")
        return Path(value)


@dataclass(frozen=True, slots=True)
class Strings(Kind):
    """A list of at most `high` strings; an environment variable separates them with commas."""

    high: int

    def read(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or len(value) > self.high or not all(isinstance(each, str) for each in value):
            raise ValueError(f"give a list of at most {self.high} strings")
        return tuple(value)

    def from_text(self, text: str) -> object:
        return [each.strip() for each in text.split(",") if each.strip()]


@dataclass(frozen=True, slots=True)
class Words(Kind):
    """A list of some of several words, each at most once; an environment variable separates them with commas."""

    words: tuple[str, ...]

    def read(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or len(set(map(repr, value))) < len(value):
            raise ValueError(f"give a list of {', '.join(self.words)}, each at most once")
        for each in value:
            if not isinstance(each, str) or each not in self.words:
                raise ValueError(f"{each!r:.80} is none of {', '.join(self.words)}")
        return tuple(value)

    def from_text(self, text: str) -> object:
        return [each.strip() for each in text.split(",") if each.strip()]


@dataclass(frozen=True, slots=True)
class Pairs(Kind):
    """An inline table of at most `high` strings; `form` says in words what key and value are.

    An environment variable separates the pairs with commas, and key from value with an equals sign.
    """

    high: int
    key: str
    value: str
    form: str

    def read(self, value: object) -> tuple[tuple[str, str], ...]:
        if not isinstance(value, dict) or len(value) > self.high:
            raise ValueError(f"give a table of at most {self.high}: {self.form}")
        for key, each in value.items():
            if not re.fullmatch(self.key, key) or not isinstance(each, str) or not re.fullmatch(self.value, each):
                raise ValueError(f"give {self.form}")
        return tuple(value.items())

    def from_text(self, text: str) -> object:
        parts = [each.partition("=") for each in text.split(",") if each.strip()]
        return {key.strip(): value.strip() for key, _, value in parts}
