"""What is measured, and the arithmetic over rounds: medians, spread, ratios to each peer.

Pure functions; knows no processes and no output. Called by `contest.py` and `report.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table.

    what: prefill, decode, load, start, resident, own, file.
    streams, tokens: how many sequences at once; of what length the prompt or the context is.
    """

    what: str
    streams: int = 1
    tokens: int = 0

    @property
    def unit(self) -> str:
        """The unit of its values."""
        return {"prefill": "tokens/s", "decode": "tokens/s", "load": "s", "start": "s"}.get(self.what, "MB")

    @property
    def more_is_better(self) -> bool:
        """Whether a larger value is better: of rates it is, of seconds and megabytes it is not."""
        return self.unit == "tokens/s"


@dataclass(frozen=True, slots=True)
class Summary:
    """Median, lowest and highest value over the rounds."""

    median: float
    lowest: float
    highest: float


@dataclass(slots=True)
class Samples:
    """All values of all engines: one for each round, the first of which warms up; and why some are missing."""

    values: dict[tuple[str, Figure], list[float]] = field(default_factory=dict)
    missing: dict[tuple[str, Figure], str] = field(default_factory=dict)

    def add(self, engine: str, figure: Figure, value: float) -> None:
        """Keep a round's value."""
        self.values.setdefault((engine, figure), []).append(value)

    def fail(self, engine: str, figure: Figure, reason: str) -> None:
        """Give a figure up, with the rounds that it already has: half a series is compared with nothing."""
        self.values.pop((engine, figure), None)
        self.missing[engine, figure] = reason

    def rounds(self, engine: str, figure: Figure) -> list[float]:
        """Return the values of the rounds that count: all but the first."""
        return self.values.get((engine, figure), [])[1:]


def summarise(values: Sequence[float]) -> Summary:
    """Return the median and the spread of at least one value."""
    return Summary(statistics.median(values), min(values), max(values))


def ratio(ours: Sequence[float], theirs: Sequence[float], *, more_is_better: bool) -> Summary:
    """Return how many times better we are: the ratio of each round's two values, then their median and spread.

    Two values of one round were taken under the same conditions; those of different rounds need not have been.
    Raises ValueError when the series are not of the same rounds.
    """
    each = [our / their if more_is_better else their / our for our, their in zip(ours, theirs, strict=True)]
    return summarise(each)


def best_of(series: Mapping[str, Sequence[float]], *, more_is_better: bool) -> str:
    """Return the name of the series with the best median: a peer's best way of running, for one figure."""
    sign = 1 if more_is_better else -1
    return max(series, key=lambda name: sign * statistics.median(series[name]))
