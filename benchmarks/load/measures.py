"""The arithmetic of a report: percentiles, fairness, drift.

Pure functions; know no requests and no output. Called by `summary` and the scenarios.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

PERCENTILES = (50, 95, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of all do not exceed (nearest rank): one that was measured.

    Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return p50, p95, p99 and the highest, as a report has them; None without values."""
    if not values:
        return None
    return {f"p{percent}": percentile(values, percent) for percent in PERCENTILES} | {"max": max(values)}


def jain_index(shares: Sequence[float]) -> float:
    """Return (sum x)^2 / (n sum x^2): 1 where all have got the same, 1/n where one has got all.

    R. Jain, D. Chiu, W. Hawe: A Quantitative Measure of Fairness, DEC-TR-301, 1984. Nothing for all is the same for
    all.
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def worst_wait_ratio(waits: Mapping[str, Sequence[float]]) -> float | None:
    """Return how many times longer the worst served caller waited, on average, than the mean caller; None if nobody."""
    means = [statistics.fmean(each) for each in waits.values() if each]
    mean = statistics.fmean(means) if means else 0.0
    return max(means) / mean if mean else None


def growth_percent(samples: Sequence[float]) -> float:
    """Return how much higher the last tenth of a series is than its second tenth, by medians, in percent.

    The first tenth fills caches and allocators for the first time. Raises ValueError with fewer than ten samples.
    """
    if len(samples) < 10:
        raise ValueError(f"{len(samples)} samples are too few to tell growth from; at least 10 are needed")
    tenth = len(samples) // 10
    early, late = statistics.median(samples[tenth : 2 * tenth]), statistics.median(samples[-tenth:])
    return 100 * (late - early) / early
