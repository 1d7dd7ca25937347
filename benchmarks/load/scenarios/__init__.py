"""The scenarios, by the names that `--only` takes, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from load.bench import Bench
from load.scenarios import cancels, flood, house, memory, mixes, peer, prefix, stall, throughput
from load.targets import Result

SCENARIOS: dict[str, Callable[[Bench], Coroutine[Any, Any, Result]]] = {
    "house": house.run,
    "peer": peer.run,
    "throughput": throughput.run,
    "prefix": prefix.run,
    "stall": stall.run,
    "cancels": cancels.run,
    "flood": flood.run,
    "mixes": mixes.run,
    "memory": memory.run,
}
# Takes minutes for a single figure: only when it is named.
ONLY_BY_NAME = frozenset({"memory"})
