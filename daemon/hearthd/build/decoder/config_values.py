"""Numbers out of a checkpoint's configuration, which may hold anything: within bounds, or refused in one line.

Knows no key's meaning. Called by `architecture`, `layers` and `rope`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hearthd.errors import BuildError

__all__ = ["MAX_POSITIONS", "positive_number", "whole_number"]

# Of a window or a context; a header may say anything, and a table of angles has a row for each.
MAX_POSITIONS = 16_777_216
# What no factor, base or divisor of a model is outside of, with room for everything that is computed from it.
_SMALLEST, _LARGEST = 1e-12, 1e12


def whole_number(config: Mapping[str, Any], key: str, *, largest: int, default: int | None = None) -> int:
    """Return config[key] if it is a whole number from 1 to `largest`; a key that is not there or null is `default`."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise BuildError(f"{key} is {_shown(value)} in this checkpoint's configuration; 1 to {largest} is allowed")
    return value


def positive_number(config: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    """Return config[key] if it is a positive number; a key that is not there or null is `default`."""
    value = config.get(key)
    if value is None:
        value = default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or not is_number or not _SMALLEST <= value <= _LARGEST:
        raise BuildError(f"{key} is {_shown(value)} in this checkpoint's configuration; a positive number is needed")
    return float(value)


def _shown(value: object) -> str:
    try:
        return ascii(value)[:60]
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "too large a number"
