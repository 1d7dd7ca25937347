"""What systemd is told: ready, status, more time, and that the inference thread answers.

Uses systemd-python (`systemd.daemon`). Outside of systemd, which is to say without NOTIFY_SOCKET, everything here does
nothing. Under it, systemd-python must be installed: without it the unit would wait for READY until its time is over,
so `Notifier` refuses to begin.

Knows no gRPC and no engine. Called by `server`.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn

from hearthd.errors import ConfigError

__all__ = ["Notifier", "feed_watchdog"]

_logger = logging.getLogger(__name__)


class Notifier:
    """Speaks sd_notify(3)."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Raise ConfigError if systemd waits for words and systemd-python is not there to say them."""
        self._notify = _find_notify() if environment.get("NOTIFY_SOCKET") else None
        self.watchdog_seconds = _watchdog_seconds(environment)
        """How long systemd waits for `alive` before it kills; None if it does not."""

    def ready(self, status: str) -> None:
        """Tell that the daemon serves."""
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """Tell in one line what the daemon does; `systemctl status` shows it."""
        self._send(f"STATUS={status}")

    def stopping(self, status: str) -> None:
        """Tell that the daemon shuts down."""
        self._send(f"STOPPING=1\nSTATUS={status}")

    def reloading(self, status: str) -> None:
        """Tell that the configuration is being read again; `ready` tells that it was."""
        # systemd 253 and later want the time, so as not to take an earlier READY for the answer.
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now}\nSTATUS={status}")

    def extend_timeout(self, seconds: float) -> None:
        """Ask for this much more time, from now, to start or to stop."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self._notify is None:
            return
        try:
            self._notify(message)
        except OSError as error:
            # systemd may be restarting itself; a chat must not end for that.
            _logger.warning("systemd could not be told %s: %s", message.partition("=")[0], error.strerror)


def _find_notify() -> Callable[[str], object]:
    try:
        from systemd.daemon import notify
    except ImportError:
        raise ConfigError(
            "systemd waits to be told that the daemon is ready (NOTIFY_SOCKET is set), and systemd-python is missing; "
            "install python3-systemd, or systemd-python with pip"
        ) from None
    found: Callable[[str], object] = notify
    return found


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    # sd_watchdog_enabled(3): the variables are for one process, which WATCHDOG_PID names.
    pid, interval = environment.get("WATCHDOG_PID"), environment.get("WATCHDOG_USEC", "")
    if not environment.get("NOTIFY_SOCKET") or not interval.isdigit() or int(interval) == 0:
        return None
    if pid is not None and pid != str(os.getpid()):
        return None
    return int(interval) / 1e6


async def feed_watchdog(notifier: Notifier, watchdog_seconds: float, ping: Callable[[], Awaitable[None]]) -> NoReturn:
    """Feed the watchdog for as long as the inference thread does its work, and only then; cancel to end.

    ping: returns when a no-op has crossed the inference queue. A timer alone proves nothing: servers are known to call
    themselves healthy with a dead generator. Nor does what the thread did since the last time: it may have frozen just
    now, and systemd would hear of it that much later.
    """
    # A third leaves room for one late turn of a busy board; sd_watchdog_enabled(3) recommends half.
    interval = watchdog_seconds / 3
    while True:
        await asyncio.sleep(interval)
        # Not bounded in time: if it never comes back, nobody feeds the watchdog, and that is the point.
        await ping()
        notifier.alive()
