"""The daemon's configuration: one frozen tree from a TOML file and the environment, validated once.

`deploy/hearthd.toml` shows every key with its meaning and default. HEARTHD_<SECTION>_<KEY> in the environment comes
before the file. Whatever is not known is refused: a misspelt limit must not silently be none.
The keys themselves are in `config_sections`.

Opens the one file that it is told to, resolves no host name and reads no certificate: `listeners` and `tls` do that.
Called by `__main__`; every other module of the serving side gets the section that it needs.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, get_type_hints

from hearthd.configuration import paths
from hearthd.configuration.roles import BUILT_IN, ROLE_FORM, ROLE_NAME, Role
from hearthd.configuration.sections import (
    MODEL_FORM,
    MODEL_NAME,
    AuditConfig,
    AuthConfig,
    CacheConfig,
    DiscoveryConfig,
    EngineConfig,
    LimitsConfig,
    LogConfig,
    MetricsConfig,
    ModelConfig,
    ModelOptions,
    ModelsConfig,
    PolicyConfig,
    ServerConfig,
    ThermalConfig,
    TlsConfig,
)
from hearthd.configuration.setting import Kind, Place
from hearthd.errors import ConfigError

__all__ = [
    "AuditConfig",
    "AuthConfig",
    "CacheConfig",
    "Config",
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
    "choose_file",
    "load_config",
    "model_settings",
    "role_settings",
    "settings",
]

_PREFIX: Final = "HEARTHD_"
# Not a key: it names the file.
_FILE_VARIABLE: Final = "HEARTHD_CONFIG"
_MAX_FILE_BYTES: Final = 2**20
# What a path may begin with: secrets that systemd hands over (systemd.exec(5), LoadCredential).
_CREDENTIALS: Final = "$CREDENTIALS_DIRECTORY"
# Fields whose default in a file is not the default of the dataclass, because it depends on the environment.
_AUTO: Final = frozenset(
    {("server", "unix_socket"), ("auth", "usage_file"), ("model", "directory"), ("cache", "directory")}
)
# Sections of sections: `[roles.NAME]`, and `[models.NAME]` beside the keys of [models]. Not from the environment, whose
# names could not be told apart.
_ROLES: Final = "roles"
_MODELS: Final = "models"
_NAMED: Final = (_ROLES, "model_options")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration."""

    model: ModelConfig
    server: ServerConfig = field(default_factory=ServerConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    thermal: ThermalConfig = field(default_factory=ThermalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    models: ModelsConfig = field(default_factory=ModelsConfig)
    roles: Mapping[str, Role] = field(default_factory=lambda: BUILT_IN)
    model_options: Mapping[str, ModelOptions] = field(default_factory=dict)
    """`[models.NAME]`. The default model may have none."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """The models that are served, the default one first."""
        return tuple(dict.fromkeys((self.model.name, *self.model_options)))

    def for_model(self, name: str) -> "Config":
        """Return the configuration as one of the models has it: its name in [model], its options in [engine]."""
        options, engine = self.model_options.get(name, ModelOptions()), self.engine
        context_length = options.context_length or engine.context_length
        own = replace(
            engine,
            slots=options.slots or engine.slots,
            context_length=context_length,
            threads=engine.threads if options.threads is None else options.threads,
            prefill_chunk=min(engine.prefill_chunk, context_length),
        )
        return replace(self, model=replace(self.model, name=name), engine=own)


def choose_file(file: Path | None = None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file that `load_config` reads for the same arguments; None if it reads none."""
    if file is None and environment.get(_FILE_VARIABLE):
        file = Path(environment[_FILE_VARIABLE])
    if file is None:
        usual = paths.configuration_file(environment)
        file = usual if usual.exists() else None
    return file


def load_config(file: Path | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """Read the configuration.

    file: must exist. None: the one that HEARTHD_CONFIG names, which must exist too, else the usual one if it exists.
    Raises ConfigError: one line with the key, the value and what is allowed.
    """
    file = choose_file(file, environment)
    tables = _parse(file) if file else {}
    types = {name: section for name, section in get_type_hints(Config).items() if name not in _NAMED}
    kinds = {name: get_type_hints(section, include_extras=True) for name, section in types.items()}
    _refuse_unknown(tables, [*kinds, _ROLES], str(file), "section")
    _refuse_unknown(
        (name for name in environment if name.startswith(_PREFIX)),
        [_FILE_VARIABLE, *(_variable(section, key) for section, keys in kinds.items() for key in keys)],
        "the environment",
        "variable",
    )
    tables, model_tables = _split_models(tables)
    sections = {}
    for name, section in types.items():
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {name} is {_shown(table)}; it is a section: write [{name}] and its keys below")
        _refuse_unknown(table, kinds[name], f"{file}: [{name}]", "key")
        values = {}
        for key, hint in kinds[name].items():
            kind: Kind = hint.__metadata__[0]
            if (variable := _variable(name, key)) in environment:
                text = environment[variable]
                values[key] = _read(kind, kind.from_text(text), environment, variable, text)
            elif key in table:
                values[key] = _read(kind, table[key], environment, f"{file}: {name}.{key}", table[key])
            elif (name, key) in _AUTO:
                values[key] = _read(kind, "auto", environment, f"{name}.{key}", "auto")
        sections[name] = section(**values)
    config = Config(
        **sections,
        roles=_read_roles(tables.get(_ROLES, {}), environment, str(file)),
        model_options=_read_model_options(model_tables, environment, str(file)),
    )
    _check_together(config)
    return config


def settings(config: Config) -> dict[str, object]:
    """Return every key with its value, `section.key` to value, in the order of the tree."""
    return {
        f"{section.name}.{key.name}": getattr(getattr(config, section.name), key.name)
        for section in fields(config)
        if section.name not in _NAMED
        for key in fields(getattr(config, section.name))
    }


def role_settings(config: Config) -> dict[str, object]:
    """Return what the configuration says of roles beyond the built-in ones, `roles.name.key` to value."""
    return {
        f"{_ROLES}.{name}.{key.name}": getattr(role, key.name)
        for name, role in config.roles.items()
        if role != BUILT_IN.get(name)
        for key in fields(role)
    }


def model_settings(config: Config) -> dict[str, object]:
    """Return what the configuration says of single models, `models.name.key` to value; not what [engine] decides."""
    return {
        f"{_MODELS}.{name}.{key.name}": value
        for name, options in config.model_options.items()
        for key in fields(options)
        if (value := getattr(options, key.name)) is not None
    }


def _read(kind: Kind, value: object, environment: Mapping[str, str], where: str, written: object) -> object:
    if value == "auto" and isinstance(kind, Place) and kind.auto:
        value = os.fspath(kind.auto(environment))
    elif isinstance(value, str) and isinstance(kind, Place) and value.partition("/")[0] == _CREDENTIALS:
        directory = paths.credentials_directory(environment)
        if directory is None:
            raise ConfigError(
                f"{where} is {_shown(written)}, and systemd has passed no credentials; start the daemon as a service "
                "with LoadCredential (other commands: as root, while it runs), or give another path"
            )
        value = os.fspath(directory / value.partition("/")[2])
    try:
        return kind.read(value)
    except ValueError as error:
        raise ConfigError(f"{where} is {_shown(written)}; {error}") from None


def _read_roles(tables: object, environment: Mapping[str, str], file: str) -> Mapping[str, Role]:
    """Return the built-in roles and those of the file, which may set single keys of a built-in one."""
    if not isinstance(tables, dict):
        raise ConfigError(f"{file}: {_ROLES} is {_shown(tables)}; write [{_ROLES}.NAME] and its keys below")
    roles = dict(BUILT_IN)
    for name, table in tables.items():
        where = f"{_ROLES}.{_shown(name)[1:-1]}"
        if not re.fullmatch(ROLE_NAME, name):
            raise ConfigError(f"{file}: {where} cannot be a role's name; give {ROLE_FORM}")
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {where} is {_shown(table)}; write [{where}] and its keys below")
        roles[name] = replace(roles.get(name, Role()), **_read_keys(Role, table, environment, file, where))
    return roles


def _split_models(tables: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Take the tables of single models out of [models]; return the rest, and them."""
    models = tables.get(_MODELS)
    if not isinstance(models, dict):
        return tables, {}
    single = {name: table for name, table in models.items() if isinstance(table, dict)}
    return tables | {_MODELS: {key: value for key, value in models.items() if key not in single}}, single


def _read_model_options(
    tables: Mapping[str, dict[str, Any]], environment: Mapping[str, str], file: str
) -> Mapping[str, ModelOptions]:
    """Return the models that the file names beside the default one, and maybe that one, with their options."""
    options = {}
    for name, table in tables.items():
        where = f"{_MODELS}.{_shown(name)[1:-1]}"
        if not re.fullmatch(MODEL_NAME, name):
            raise ConfigError(f"{file}: {where} cannot be a model's name; give {MODEL_FORM}")
        if any(isinstance(value, dict) for value in table.values()):
            raise ConfigError(f'{file}: {where} has sections; a name with a dot needs quotes: [models."a.b"]')
        options[name] = ModelOptions(**_read_keys(ModelOptions, table, environment, file, where))
    return options


def _read_keys(
    section: type, table: Mapping[str, object], environment: Mapping[str, str], file: str, where: str
) -> dict[str, Any]:
    """Return the values of a section's keys that a table has."""
    kinds = get_type_hints(section, include_extras=True)
    _refuse_unknown(table, kinds, f"{file}: [{where}]", "key")
    return {
        key: _read(kinds[key].__metadata__[0], value, environment, f"{file}: {where}.{key}", value)
        for key, value in table.items()
    }


def _parse(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; name another file with --config") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{file} has more than {_MAX_FILE_BYTES} bytes; it is not a configuration")
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ConfigError(f"{file} is not TOML: {error}") from None


def _variable(section: str, key: str) -> str:
    return f"{_PREFIX}{section}_{key}".upper()


def _refuse_unknown(found: Iterable[str], known: Iterable[str], where: str, noun: str) -> None:
    names = list(known)
    for name in found:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)
            raise ConfigError(f"{where}: there is no {noun} {_shown(name)}; did you mean {nearest[0]}?")


def _shown(value: object) -> str:
    written = repr(value)
    return written if len(written) <= 80 else f"{written[:77]}..."


def _check_together(config: Config) -> None:
    """Raise ConfigError for values that are right alone and wrong together."""
    if config.server.unix_socket is None and config.server.tls_socket is None and not config.server.tcp:
        raise ConfigError("server.unix_socket and server.tcp are both empty; give at least one address to listen on")
    if config.server.tls_socket and config.server.tls_socket == config.server.unix_socket:
        raise ConfigError(
            f"server.tls_socket and server.unix_socket are both {config.server.tls_socket}; one speaks TLS and the "
            "other does not: give two paths"
        )
    if config.tls.directory and (config.tls.certificate or config.tls.key or config.tls.clients):
        raise ConfigError(
            "tls.directory is given beside tls.certificate, tls.key or tls.clients; give the directory alone, which "
            "holds server.crt, server.key and, if callers need certificates, clients.crt; or give the files"
        )
    if config.tls.clients and config.tls.certificate is None:
        raise ConfigError("tls.clients is given without tls.certificate and tls.key; give all three")
    if (config.tls.certificate is None) != (config.tls.key is None):
        missing = "key" if config.tls.key is None else "certificate"
        raise ConfigError(f"tls.{missing} is missing; give both tls.certificate and tls.key, or none")
    if config.auth.unix_needs_token and config.auth.token_file is None:
        raise ConfigError("auth.unix_needs_token is true and auth.token_file is empty; name the file with the tokens")
    for where, role in (("auth.open_role", config.auth.open_role), *_certificate_roles(config.auth)):
        if role not in config.roles:
            raise ConfigError(f"{where} is {role!r}; give one of {', '.join(config.roles)}, or add [roles.{role}]")
    if config.engine.prefill_chunk > config.engine.context_length:
        raise ConfigError(
            f"engine.prefill_chunk is {config.engine.prefill_chunk}; give at most engine.context_length, "
            f"{config.engine.context_length}"
        )


def _certificate_roles(auth: AuthConfig) -> Iterable[tuple[str, str]]:
    return ((f"auth.certificates of {_shown(name)}", role) for name, role in auth.certificates)
