"""What a check says: how bad it is, in plain words, and what helps. Knows no check. Used by all and by `cli`."""

import enum
from dataclasses import dataclass

__all__ = ["Finding", "Level", "good", "note", "problem", "warning"]


class Level(enum.Enum):
    """How bad a finding is."""

    GOOD = "good"
    NOTE = "note"
    """Worth knowing; nothing to do."""
    WARNING = "warning"
    """Works, worse than it could, or not for long."""
    PROBLEM = "problem"
    """Does not work, or loses something."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found. remedy: what to do, "" where there is nothing."""

    check: str
    level: Level
    text: str
    remedy: str = ""


def good(check: str, text: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(check, Level.GOOD, text)


def note(check: str, text: str, remedy: str = "") -> Finding:
    """Return a finding that is worth knowing."""
    return Finding(check, Level.NOTE, text, remedy)


def warning(check: str, text: str, remedy: str) -> Finding:
    """Return a finding that somebody should look at."""
    return Finding(check, Level.WARNING, text, remedy)


def problem(check: str, text: str, remedy: str) -> Finding:
    """Return a finding that somebody must look at."""
    return Finding(check, Level.PROBLEM, text, remedy)
