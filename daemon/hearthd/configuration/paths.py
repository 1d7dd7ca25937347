"""Where the daemon keeps its files: state, models, tokens, run-time socket, configuration.

Pure functions of an environment; nothing is created, opened or read here. Knows no configuration file: `config` and
`build` start from these defaults. systemd's own variables come first, so that the unit alone decides where a service
writes; then the system's places for root, then the XDG places of an ordinary user.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = [
    "UNIT",
    "cache_directory",
    "configuration_file",
    "credentials_directory",
    "is_credential",
    "model_directory",
    "prefix_directory",
    "runtime_directory",
    "service_environment",
    "state_directory",
    "tls_directory",
    "token_file",
    "unix_socket",
    "usage_file",
]


UNIT: Final = "hearthd.service"
"""The service, where a command is not told another one."""
# systemd.exec(5): below it a directory for each unit, which nobody but root and the service may look into.
_CREDENTIALS: Final = Path("/run/credentials")


def _absolute(environment: Mapping[str, str], name: str) -> Path | None:
    """Return the first absolute path in a variable, or None.

    systemd joins several directories with colons; the XDG specification says that relative paths are to be ignored.
    """
    first = environment.get(name, "").split(":")[0]
    return Path(first) if first.startswith("/") else None


def _home(environment: Mapping[str, str]) -> Path:
    return _absolute(environment, "HOME") or Path.home()


def state_directory(environment: Mapping[str, str] = os.environ, *, is_root: bool | None = None) -> Path:
    """Return the directory for what must survive a restart: models, tokens.

    `is_root` is for tests; None asks the operating system.
    """
    if found := _absolute(environment, "STATE_DIRECTORY"):
        return found
    if os.geteuid() == 0 if is_root is None else is_root:
        # Where the unit's StateDirectory=hearth is too, so that `sudo hearthd model add` feeds the service.
        return Path("/var/lib/hearth")
    return (_absolute(environment, "XDG_DATA_HOME") or _home(environment) / ".local/share") / "hearth"


def model_directory(environment: Mapping[str, str] = os.environ, *, is_root: bool | None = None) -> Path:
    """Return the directory that holds one directory for each installed model."""
    return state_directory(environment, is_root=is_root) / "models"


def cache_directory(environment: Mapping[str, str] = os.environ, *, is_root: bool | None = None) -> Path:
    """Return the directory for what can be fetched or computed again: checkpoints, prefixes."""
    if found := _absolute(environment, "CACHE_DIRECTORY"):
        return found
    if found := _absolute(environment, "STATE_DIRECTORY"):
        # A service that was given a state directory only can write nowhere else.
        return found / "cache"
    if os.geteuid() == 0 if is_root is None else is_root:
        return Path("/var/cache/hearth")
    return (_absolute(environment, "XDG_CACHE_HOME") or _home(environment) / ".cache") / "hearth"


def prefix_directory(environment: Mapping[str, str] = os.environ, *, is_root: bool | None = None) -> Path:
    """Return where the daemon keeps prompts' beginnings over restarts: they can be computed again."""
    return cache_directory(environment, is_root=is_root) / "prefixes"


def tls_directory(environment: Mapping[str, str] = os.environ, *, is_root: bool | None = None) -> Path:
    """Return where the daemon's certificate and key are, and where `hearthd pair` makes them."""
    return state_directory(environment, is_root=is_root) / "tls"


def token_file(environment: Mapping[str, str] = os.environ, *, is_root: bool | None = None) -> Path:
    """Return where `hearthd token` writes if the configuration names no file."""
    return state_directory(environment, is_root=is_root) / "tokens"


def usage_file(environment: Mapping[str, str] = os.environ, *, is_root: bool | None = None) -> Path:
    """Return where the daemon keeps what callers have used of their daily quotas."""
    return state_directory(environment, is_root=is_root) / "usage.json"


def runtime_directory(environment: Mapping[str, str] = os.environ, *, is_root: bool | None = None) -> Path:
    """Return the directory for the socket and its lock.

    Never below /tmp: anybody could create the name first, and be taken for the daemon.
    """
    if found := _absolute(environment, "RUNTIME_DIRECTORY"):
        return found
    if os.geteuid() == 0 if is_root is None else is_root:
        return Path("/run/hearth")
    if found := _absolute(environment, "XDG_RUNTIME_DIR"):
        return found / "hearth"
    return state_directory(environment, is_root=is_root) / "run"


def unix_socket(environment: Mapping[str, str] = os.environ, *, is_root: bool | None = None) -> Path:
    """Return the default Unix socket."""
    return runtime_directory(environment, is_root=is_root) / "hearthd.sock"


def configuration_file(environment: Mapping[str, str] = os.environ, *, is_root: bool | None = None) -> Path:
    """Return the file that is read if none is named, which need not exist."""
    if found := _absolute(environment, "CONFIGURATION_DIRECTORY"):
        return found / "hearthd.toml"
    if os.geteuid() == 0 if is_root is None else is_root:
        return Path("/etc/hearth/hearthd.toml")
    return (_absolute(environment, "XDG_CONFIG_HOME") or _home(environment) / ".config") / "hearth/hearthd.toml"


def credentials_directory(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the directory of the secrets that systemd hands to the service; None outside of one, or without any."""
    return _absolute(environment, "CREDENTIALS_DIRECTORY")


def service_environment(
    environment: Mapping[str, str] = os.environ, *, unit: str = UNIT, credentials: Path = _CREDENTIALS
) -> dict[str, str]:
    """Return an environment with the secrets of the running service, so that its configuration can be read in a shell.

    As far as they may be looked at: root may. credentials: is for tests.
    """
    directory = credentials / unit
    found = {"CREDENTIALS_DIRECTORY": str(directory)} if os.access(directory, os.R_OK | os.X_OK) else {}
    return found | dict(environment)


def is_credential(path: Path, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether systemd has put the file there.

    It alone decides who may read it: an access list for the service's user shows as permission bits of a group.
    """
    directory = credentials_directory(environment)
    return _CREDENTIALS in path.parents or (directory is not None and directory in path.parents)
