"""A target of the project beside what was measured, and whether that meets it.

Made by the scenarios, shown by `report`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any


class Verdict(enum.StrEnum):
    """Whether a target is met."""

    MET = "met"
    NOT_MET = "NOT MET"
    NOT_AVAILABLE = "not available"
    """The daemon, as it is, does not do what would be measured."""


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the table. measured: None where the daemon does not do it."""

    name: str
    wanted: str
    measured: float | None
    unit: str
    verdict: Verdict
    note: str = ""


def at_most(name: str, measured: float, limit: float, unit: str, note: str = "") -> Target:
    """Return a target that is met up to a limit."""
    verdict = Verdict.MET if measured <= limit else Verdict.NOT_MET
    return Target(name, f"<= {limit:g}{_with_space(unit)}", measured, unit, verdict, note)


def at_least(name: str, measured: float, limit: float, unit: str, note: str = "") -> Target:
    """Return a target that is met from a limit on."""
    verdict = Verdict.MET if measured >= limit else Verdict.NOT_MET
    return Target(name, f">= {limit:g}{_with_space(unit)}", measured, unit, verdict, note)


def not_available(name: str, wanted: str, why: str) -> Target:
    """Return a target that cannot be measured."""
    return Target(name, wanted, None, "", Verdict.NOT_AVAILABLE, why)


def _with_space(unit: str) -> str:
    return f" {unit}" if unit else ""


@dataclass(slots=True)
class Result:
    """What a scenario has found. figures: whatever else is worth keeping, as JSON can hold it."""

    targets: list[Target] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
