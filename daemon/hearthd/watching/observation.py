"""What the daemon sees of itself: counts of what happened, the board's heat, and the metrics page if one is configured.

`life.parts` makes one, `server` starts it; `services` and `statuses` tell its `observers`. Knows no engine.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hearth.v1 import status_pb2
from hearthd.board.governor import Governor
from hearthd.board.thermal import Sensors
from hearthd.configuration.config import Config
from hearthd.listening.listeners import Listener, find_metrics_listeners
from hearthd.watching.outcomes import Observer
from hearthd.watching.tally import Tally

if TYPE_CHECKING:
    from hearthd.watching.metrics.endpoint import MetricsEndpoint

__all__ = ["Observation"]

_logger = logging.getLogger(__name__)

Describe = Callable[[], status_pb2.GetStatusResponse]


class Observation:
    """Of the event loop."""

    def __init__(self, config: Config, root: Path = Path("/"), taken: Sequence[Listener] = ()) -> None:
        """root: where the board's `sys` is. taken: where the daemon listens.

        Raises ConfigError if metrics.address cannot be used.
        """
        self._listeners = find_metrics_listeners(config.metrics, taken)
        self.tally = Tally()
        self.governor = Governor(Sensors(root), config.thermal.max_celsius)
        self.observers: list[Observer] = [self.tally]
        """Are told how chats and calls end."""
        self._metrics = _Metrics(self._listeners) if self._listeners else None
        if self._metrics:
            self.observers.append(self._metrics.figures)
        self._watching: asyncio.Task[None] | None = None

    @property
    def metrics_addresses(self) -> list[str]:
        """Where the metrics are, `host:port`, once it has started."""
        return self._metrics.endpoint.addresses if self._metrics and self._metrics.endpoint else []

    async def start(self, describe: Describe, num_audit_lines_lost: Callable[[], int]) -> None:
        """Begin. describe: the status now. Raises AddressInUseError."""
        self._watching = asyncio.create_task(self.governor.run())
        if self._metrics:
            await self._metrics.start(describe, num_audit_lines_lost)
        exposed = ", ".join(listener.text for listener in self._listeners if listener.is_exposed)
        if exposed:
            _logger.warning("metrics.allow_lan: everybody on the network can read the figures on %s", exposed)

    def close(self) -> None:
        """End, however far `start` has come."""
        if self._watching:
            self._watching.cancel()
        if self._metrics:
            self._metrics.close()


class _Metrics:
    """All that needs prometheus_client, which costs 3 MB: imported when one is made."""

    def __init__(self, listeners: tuple[Listener, ...]) -> None:
        from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics

        from hearthd.watching.metrics.figures import Figures

        # A series beside each counter that says when it began: the process has begun then.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._listeners = listeners
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.figures = Figures(self._registry)
        self.endpoint: MetricsEndpoint | None = None
        self._counting = self.figures.incident_handler()

    async def start(self, describe: Describe, num_audit_lines_lost: Callable[[], int]) -> None:
        from hearthd.watching.metrics.endpoint import MetricsEndpoint
        from hearthd.watching.metrics.live import LiveFigures

        self._registry.register(LiveFigures(describe, num_audit_lines_lost))
        logging.getLogger("hearthd.logs").addHandler(self._counting)
        self.endpoint = MetricsEndpoint(self._listeners, self._render)
        await self.endpoint.start()

    def close(self) -> None:
        logging.getLogger("hearthd.logs").removeHandler(self._counting)
        if self.endpoint:
            self.endpoint.close()

    def _render(self) -> tuple[bytes, str]:
        from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

        # The format that every version of Prometheus, and every other program that reads metrics, understands.
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4
