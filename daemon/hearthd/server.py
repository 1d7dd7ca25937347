"""The daemon's life: lock, bind, load, prove, serve, read its configuration again, drain, end.

Callers can connect from the moment that the addresses are bound; until the model has generated real tokens they
hear that it is loading. Called by `__main__`.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hearth.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc, pairing_pb2, status_pb2, status_pb2_grpc
from hearthd.access.auth import AccessInterceptor, Authenticator
from hearthd.access.daily_usage import DailyUsage
from hearthd.access.metering import Meters
from hearthd.audit.audit import AuditInterceptor, RefusalRecorder
from hearthd.audit.audit_log import AuditLog
from hearthd.configuration.config import AuditConfig, Config
from hearthd.errors import NotServingError
from hearthd.inference.model import Model
from hearthd.life.live_parts import Access, Certificates, Limits, LogLevel, Models, Rules, SharedPrompts
from hearthd.life.notify import Notifier, feed_watchdog
from hearthd.life.reload import Outcome, Reload, Reloadable
from hearthd.listening.announcing import announce
from hearthd.listening.binding import bind
from hearthd.listening.connection_guard import ConnectionGuard
from hearthd.listening.instance_lock import hold_socket
from hearthd.listening.listeners import find_listeners
from hearthd.listening.tls import CertificateSource, find_exposure, find_files
from hearthd.listening.transport import transport_options
from hearthd.logs import describe_exception
from hearthd.models.facts import ModelFacts
from hearthd.models.pool import ModelPool
from hearthd.pairing.gate import PairingGate
from hearthd.policy.policy_file import PolicyFile
from hearthd.policy.rules import Policy
from hearthd.services.chat import ChatService
from hearthd.services.health import HealthService
from hearthd.services.model import ModelService
from hearthd.services.status import StatusService
from hearthd.services.statuses import ErrorBoundary
from hearthd.services.tokenising import Tokenising
from hearthd.text.chat_template import Message
from hearthd.watching.observation import Observation
from hearthd.watching.troubles import Troubles

__all__ = ["CLOSE_SECONDS", "Server"]

_logger = logging.getLogger(__name__)

# After the grace: for chats to hear UNAVAILABLE, connections to close and the thread to end.
CLOSE_SECONDS: Final = 2.0
# systemd is asked for more time this often, each time for three times as much.
_EXTEND_SECONDS: Final = 10.0
# A model that is not ready by then never will be; systemd may then end the wait.
_MAX_LOAD_SECONDS: Final = 900.0
_SERVICES: Final = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((chat_pb2, "ChatService"), (model_pb2, "ModelService"), (status_pb2, "StatusService"))
)
_PAIRING: Final = pairing_pb2.DESCRIPTOR.services_by_name["PairingService"].full_name
_HEALTH: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


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
        self._listeners = find_listeners(config.server, config.tls, config.auth)
        self._tls_files = find_files(config.tls)
        self._certificates = CertificateSource(self._tls_files) if self._tls_files else None
        self._authenticator = Authenticator(config.auth, config.roles)
        self._daily_usage = DailyUsage(config.auth.usage_file)
        self._meters = Meters(self._daily_usage)
        self._pairing = PairingGate(config.auth.token_file)
        self._guard = ConnectionGuard(config.server.max_connections)
        self._observation = Observation(config, root)
        self._models = ModelPool(config, load, survey, lambda: self._observation.governor.throttle)
        self._policy = PolicyFile(config.policy.file, config.roles)
        self._audit_log = _open_audit_log(config.audit)
        self._health = HealthService((*_SERVICES, _HEALTH), self._models.health, self._models.changed)
        self._tokenising = Tokenising()
        self._status_service = StatusService(
            models=self._models, observation=self._observation, model_name=config.model.name, warnings=self._warnings
        )
        self._services = self._make_services()
        self._reload = Reload(config, load_again or (lambda: config), self._make_parts(), _check_exposure)
        self._troubles = self._make_troubles()
        self._must_reload = asyncio.Event()
        self._servers: list[grpc.aio.Server] = []
        self._must_stop = asyncio.Event()
        self._must_hurry = asyncio.Event()
        self.addresses: list[str] = []
        """Where it listens, once it does: `unix:///path`, `host:port`."""
        self.is_ready = asyncio.Event()

    def stop(self) -> None:
        """Begin to drain; called once more, end without waiting for running answers. Of the event loop."""
        if self._must_stop.is_set():
            self._must_hurry.set()
        self._must_stop.set()

    @property
    def metrics_addresses(self) -> list[str]:
        """Where the metrics are, `host:port`, once it serves them."""
        return self._observation.metrics_addresses

    def reload(self) -> None:
        """Read the configuration again, as soon as the model is there. Of the event loop."""
        self._must_reload.set()

    async def run(self) -> None:
        """Serve until `stop` is called.

        Raises AddressInUseError, ConfigError or whatever `load` raises before it is ready, EngineCrashedError after.
        """
        asyncio.get_running_loop().set_exception_handler(_log_loop_error)
        watching: list[asyncio.Task[None]] = []
        with ExitStack() as held:
            try:
                self._bind(held)
                for server in self._servers:
                    await server.start()
                _logger.info("listening on %s", ", ".join(self.addresses))
                ports = {int(each.rpartition(":")[2]) for each in self.addresses if not each.startswith("unix:")}
                watching.append(asyncio.create_task(self._guard.watch(ports)))
                audit_log = self._audit_log
                await self._observation.start(
                    self._status_service.describe, lambda: audit_log.num_lost if audit_log else 0
                )
                self._warn()
                if await self._load():
                    await self._serve()
            finally:
                await _cancel(*watching)
                await self._close()

    # Binding.

    def _bind(self, held: ExitStack) -> None:
        """Bind all addresses.

        Local ones and those of the network get a gRPC server each: a flood of connections to one leaves the other.
        """
        unix = [listener for listener in self._listeners if listener.is_local]
        network = [listener for listener in self._listeners if not listener.is_local]
        for listeners in (unix, network):
            if not listeners:
                continue
            server = self._make_server(is_unix=listeners is unix)
            self._servers.append(server)
            for listener in listeners:
                if listener.socket_path:
                    held.enter_context(hold_socket(listener.socket_path))
                secret = self._certificates.credentials() if self._certificates and not listener.is_local else None
                mode = self._config.server.unix_socket_mode
                self.addresses.append(bind(server, listener, unix_socket_mode=mode, credentials=secret))

    def _make_server(self, *, is_unix: bool) -> grpc.aio.Server:
        access = AccessInterceptor(self._authenticator, self._meters, self._guard, is_unix=is_unix)
        audit = [AuditInterceptor(self._audit_log)] if self._audit_log else []
        boundary = ErrorBoundary([*self._observation.observers, RefusalRecorder()])
        server = grpc.aio.server(
            interceptors=[*audit, boundary, self._pairing, access],
            options=transport_options(self._config.server, self._config.limits),
        )
        for add, servicer in self._services:
            add(servicer, server)
        reflection.enable_server_reflection((*_SERVICES, _PAIRING, _HEALTH, reflection.SERVICE_NAME), server)
        return server

    def _make_services(self) -> list[tuple[Callable[[Any, grpc.aio.Server], None], object]]:
        config, models, tokenising = self._config, self._models, self._tokenising
        chat = ChatService(
            models,
            self._meters,
            config.limits,
            tokenising,
            self._policy,
            write_timeout_seconds=config.server.write_timeout_seconds,
            observation=self._observation,
        )
        model = ModelService(models, config.limits, tokenising, self._policy)
        status = self._status_service
        return [
            (chat_pb2_grpc.add_ChatServiceServicer_to_server, chat),
            (model_pb2_grpc.add_ModelServiceServicer_to_server, model),
            (status_pb2_grpc.add_StatusServiceServicer_to_server, status),
            (health_pb2_grpc.add_HealthServicer_to_server, self._health),
        ]

    def _make_troubles(self) -> Troubles:
        first = (self._models, self._authenticator, self._guard, self._daily_usage)
        parts = (*first, self._certificates, self._audit_log, self._reload)
        written = {"auth.usage_file": self._config.auth.usage_file, "audit.file": self._config.audit.file}
        problems = [part.find_problem for part in parts if part is not None]
        return Troubles([*problems, self._find_prefix_problem], written)

    def _find_prefix_problem(self) -> str | None:
        engines = [worker.engine for worker in self._models.workers if worker.engine]
        return next((problem for each in engines if each.stored and (problem := each.stored.store.problem)), None)

    def _warnings(self) -> list[str]:
        return self._troubles.find()

    def _make_parts(self) -> list[Reloadable]:
        services = [service for _, service in self._services if isinstance(service, ChatService | ModelService)]
        parts: list[Reloadable] = [Limits(self._models, services), Access(self._authenticator)]
        parts += [Models(self._models), Rules(self._policy), SharedPrompts(self._models), LogLevel()]
        return [*parts, Certificates(self._certificates)] if self._certificates else parts

    def _warn(self) -> None:
        """Say what the configuration allows and somebody may not have meant."""
        exposed = ", ".join(listener.text for listener in self._listeners if listener.is_exposed)
        num_credentials = self._authenticator.num_credentials
        if exposed and (num_credentials is None or self._certificates is None):
            _logger.warning(
                "server.allow_insecure_lan: %s is open to the network without TLS or authentication", exposed
            )
        if self._tls_files and (exposure := find_exposure(self._tls_files.key)):
            _logger.warning("%s", exposure)
        if num_credentials == 0:
            _logger.warning("%s has no token, so nobody can call on TCP", self._config.auth.token_file)

    # Loading.

    async def _load(self) -> bool:
        """Load and prove the model. Returns whether to go on: not if `stop` came first."""
        self._notifier.status(f"loading {self._config.model.name}")
        loading = asyncio.create_task(self._models.start())
        stopping = asyncio.create_task(self._must_stop.wait())
        extending = asyncio.create_task(self._extend_timeout(_MAX_LOAD_SECONDS))
        try:
            await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                return False
            await loading
        finally:
            await _cancel(loading, stopping, extending)
        self._policy.add_check(self._check_policy)
        return True

    def _check_policy(self, policy: Policy) -> None:
        for model in [worker.model for worker in self._models.workers]:
            policy.check_prompts(partial(_num_tokens, model), model.engine.context_length)

    async def _extend_timeout(self, longest_seconds: float) -> None:
        for _ in range(int(longest_seconds / _EXTEND_SECONDS)):
            self._notifier.extend_timeout(3 * _EXTEND_SECONDS)
            await asyncio.sleep(_EXTEND_SECONDS)

    # Serving.

    async def _serve(self) -> None:
        """Serve until told to stop, or until the inference thread ends by itself; then drain."""
        self._health.set_serving(True)
        self._notifier.ready(self._status())
        self.is_ready.set()
        stopping = asyncio.create_task(self._must_stop.wait())
        crashing = asyncio.create_task(self._models.wait_until_crashed())
        reloading = asyncio.create_task(self._reload_when_asked())
        saving = asyncio.create_task(self._daily_usage.keep_saving())
        announcing = asyncio.create_task(self._announce())
        feeding = (
            [asyncio.create_task(self._feed_watchdog(seconds))] if (seconds := self._notifier.watchdog_seconds) else []
        )
        try:
            await asyncio.wait((stopping, crashing), return_when=asyncio.FIRST_COMPLETED)
            # It must not say READY after STOPPING.
            await _cancel(reloading)
            self._health.set_serving(False)
            if crashing.done():
                crashing.result()
            await self._drain(crashing)
            if crashing.done():
                crashing.result()
        finally:
            await _cancel(stopping, crashing, saving, announcing, *feeding)

    def _status(self, outcome: Outcome | None = None) -> str:
        """Say in one line what the daemon does, and what its operator has to do."""
        serving = f"serving {self._config.model.name} on {', '.join(self.addresses)}"
        if outcome is None or not (outcome.error or outcome.need_restart):
            return serving
        if outcome.error:
            return f"{serving}; the new configuration cannot be used, the old one stays: {outcome.error}"
        return f"{serving}; needs a restart: {', '.join(outcome.need_restart)}"

    async def _reload_when_asked(self) -> None:
        while True:
            await self._must_reload.wait()
            self._must_reload.clear()
            self._notifier.reloading("reading the configuration again")
            outcome = await self._reload.run()
            self._config = self._reload.config
            self._warn()
            self._notifier.ready(self._status(outcome))

    async def _announce(self) -> None:
        if self._config.discovery.announce:
            bound = zip(self._listeners, self.addresses, strict=True)
            exposed = [address for listener, address in bound if listener.is_exposed and not listener.socket_path]
            await announce(exposed, lambda: self._certificates.fingerprint if self._certificates else None)

    async def _feed_watchdog(self, seconds: float) -> None:
        await feed_watchdog(self._notifier, seconds, self._models.ping)

    async def _drain(self, crashing: "asyncio.Task[None]") -> None:
        """Let running answers finish, within the grace; fail the others."""
        grace = self._config.server.drain_grace_seconds
        self._models.begin_drain()
        self._notifier.stopping(f"shutting down: {self._models.num_chats} chats may finish within {grace:g} s")
        self._notifier.extend_timeout(grace + 2 * CLOSE_SECONDS)
        _logger.info("shutting down: %d chats may finish within %g s", self._models.num_chats, grace)
        self._health.end_watches()
        idle = asyncio.create_task(self._models.wait_until_idle())
        hurry = asyncio.create_task(self._must_hurry.wait())
        try:
            await asyncio.wait((idle, hurry, crashing), timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(idle, hurry)
        if self._models.num_chats:
            _logger.warning("%d chats did not finish within the grace", self._models.num_chats)
            self._models.fail_chats(NotServingError("the daemon is shutting down; try again in a few seconds"))

    # Ending.

    async def _close(self) -> None:
        """Close connections and end the thread, within CLOSE_SECONDS or so, however far `run` has come."""
        self._health.set_serving(False)
        self._health.end_watches()
        self._models.stop()
        # Not `stop(None)`: chats that have just failed must still be able to say so.
        await asyncio.gather(*(server.stop(CLOSE_SECONDS / 2) for server in self._servers))
        self._tokenising.close()
        self._observation.close()
        if self._audit_log:
            await asyncio.to_thread(self._audit_log.close)
        await self._daily_usage.save()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS / 2):
                await self._models.wait_until_gone()


def _open_audit_log(audit: AuditConfig) -> AuditLog | None:
    if audit.file is None:
        return None
    return AuditLog(audit.file, max_bytes=audit.max_bytes, num_old_files=audit.old_files)


def _num_tokens(model: Model, messages: Sequence[Message]) -> int:
    return len(model.tokenizer.encode_chat(messages))


def _check_exposure(config: Config) -> None:
    """Raise ConfigError where new keys would open what the old addresses listen on."""
    find_listeners(config.server, config.tls, config.auth)


async def _cancel(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # asyncio's own handler would print the exception with its message, and the task with its result.
    error = context.get("exception")
    described = describe_exception(error) if isinstance(error, BaseException) else "no exception"
    _logger.error("the event loop reports %s: %s", str(context.get("message"))[:200], described)
