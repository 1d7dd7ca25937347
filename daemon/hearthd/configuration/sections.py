"""The sections of the configuration: each key's field, what it accepts, and its default.

`deploy/hearthd.toml` explains each of them. Reads nothing; `config` does, and every module of the serving side gets the
section that it needs.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from hearthd.configuration import paths
from hearthd.configuration.roles import ROLE_FORM, ROLE_NAME
from hearthd.configuration.setting import ByteSize, FileMode, Flag, Number, Pairs, Place, Strings, Text, Whole, Word

__all__ = [
    "MODEL_FORM",
    "MODEL_NAME",
    "AuditConfig",
    "AuthConfig",
    "CacheConfig",
    "DiscoveryConfig",
    "EngineConfig",
    "LimitsConfig",
    "LogConfig",
    "MetricsConfig",
    "ModelConfig",
    "ModelOptions",
    "ModelsConfig",
    "PolicyConfig",
    "ServerConfig",
    "ThermalConfig",
    "TlsConfig",
]

# The alphabet that `manifest` demands of a bundle's name: no path can be meant.
MODEL_NAME: Final = r"[a-z0-9][a-z0-9._-]{0,63}"
MODEL_FORM: Final = "up to 64 of a-z, 0-9, '.', '_', '-'"
# sun_path holds 108 bytes, the last of them zero (unix(7)).
_MAX_SOCKET_PATH_BYTES: Final = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the daemon listens, and how long it waits for whom."""

    unix_socket: Annotated[Path | None, Place(auto=paths.unix_socket, max_bytes=_MAX_SOCKET_PATH_BYTES)] = None
    unix_socket_mode: Annotated[int, FileMode()] = 0o660
    tcp: Annotated[tuple[str, ...], Strings(16)] = ("127.0.0.1:50051",)
    tls_socket: Annotated[Path | None, Place(max_bytes=_MAX_SOCKET_PATH_BYTES)] = None
    allow_insecure_lan: Annotated[bool, Flag()] = False
    max_connections: Annotated[int, Whole(1, 4096)] = 128
    write_timeout_seconds: Annotated[float, Number(0.1, 600.0)] = 10.0
    stream_backlog_bytes: Annotated[int, Whole(4096, 16 * 2**20)] = 256 * 1024
    stream_interval_ms: Annotated[int, Whole(0, 1000)] = 100
    drain_grace_seconds: Annotated[float, Number(0.0, 3600.0)] = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """Certificate chain and private key, PEM: in a directory, or two files; or none. For every TCP address."""

    directory: Annotated[Path | None, Place(auto=paths.tls_directory)] = None
    certificate: Annotated[Path | None, Place()] = None
    key: Annotated[Path | None, Place()] = None
    clients: Annotated[Path | None, Place()] = None

    @property
    def is_configured(self) -> bool:
        """Whether TCP addresses speak TLS."""
        return self.directory is not None or self.certificate is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """Who may call."""

    token_file: Annotated[Path | None, Place(auto=paths.token_file)] = None
    certificates: Annotated[
        tuple[tuple[str, str], ...],
        Pairs(
            1024, r"[\x21-\x7e]{1,253}", ROLE_NAME, 'names of client certificates with their roles, {"a.lan" = "user"}'
        ),
    ] = ()
    unix_needs_token: Annotated[bool, Flag()] = False
    health_open: Annotated[bool, Flag()] = False
    open_role: Annotated[str, Text(ROLE_NAME, ROLE_FORM)] = "user"
    usage_file: Annotated[Path | None, Place(auto=paths.usage_file)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryConfig:
    """Whether other machines are told, unasked, that there is a daemon."""

    announce: Annotated[bool, Flag()] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model is served by default."""

    directory: Annotated[Path, Place(auto=paths.model_directory, may_be_none=False)]
    name: Annotated[str, Text(MODEL_NAME, MODEL_FORM)] = "smollm2-135m"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsConfig:
    """What the models have between them, where there are several."""

    max_bytes: Annotated[int, ByteSize(2**50)] = 0
    max_wait_seconds: Annotated[float, Number(1.0, 3600.0)] = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """`[models.NAME]`: how one model is served. What is None is as [engine] says it for all."""

    slots: Annotated[int | None, Whole(1, 64)] = None
    context_length: Annotated[int | None, Whole(64, 131072)] = None
    threads: Annotated[int | None, Whole(0, 256)] = None
    keep: Annotated[bool | None, Flag()] = None
    """Whether it stays in memory. None: if it is the default model."""
    idle_seconds: Annotated[float, Number(0.0, 604800.0)] = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the model runs."""

    slots: Annotated[int, Whole(1, 64)] = 4
    context_length: Annotated[int, Whole(64, 131072)] = 2048
    threads: Annotated[int, Whole(0, 256)] = 0
    prefill_chunk: Annotated[int, Whole(2, 512)] = 64
    solo_prefill_chunk: Annotated[int, Whole(2, 512)] = 256
    max_stall_ms: Annotated[int, Whole(1, 10_000)] = 100
    max_answer_seconds: Annotated[float, Number(1.0, 86400.0)] = 600.0
    drafts: Annotated[bool, Flag()] = True
    kv_bytes: Annotated[int, ByteSize(2**50)] = 0

    @property
    def num_threads(self) -> int:
        """Threads of ONNX Runtime; where the key is 0, the CPUs that this process may use."""
        return self.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """What a request may ask for, and how many may wait."""

    max_queued: Annotated[int, Whole(0, 1024)] = 16
    default_max_tokens: Annotated[int, Whole(1, 131072)] = 512
    max_messages: Annotated[int, Whole(1, 4096)] = 256
    max_request_bytes: Annotated[int, Whole(1024, 4 * 2**20)] = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """What is kept of prompts."""

    directory: Annotated[Path | None, Place(auto=paths.prefix_directory)] = None
    max_bytes: Annotated[int, ByteSize(2**50)] = 256 * 2**20
    max_bytes_per_day: Annotated[int, ByteSize(2**50)] = 128 * 2**20
    min_tokens: Annotated[int, Whole(64, 131072)] = 64
    shared_prompts: Annotated[tuple[str, ...], Strings(16)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """What the owner wants of every conversation."""

    file: Annotated[Path | None, Place()] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """Who called, without a word of what was said."""

    file: Annotated[Path | None, Place()] = None
    max_bytes: Annotated[int, Whole(64 * 1024, 2**30)] = 4 * 2**20
    old_files: Annotated[int, Whole(0, 99)] = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Where Prometheus finds the metrics."""

    address: Annotated[str, Text(r"[!-~]{0,300}", 'host:port, or "" for none')] = ""
    allow_lan: Annotated[bool, Flag()] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ThermalConfig:
    """How hot the processor may become."""

    max_celsius: Annotated[float, Number(0.0, 150.0)] = 78.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What is told."""

    level: Annotated[str, Word(("debug", "info", "warning", "error"))] = "info"
