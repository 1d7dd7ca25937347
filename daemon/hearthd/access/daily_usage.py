"""What each caller has used since midnight, kept over restarts.

The counts stand in a small JSON file, which is written at most every SAVE_SECONDS, in a thread of its own, and once
more at the end: a crash or a power cut loses what was counted since, half a minute or so. A disk that cannot be
written is told once, and the counts go on in memory. A file that cannot be read is told, and counts as empty.

The day is the local calendar's, by a `ForwardClock`: a clock that is set back does not give a day twice. A file that
is of a later day than today (it was written while the clock was wrong) is taken for today's.

Knows accounts by name and no roles. Called by `metering`, and by `server`, which runs `keep_saving`.
"""

import asyncio
import datetime
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from hearthd.access.forward_clock import ForwardClock
from hearthd.durable_file import replace_file

__all__ = ["SAVE_SECONDS", "DailyUsage"]

_logger = logging.getLogger(__name__)

SAVE_SECONDS: Final = 30.0
_VERSION: Final = 1
_MAX_FILE_BYTES: Final = 2**20


class DailyUsage:
    """Tokens by account. One thread uses it."""

    def __init__(self, path: Path | None, now: Callable[[], float] | None = None) -> None:
        """path: None keeps nothing. now: seconds since 1970, for tests."""
        self._path = path
        self._now = now or ForwardClock().now
        self._day = self._today()
        self._tokens: dict[str, int] = {}
        self._has_changed = False
        self._trouble: str | None = None
        if path is not None:
            self._load(path)

    def find_problem(self) -> str | None:
        """Return that the counts cannot be written and what helps; None if they can. Names no path."""
        if self._trouble is None:
            return None
        return (
            f"auth.usage_file cannot be written ({self._trouble}), and today's counts would not outlive a restart; "
            "make room or put the disk right, `hearthd doctor` helps"
        )

    def used(self, account: str) -> int:
        """Return what an account has used today."""
        self._turn_page()
        return self._tokens.get(account, 0)

    def add(self, account: str, num_tokens: int) -> None:
        """Count tokens."""
        self._turn_page()
        self._tokens[account] = self._tokens.get(account, 0) + num_tokens
        self._has_changed = True

    def seconds_left(self) -> float:
        """Return how long the day goes on."""
        now = datetime.datetime.fromtimestamp(self._now())
        midnight = datetime.datetime.combine(now.date() + datetime.timedelta(days=1), datetime.time.min)
        # By way of timestamps, because a day in which summer time begins or ends has 23 or 25 hours.
        return max(midnight.timestamp() - now.timestamp(), 1.0)

    async def keep_saving(self) -> None:
        """Write what has changed, for ever."""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            await self.save()

    async def save(self) -> None:
        """Write what has changed since the last time."""
        if self._path is None or not self._has_changed:
            return
        path, data = self._path, self._written()
        self._has_changed = False
        try:
            await asyncio.to_thread(_write, path, data)
        except OSError as error:
            self._has_changed = True
            if self._trouble is None:
                _logger.error(
                    "auth.usage_file: %s cannot be written, and counts of today would not outlive a restart: %s",
                    path,
                    error.strerror,
                )
            self._trouble = error.strerror or "unknown"
        else:
            self._trouble = None

    def _written(self) -> bytes:
        content = {"version": _VERSION, "day": self._day.isoformat(), "tokens": self._tokens}
        return json.dumps(content, indent=1, sort_keys=True).encode("ascii") + b"\n"

    def _today(self) -> datetime.date:
        return datetime.date.fromtimestamp(self._now())

    def _turn_page(self) -> None:
        today = self._today()
        # Later, not different: a time zone that is set westward must not give the day once more either.
        if today > self._day:
            self._day = today
            self._tokens.clear()
            self._has_changed = True

    def _load(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
            day, tokens = _parse(data)
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not what this daemon writes"
            _logger.error("auth.usage_file: %s cannot be read, today's counts begin at 0: %s", path, reason)
            return
        if day >= self._day:
            self._tokens = tokens


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(path, data)


def _parse(data: bytes) -> tuple[datetime.date, dict[str, int]]:
    """Raises ValueError for anything that `_written` does not write."""
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError("too large")
    content: Any = json.loads(data)
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise ValueError("another version")
    day, tokens = content.get("day"), content.get("tokens")
    if not isinstance(day, str) or not isinstance(tokens, dict):
        raise ValueError("no day or no tokens")
    if not all(type(count) is int and count >= 0 for count in tokens.values()):
        raise ValueError("counts that are none")
    return datetime.date.fromisoformat(day), tokens
