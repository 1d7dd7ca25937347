"""The settings that all scenarios share, and how much of its work each does. Made by `../serve.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from load.hearth_server import COMMAND, HearthServer


@dataclass(frozen=True, slots=True)
class Bench:
    """One run.

    scale: the share of a scenario's rounds, requests and seconds; 1 is what the targets ask for. output: a directory,
    for logs too. rates: requests a second that the open loop offers, one after the other. say: is told of each step.
    """

    model: Path
    output: Path
    say: Callable[[str], None]
    threads: int = 2
    slots: int = 4
    seed: int = 1
    scale: float = 1.0
    command: Sequence[str] = COMMAND
    context_length: int = 2048
    # On two cores of 2026 the first is well below what answering one after the other can do, the second beyond it.
    rates: tuple[float, ...] = (1.0, 2.5)
    peer: Callable[[], tuple[Path, Path]] | None = None

    def count(self, number: int, *, least: int = 1) -> int:
        """Return how many of something there are in a run of this scale."""
        return max(least, round(number * self.scale))

    def server(
        self,
        name: str,
        *,
        callers: Sequence[str],
        slots: int | None = None,
        each_token: bool = False,
        settings: str = "",
    ) -> HearthServer:
        """Return a daemon for one scenario, which is not started yet. each_token: it sends each by itself."""
        return HearthServer(
            self.model,
            self.output / f"{name}.log",
            threads=self.threads,
            slots=slots or self.slots,
            context_length=self.context_length,
            callers=callers,
            command=self.command,
            each_token=each_token,
            settings=settings,
        )
