"""The daemons that this user's devices are paired with: one file each, which holds all that it takes to be let in.

    $XDG_CONFIG_HOME/hearth/daemons/NAME, or ~/.config/hearth/daemons/NAME        JSON, mode 0600

Knows no network and no gRPC. Called by `_settings`, `_pairing`, `_whereabouts` and the commands.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hearth._errors import ConfigurationError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_FILE_BYTES = 1 << 16
_VERSION = 1


@dataclass(frozen=True, slots=True)
class PairedDaemon:
    """A daemon and how to be let in."""

    name: str
    """What this user calls it; the file's name."""
    addresses: tuple[str, ...]
    """host:port, the likeliest first."""
    certificate: str
    """PEM. No other one is accepted."""
    server_name: str
    """A name that stands in the certificate, so that it is accepted whatever the address is today."""
    fingerprint: str
    """SHA-256 of the certificate, base 16."""
    token: str = field(repr=False)
    device: str
    """As what the daemon knows this device."""
    role: str
    own_name: str = ""
    """As it calls itself; empty if an older version stored it."""

    def calls_itself(self, name: str) -> bool:
        """Whether that is the daemon's own name, as far as it is known."""
        return (self.own_name or self.name) == name


class PairedDaemons:
    """Those of one user."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        configured = environ.get("XDG_CONFIG_HOME", "")
        home = environ.get("HOME", "")
        base = Path(configured) if configured.startswith("/") else (Path(home) if home else Path.home()) / ".config"
        self.directory = base / "hearth/daemons"

    def names(self) -> list[str]:
        """The names, sorted. ConfigurationError if the directory cannot be read."""
        try:
            return sorted(name for name in os.listdir(self.directory) if _NAME.fullmatch(name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigurationError(f"{self.directory} cannot be read: {error.strerror}") from error

    def read(self, name: str) -> PairedDaemon:
        """One of them. ConfigurationError if it is not there or its file cannot be used."""
        if not _NAME.fullmatch(name) or name not in (names := self.names()):
            known = ", ".join(self.names()) or "none"
            raise ConfigurationError(f"daemon {name[:80]!r}: this user is not paired with it; paired are: {known}")
        del names
        path = self.directory / name
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
                data = file.read(_MAX_FILE_BYTES)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
        if mode & 0o077:
            raise ConfigurationError(
                f"{path} has mode {mode:04o}, so that others may use its token; run: chmod 600 {path}"
            )
        try:
            return _parse(name, json.loads(data))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigurationError(
                f"{path} is no file of this version of hearth; pair again, or: hearth pair --forget {name}"
            ) from None

    def all(self) -> list[PairedDaemon]:
        """Each of them, by name; ConfigurationError as `read`."""
        return [self.read(name) for name in self.names()]

    def readable(self) -> list[PairedDaemon]:
        """Those whose files can be used."""
        found = []
        for name in self.names():
            with contextlib.suppress(ConfigurationError):
                found.append(self.read(name))
        return found

    def free_name(self, wanted: str, fingerprint: str) -> str:
        """A name for a new one: that of the same daemon if it was paired before, else `wanted` or something like it."""
        taken = self.names()
        for daemon in self.readable():
            if daemon.fingerprint == fingerprint:
                return daemon.name
        base = wanted if _NAME.fullmatch(wanted) else "hearth"
        candidates = (base if number == 1 else f"{base[:58]}-{number}" for number in range(1, len(taken) + 2))
        return next(name for name in candidates if name not in taken)

    def prepare(self) -> None:
        """Make the directory and prove that it can be written. ConfigurationError if not."""
        with self._writing():
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(".probe", b"")
            (self.directory / ".probe").unlink()

    def write(self, daemon: PairedDaemon) -> None:
        """Keep a daemon, durably, in place of the one of that name. ConfigurationError if it cannot be written."""
        fields = {
            "version": _VERSION,
            "addresses": list(daemon.addresses),
            "certificate": daemon.certificate,
            "server_name": daemon.server_name,
            "fingerprint": daemon.fingerprint,
            "token": daemon.token,
            "device": daemon.device,
            "role": daemon.role,
            "own_name": daemon.own_name,
        }
        with self._writing():
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(daemon.name, (json.dumps(fields, indent=1) + "\n").encode())

    def forget(self, name: str) -> None:
        """Remove one. ConfigurationError if there is none of that name."""
        if name not in self.names():
            self.read(name)
        with self._writing():
            (self.directory / name).unlink(missing_ok=True)
            self._sync()

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.directory / f".{name}.new"
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(self.directory / name)
        self._sync()

    def _sync(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigurationError(f"{self.directory} cannot be written: {error.strerror}") from error


def _parse(name: str, fields: Mapping[str, object]) -> PairedDaemon:
    addresses = fields["addresses"]
    texts = {key: fields[key] for key in ("certificate", "server_name", "fingerprint", "token", "device", "role")}
    texts["own_name"] = fields.get("own_name", "")
    if fields["version"] != _VERSION or not isinstance(addresses, list) or not addresses:
        raise ValueError("another version")
    if not all(isinstance(text, str) for text in (*texts.values(), *addresses)):
        raise TypeError("no text")
    return PairedDaemon(name=name, addresses=tuple(addresses), **texts)  # type: ignore[arg-type]
