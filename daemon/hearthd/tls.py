"""TLS of the server: a certificate and a key from files, read again when they change.

A renewed certificate is used from the next handshake on. A broken one is told in the journal, and the last good one
stays: a failed renewal must not end the service. Called by `server`; `__main__` checks files with
`read_certificate` and `find_exposure`.
"""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc

from hearthd.errors import ConfigError

__all__ = ["Certificate", "find_exposure", "read_certificate", "server_credentials"]

_logger = logging.getLogger(__name__)

_Signature = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Certificate:
    """What proves the daemon's name."""

    chain: bytes
    """PEM, the daemon's own certificate first."""
    key: bytes
    """PEM."""


def read_certificate(chain_path: Path, key_path: Path) -> Certificate:
    """Read both files and prove that they belong together. Raises ConfigError."""
    for name, path in (("tls.certificate", chain_path), ("tls.key", key_path)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{name}: {path} cannot be read: {error.strerror}") from None
    try:
        # gRPC takes anything and fails at the first handshake; OpenSSL says at once what is wrong.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain_path, key_path, password=_refuse_password)
        return Certificate(chain_path.read_bytes(), key_path.read_bytes())
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = getattr(error, "reason", None) or str(error)
        raise ConfigError(
            f"tls.certificate {chain_path} and tls.key {key_path} are not a PEM certificate and its PEM key: {reason}"
        ) from None


def find_exposure(key_path: Path) -> str | None:
    """Return a line on who else may use the key, None if its owner alone may.

    Not refused, as a token file is: whoever renews the key may have to share it with a group.
    """
    try:
        mode = key_path.stat().st_mode & 0o777
    except OSError:  # `read_certificate` says so, where the key is needed
        return None
    if not mode & 0o077:
        return None
    return f"tls.key: key file {key_path} has mode {mode:04o}; others may read it; run: chmod 600 {key_path}"


def _refuse_password() -> NoReturn:
    raise ValueError("the key has a passphrase; store it without one, readable by the daemon alone")


def server_credentials(chain_path: Path, key_path: Path) -> grpc.ServerCredentials:
    """Return credentials that follow the files. Raises ConfigError if they cannot be used now."""
    source = _CertificateSource(chain_path, key_path)
    return grpc.dynamic_ssl_server_credentials(source.configuration, source.fetch)


class _CertificateSource:
    """Looks at the files at each handshake, on gRPC's threads."""

    def __init__(self, chain_path: Path, key_path: Path) -> None:
        self._chain_path = chain_path
        self._key_path = key_path
        self._seen = self._signature()
        self.configuration = self._read()

    def fetch(self) -> object | None:
        """Return a new configuration, or None to keep the last one."""
        try:
            signature = self._signature()
            if signature == self._seen:
                return None
            self._seen = signature
            configuration = self._read()
        except (ConfigError, OSError) as error:
            _logger.error("the new certificate is not used, the last good one stays: %s", error)
            return None
        _logger.info("certificate %s read again", self._chain_path)
        return configuration

    def _read(self) -> object:
        certificate = read_certificate(self._chain_path, self._key_path)
        return grpc.ssl_server_certificate_configuration([(certificate.key, certificate.chain)])

    def _signature(self) -> _Signature | None:
        try:
            found = (self._chain_path.stat(), self._key_path.stat())
        except OSError:  # in the middle of a renewal, or gone: either way, not the pair that was read
            return None
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in found)
