"""The parts of the daemon that take new values while it serves, for `reload`, which says what a part is.

Made by `parts`, which owns what they change.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from hearthd.access.auth import Authenticator
from hearthd.configuration.config import Config, LimitsConfig
from hearthd.inference.shared_prompts import read_shared_prompts
from hearthd.life.reload import Apply
from hearthd.listening.tls import CertificateSource, find_files, read_certificate
from hearthd.logs import set_log_level
from hearthd.models.pool import ModelPool
from hearthd.policy.policy_file import PolicyFile

__all__ = ["Access", "Certificates", "HasLimits", "Limits", "LogLevel", "Models", "Rules", "SharedPrompts"]


class HasLimits(Protocol):
    """A service that checks requests."""

    limits: LimitsConfig


class Limits:
    """What a request may ask for, and how many may wait. Chats that were admitted before go on as they are.

    Not limits.max_request_bytes: gRPC has it from the start.
    """

    keys = frozenset({"limits.max_queued", "limits.default_max_tokens", "limits.max_messages"})

    def __init__(self, models: ModelPool, services: Iterable[HasLimits]) -> None:
        self._models = models
        self._services = tuple(services)

    def prepare(self, config: Config) -> Apply:
        """Any limits that the configuration admits can be put in force."""

        def apply() -> None:
            self._models.change_limits(
                max_queued=config.limits.max_queued, default_max_tokens=config.limits.default_max_tokens
            )
            for service in self._services:
                service.limits = config.limits

        return apply


class Access:
    """Who may call what: tokens, certificates' names, roles. From the next call on.

    Tokens are followed at each call anyway. Where their file is needs a restart.
    """

    keys = frozenset({"auth.certificates", "auth.unix_needs_token", "auth.health_open", "auth.open_role", "roles"})

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    def prepare(self, config: Config) -> Apply:
        """Read the token file. Raises ConfigError if it cannot be used."""
        return self._authenticator.prepare(config.auth, config.roles)


class Certificates:
    """The contents of the certificate's files. Where they are needs a restart.

    They are followed at each handshake anyway. A reload says at once, and to whoever asked for it, whether those that
    are there now can be used.
    """

    keys: frozenset[str] = frozenset()

    def __init__(self, source: CertificateSource) -> None:
        self._source = source

    def prepare(self, config: Config) -> Apply:
        """Read the files. Raises ConfigError if they cannot be used."""
        if files := find_files(config.tls):
            read_certificate(files)
        return self._source.refresh


class Rules:
    """The policy: what is asked of the model beside what callers ask. Chats that run go on by the old one."""

    keys = frozenset({"policy.file"})

    def __init__(self, policy: PolicyFile) -> None:
        self._policy = policy

    def prepare(self, config: Config) -> Apply:
        """Read the policy file. Raises ConfigError if it cannot be used."""
        return self._policy.prepare(config.policy.file, config.roles)


class SharedPrompts:
    """Beginnings of prompts that the models have ready for all callers: they follow the policy and their files.

    Nobody's answer depends on them. After `Rules` and `Access`.
    """

    keys = frozenset({"cache.shared_prompts"})

    def __init__(self, models: ModelPool) -> None:
        self._models = models

    def prepare(self, config: Config) -> Apply:
        """Read the files. Raises ConfigError if one cannot be used."""
        read_shared_prompts(config)
        return lambda: self._models.change_shared_prompts(config)


class Models:
    """Which models there are beside the default one, and how each is served. Chats that run go on as they are.

    One that is not installed is a warning, as at the start: nobody else is kept waiting for it.
    """

    keys = frozenset({"models", "models.max_bytes", "models.max_wait_seconds"})

    def __init__(self, models: ModelPool) -> None:
        self._models = models

    def prepare(self, config: Config) -> Apply:
        """Any models that the configuration admits can be named."""
        return lambda: self._models.change_models(config)


class LogLevel:
    """What is told."""

    keys = frozenset({"log.level"})

    def __init__(self, set_level: Callable[[str], object] = set_log_level) -> None:
        self._set_level = set_level

    def prepare(self, config: Config) -> Apply:
        """Any level that the configuration admits can be put in force."""
        return lambda: self._set_level(config.log.level)
