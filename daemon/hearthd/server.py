"""The daemon's life: bind, load, prove, serve, read its configuration again, drain, end.

Callers can connect from the moment that the addresses are bound; until the model has generated real tokens they
hear that it is loading. What the daemon consists of is in `life.parts`. Called by `__main__`.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from hearthd.configuration.config import Config
from hearthd.errors import NotServingError
from hearthd.inference.model import Model
from hearthd.life.beside import beside, first_of
from hearthd.life.grpc_servers import GrpcServers
from hearthd.life.notify import Notifier, feed_watchdog
from hearthd.life.parts import Parts
from hearthd.life.reload import Outcome
from hearthd.listening.announcing import announce
from hearthd.logs import describe_exception
from hearthd.models.facts import ModelFacts

__all__ = ["CLOSE_SECONDS", "Server"]

_logger = logging.getLogger(__name__)

# After the grace: for chats to hear UNAVAILABLE, connections to close and the thread to end.
CLOSE_SECONDS: Final = 2.0
# systemd is asked for more time this often, each time for three times as much.
_EXTEND_SECONDS: Final = 10.0
# A model that is not ready by then never will be; systemd may then end the wait.
_MAX_LOAD_SECONDS: Final = 900.0


class Server:
    """One daemon. `run` is its whole life; `stop` ends it."""

    def __init__(
        self,
        config: Config,
        load: Callable[[Config], Model],
        notifier: Notifier | None = None,
        load_again: Callable[[], Config] | None = None,
        survey: Callable[[Config], ModelFacts] | None = None,
        root: Path = Path("/"),
    ) -> None:
        """load: called in a model's inference thread, with the configuration as that model has it.

        load_again: reads what stands in the configuration file by then.
        survey: says what is known of a model before it is loaded. root: where the board's `sys` is.
        Raises ConfigError if the configuration cannot be used.
        """
        self._config = config
        self._notifier = notifier or Notifier({})
        self._parts = Parts(config, load, load_again, survey, root)
        self._grpc = GrpcServers(config, self._parts)
        self._must_reload = asyncio.Event()
        self._must_stop = asyncio.Event()
        self._must_hurry = asyncio.Event()
        self.is_ready = asyncio.Event()

    def stop(self) -> None:
        """Begin to drain; called once more, end without waiting for running answers. Of the event loop."""
        if self._must_stop.is_set():
            self._must_hurry.set()
        self._must_stop.set()

    def reload(self) -> None:
        """Read the configuration again, as soon as the model is there. Of the event loop."""
        self._must_reload.set()

    @property
    def addresses(self) -> list[str]:
        """Where it listens, once it does: `unix:///path`, `host:port`."""
        return self._grpc.addresses

    @property
    def metrics_addresses(self) -> list[str]:
        """Where the metrics are, `host:port`, once it serves them."""
        return self._parts.observation.metrics_addresses

    async def run(self) -> None:
        """Serve until `stop` is called.

        Raises AddressInUseError, ConfigError or whatever `load` raises before it is ready, EngineCrashedError after.
        """
        asyncio.get_running_loop().set_exception_handler(_log_loop_error)
        with ExitStack() as held:
            try:
                await self._open(held)
                if await self._load():
                    async with beside(self._feed_watchdog(), self._parts.daily_usage.keep_saving(), self._announce()):
                        await self._serve()
                        await self._drain()
            finally:
                await self._close()

    async def _open(self, held: ExitStack) -> None:
        await self._grpc.open(held)
        await self._parts.observation.start(self._parts.status.describe, self._parts.num_audit_lines_lost)
        self._parts.warn()

    async def _load(self) -> bool:
        """Load and prove the model. Returns whether to go on: not if `stop` came first."""
        self._notifier.status(f"loading {self._config.model.name}")
        async with beside(self._extend_timeout()):
            if not await first_of(self._parts.models.start(), self._must_stop.wait()):
                return False
        self._parts.check_policy()
        return True

    async def _serve(self) -> None:
        """Serve until told to stop. Raises EngineCrashedError if an inference thread ends by itself."""
        self._parts.health.set_serving(True)
        self._notifier.ready(self._status())
        self.is_ready.set()
        # It ends here, with the serving: it must not say READY after STOPPING.
        async with beside(self._reload_when_asked()):
            await first_of(self._must_stop.wait(), self._parts.models.wait_until_crashed())

    async def _drain(self) -> None:
        """Let running answers finish, within the grace; fail the others. Raises EngineCrashedError as `_serve`."""
        grace, models = self._config.server.drain_grace_seconds, self._parts.models
        self._parts.health.set_serving(False)
        models.begin_drain()
        self._notifier.stopping(f"shutting down: {models.num_chats} chats may finish within {grace:g} s")
        self._notifier.extend_timeout(grace + 2 * CLOSE_SECONDS)
        _logger.info("shutting down: %d chats may finish within %g s", models.num_chats, grace)
        self._parts.health.end_watches()
        await first_of(models.wait_until_idle(), self._must_hurry.wait(), models.wait_until_crashed(), timeout=grace)
        if models.num_chats:
            _logger.warning("%d chats did not finish within the grace", models.num_chats)
            models.fail_chats(NotServingError("the daemon is shutting down; try again in a few seconds"))

    async def _close(self) -> None:
        """Close connections and end the thread, within CLOSE_SECONDS or so, however far `run` has come."""
        parts = self._parts
        parts.health.set_serving(False)
        parts.health.end_watches()
        parts.models.stop()
        await self._grpc.close(CLOSE_SECONDS / 2)
        parts.tokenising.close()
        parts.observation.close()
        if parts.audit_log:
            await asyncio.to_thread(parts.audit_log.close)
        await parts.daily_usage.save()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS / 2):
                await parts.models.wait_until_gone()

    # Beside that.

    async def _extend_timeout(self) -> None:
        for _ in range(int(_MAX_LOAD_SECONDS / _EXTEND_SECONDS)):
            self._notifier.extend_timeout(3 * _EXTEND_SECONDS)
            await asyncio.sleep(_EXTEND_SECONDS)

    async def _feed_watchdog(self) -> None:
        if seconds := self._notifier.watchdog_seconds:
            await feed_watchdog(self._notifier, seconds, self._parts.models.ping)

    async def _announce(self) -> None:
        if self._config.discovery.announce:
            certificates = self._parts.certificates
            await announce(self._grpc.exposed(), lambda: certificates.fingerprint if certificates else None)

    async def _reload_when_asked(self) -> None:
        while True:
            await self._must_reload.wait()
            self._must_reload.clear()
            self._notifier.reloading("reading the configuration again")
            outcome = await self._parts.reload.run()
            self._config = self._parts.reload.config
            self._parts.warn()
            self._notifier.ready(self._status(outcome))

    def _status(self, outcome: Outcome | None = None) -> str:
        """Say in one line what the daemon does, and what its operator has to do."""
        serving = f"serving {self._config.model.name} on {', '.join(self.addresses)}"
        if outcome is None or not (outcome.error or outcome.need_restart):
            return serving
        if outcome.is_partial:
            return f"{serving}; a part of the new configuration is not in force: {outcome.error}"
        if outcome.error:
            return f"{serving}; the new configuration cannot be used, the old one stays: {outcome.error}"
        return f"{serving}; needs a restart: {', '.join(outcome.need_restart)}"


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # asyncio's own handler would print the exception with its message, and the task with its result.
    error = context.get("exception")
    described = describe_exception(error) if isinstance(error, BaseException) else "no exception"
    _logger.error("the event loop reports %s: %s", str(context.get("message"))[:200], described)
