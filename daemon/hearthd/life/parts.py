"""What one daemon consists of, made from its configuration: nothing of it listens, loads or runs yet.

Says which part needs which other one; what happens to them when is `server`'s. Made by `server`; `grpc_servers` puts
the services behind addresses.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hearth.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc, status_pb2, status_pb2_grpc
from hearthd.access.auth import Authenticator
from hearthd.access.daily_usage import DailyUsage
from hearthd.access.metering import Meters
from hearthd.audit.audit_log import AuditLog
from hearthd.configuration.config import AuditConfig, Config
from hearthd.inference.model import Model
from hearthd.life.live_parts import Access, Certificates, Limits, LogLevel, Models, Rules, SharedPrompts
from hearthd.life.reload import Reload, Reloadable
from hearthd.listening.connection_guard import ConnectionGuard
from hearthd.listening.listeners import find_listeners
from hearthd.listening.tls import CertificateSource, find_exposure, find_files
from hearthd.models.facts import ModelFacts
from hearthd.models.pool import ModelPool
from hearthd.pairing.gate import PairingGate
from hearthd.policy.policy_file import PolicyFile
from hearthd.policy.rules import Policy
from hearthd.services.chat import ChatService
from hearthd.services.health import HealthService
from hearthd.services.model import ModelService
from hearthd.services.status import StatusService
from hearthd.services.tokenising import Tokenising
from hearthd.text.chat_template import Message
from hearthd.watching.observation import Observation
from hearthd.watching.troubles import Troubles

__all__ = ["HEALTH", "SERVICES", "Parts"]

_logger = logging.getLogger(__name__)

SERVICES: Final = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((chat_pb2, "ChatService"), (model_pb2, "ModelService"), (status_pb2, "StatusService"))
)
HEALTH: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Parts:
    """The parts of one daemon, each of which others ask for by its name here."""

    def __init__(
        self,
        config: Config,
        load: Callable[[Config], Model],
        load_again: Callable[[], Config] | None = None,
        survey: Callable[[Config], ModelFacts] | None = None,
        root: Path = Path("/"),
    ) -> None:
        """Arguments as of `Server`. Raises ConfigError if the configuration cannot be used."""
        self._config = config
        self.listeners = find_listeners(config.server, config.tls, config.auth)
        self._tls_files = find_files(config.tls)
        self.certificates = CertificateSource(self._tls_files) if self._tls_files else None
        self.authenticator = Authenticator(config.auth, config.roles)
        self.daily_usage = DailyUsage(config.auth.usage_file)
        self.meters = Meters(self.daily_usage)
        self.pairing = PairingGate(config.auth.token_file)
        self.guard = ConnectionGuard(config.server.max_connections)
        self.observation = Observation(config, root, self.listeners)
        self.models = ModelPool(config, load, survey, lambda: self.observation.governor.throttle)
        self.policy = PolicyFile(config.policy.file, config.roles)
        self.audit_log = _open_audit_log(config.audit)
        self.tokenising = Tokenising()
        self._chat = ChatService(
            self.models,
            self.meters,
            config.limits,
            self.tokenising,
            self.policy,
            write_timeout_seconds=config.server.write_timeout_seconds,
            observation=self.observation,
        )
        self._model = ModelService(self.models, config.limits, self.tokenising, self.policy)
        self.health = HealthService((*SERVICES, HEALTH), self.models.health, self.models.changed)
        self.reload = Reload(config, load_again or (lambda: config), self._make_live_parts(), _check_exposure)
        self.status = StatusService(
            models=self.models,
            observation=self.observation,
            model_name=config.model.name,
            warnings=self._make_troubles().find,
        )

    @property
    def services(self) -> list[tuple[Callable[[Any, grpc.aio.Server], None], object]]:
        """Each service, with what adds it to a gRPC server. Pairing has a gate instead."""
        return [
            (chat_pb2_grpc.add_ChatServiceServicer_to_server, self._chat),
            (model_pb2_grpc.add_ModelServiceServicer_to_server, self._model),
            (status_pb2_grpc.add_StatusServiceServicer_to_server, self.status),
            (health_pb2_grpc.add_HealthServicer_to_server, self.health),
        ]

    def warn(self) -> None:
        """Say what the configuration in force allows and somebody may not have meant."""
        exposed = ", ".join(listener.text for listener in self.listeners if listener.is_exposed)
        num_credentials = self.authenticator.num_credentials
        if exposed and (num_credentials is None or self.certificates is None):
            _logger.warning(
                "server.allow_insecure_lan: %s is open to the network without TLS or authentication", exposed
            )
        if self._tls_files and (exposure := find_exposure(self._tls_files.key)):
            _logger.warning("%s", exposure)
        if num_credentials == 0:
            _logger.warning("%s has no token, so nobody can call on TCP", self.reload.config.auth.token_file)

    def check_policy(self) -> None:
        """Hold the policy, and every later one, against the models that are loaded. Raises ConfigError."""
        self.policy.add_check(self._check_prompts)

    def num_audit_lines_lost(self) -> int:
        """Return how many lines the audit log could not write."""
        return self.audit_log.num_lost if self.audit_log else 0

    def _make_live_parts(self) -> list[Reloadable]:
        parts: list[Reloadable] = [Limits(self.models, (self._chat, self._model)), Access(self.authenticator)]
        parts += [Models(self.models), Rules(self.policy), SharedPrompts(self.models), LogLevel()]
        return [*parts, Certificates(self.certificates)] if self.certificates else parts

    def _make_troubles(self) -> Troubles:
        first = (self.models, self.authenticator, self.guard, self.daily_usage)
        parts = (*first, self.certificates, self.audit_log, self.reload)
        written = {"auth.usage_file": self._config.auth.usage_file, "audit.file": self._config.audit.file}
        problems = [part.find_problem for part in parts if part is not None]
        return Troubles([*problems, self._find_prefix_problem], written)

    def _find_prefix_problem(self) -> str | None:
        engines = [engine for worker in self.models.workers if (engine := worker.engine)]
        return next((problem for each in engines if each.stored and (problem := each.stored.store.problem)), None)

    def _check_prompts(self, policy: Policy) -> None:
        # In another thread than the models', which come and go meanwhile.
        for model in [worker.loaded for worker in self.models.workers]:
            if model is None:
                continue
            policy.check_prompts(partial(_num_tokens, model), model.engine.context_length)


def _open_audit_log(audit: AuditConfig) -> AuditLog | None:
    if audit.file is None:
        return None
    return AuditLog(audit.file, max_bytes=audit.max_bytes, num_old_files=audit.old_files)


def _num_tokens(model: Model, messages: Sequence[Message]) -> int:
    return len(model.tokenizer.encode_chat(messages))


def _check_exposure(config: Config) -> None:
    """Raise ConfigError where new keys would open what the old addresses listen on."""
    find_listeners(config.server, config.tls, config.auth)
