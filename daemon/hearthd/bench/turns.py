"""Measurements that take turns, round after round, so that a change of the machine's speed meets them all.

The first round warms up and does not count. Each measurement has a budget of time over all rounds: on a slow board one
that is used up runs in fewer rounds (if only the first was affordable, that one counts), and one whose first run alone
would go beyond it is left out, with the reason.

Knows nothing of what is measured. Called by `suite`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Figure", "Measurement", "NotMeasurableError", "take_turns"]


Key = TypeVar("Key", bound=Hashable)


class NotMeasurableError(Exception):
    """A measurement cannot be made here; the text says why."""


@dataclass(frozen=True, slots=True)
class Measurement(Generic[Key]):
    """run: one go; returns its figure, or raises NotMeasurableError. expected: seconds that the first will take.

    key: what the result goes by; as a string it is what is shown meanwhile.
    """

    key: Key
    run: Callable[[], float]
    expected: Callable[[], float] = lambda: 0.0


@dataclass(frozen=True, slots=True)
class Figure:
    """Median, lowest and highest of the rounds that count."""

    median: float
    lowest: float
    highest: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """values: of all rounds, the one that warmed up first."""
        counting = values[1:] or values
        return cls(statistics.median(counting), min(counting), max(counting), len(counting))


def take_turns(
    measurements: Sequence[Measurement[Key]],
    *,
    rounds: int,
    budget_seconds: float,
    report: Callable[[str, float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[Key, Figure], dict[Key, str]]:
    """Make each measurement in each round. Returns the figures, and the reasons of what was left out, both by key.

    rounds: that count; with 0 the first alone. report: called with what is being measured and the share of all that
    is done.
    """
    values: dict[Key, list[float]] = {}
    left_out: dict[Key, str] = {}
    spent: dict[Key, float] = {}
    last: dict[Key, float] = {}
    for number in range(rounds + 1):
        for place, each in enumerate(measurements):
            key = each.key
            if key in left_out:
                continue
            if report is not None:
                report(
                    f"round {number} of {rounds}: {key}" if number else f"first round: {key}",
                    (number + place / len(measurements)) / (rounds + 1),
                )
            if number == 0:
                expected = each.expected()
                if expected > budget_seconds:
                    left_out[key] = f"would take {expected:.3g} s, more than the budget of {budget_seconds:g} s"
                    continue
            elif spent[key] + last[key] > budget_seconds:
                continue
            started = clock()
            try:
                value = each.run()
            except NotMeasurableError as error:
                left_out[key] = str(error)
                continue
            last[key] = clock() - started
            spent[key] = spent.get(key, 0.0) + last[key]
            values.setdefault(key, []).append(value)
    return {key: Figure.of(found) for key, found in values.items()}, left_out
