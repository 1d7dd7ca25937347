"""TLS of the server: certificate and key from files, followed when they change without a restart.

A renewed certificate is used from the next handshake on; connections that are open keep theirs. A broken one, and a
certificate without its key, which a renewal leaves for a moment, is told in the journal and in the status, and the last
good one stays: a failed renewal must not end the service.

With an authority for the callers' certificates, each caller must show one that it signed (mutual TLS). gRPC for Python
can either require that or not ask at all [M: grpcio 1.85.1 sends no CertificateRequest unless it requires one], so
there is no "optional". Who a certificate belongs to is `auth`'s affair.

Called by `life.parts`; `check_config` and `pairing` check and read files with `find_files` and `read_certificate`.
"""

import hashlib
import logging
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import grpc

from hearthd.configuration.config import TlsConfig
from hearthd.configuration.paths import is_credential
from hearthd.errors import ConfigError

__all__ = ["Certificate", "CertificateSource", "TlsFiles", "find_exposure", "find_files", "read_certificate"]

_logger = logging.getLogger(__name__)

CERTIFICATE_NAME: Final = "server.crt"
KEY_NAME: Final = "server.key"
CLIENTS_NAME: Final = "clients.crt"
_MAX_FILE_BYTES: Final = 2**20

# What every caller of the status may read of it.
_BROKEN: Final = "the renewed TLS certificate is not used, the last good one is; the journal says why"

_Signature = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where certificate and key are, PEM."""

    certificate: Path
    key: Path
    clients: Path | None = None
    """Authority of the callers' certificates; None: callers show none."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What proves the daemon's name, and what callers' proofs are checked against. PEM."""

    chain: bytes
    """The daemon's own certificate first."""
    key: bytes
    clients: bytes | None = None

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the daemon's own certificate."""
        end = b"-----END CERTIFICATE-----"
        own = self.chain[: self.chain.index(end) + len(end)]
        der = ssl.PEM_cert_to_DER_cert(own[own.index(b"-----BEGIN CERTIFICATE-----") :].decode("ascii"))
        return hashlib.sha256(der).digest()


class _UnreadableError(ConfigError):
    """It is the disk, or who may read the file; what stands in it is another question."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said
        """The same without a path."""


def find_files(tls: TlsConfig) -> TlsFiles | None:
    """Return the files of a configuration; None where it has no TLS."""
    if tls.directory:
        clients = tls.directory / CLIENTS_NAME
        return TlsFiles(
            tls.directory / CERTIFICATE_NAME,
            tls.directory / KEY_NAME,
            # Not `exists`, which is false too for what may not be looked at: that must not let everybody in.
            clients if os.path.lexists(clients) else None,
        )
    if tls.certificate and tls.key:
        return TlsFiles(tls.certificate, tls.key, tls.clients)
    return None


def read_certificate(files: TlsFiles) -> Certificate:
    """Read the files and prove that they belong together. Raises ConfigError."""
    chain = _read("tls.certificate", files.certificate)
    key = _read("tls.key", files.key)
    clients = _read("tls.clients", files.clients) if files.clients else None
    try:
        # gRPC takes anything and fails at the first handshake; OpenSSL says at once what is wrong. It gets the bytes
        # that were read, and not the files, which may be others by now.
        with _in_memory(chain) as chain_path, _in_memory(key) as key_path:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain_path, key_path, password=_refuse_password)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ConfigError(
            f"tls.certificate {files.certificate} and tls.key {files.key} are not a PEM certificate and its PEM key: "
            f"{_fault(error, chain)}"
        ) from None
    if clients is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=clients.decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise ConfigError(f"tls.clients {files.clients} holds no certificate of an authority in PEM form") from None
    return Certificate(chain, key, clients)


def find_exposure(key_path: Path) -> str | None:
    """Return a line on who else may use the key, None if its owner alone may.

    Not refused, as a token file is: whoever renews the key may have to share it with a group.
    """
    try:
        mode = key_path.stat().st_mode & 0o777
    except OSError:  # `read_certificate` says so, where the key is needed
        return None
    if not mode & 0o077 or is_credential(key_path):
        return None
    return f"tls.key: key file {key_path} has mode {mode:04o}; others may read it; run: chmod 600 {key_path}"


class CertificateSource:
    """Follows the files: looks at them at each handshake, on gRPC's threads, and when `refresh` is called."""

    def __init__(self, files: TlsFiles) -> None:
        """Read the files. Raises ConfigError if they cannot be used now."""
        self._files = files
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._certificate = read_certificate(files)
        self._configuration = _configuration(self._certificate)
        self._problem: str | None = None
        self._said: str | None = None

    def find_problem(self) -> str | None:
        """Look at the files, and return `problem` as a line that names no path, with what helps."""
        self.refresh()
        return self._said

    @property
    def problem(self) -> str | None:
        """What is wrong with the files as they are now, so that an older certificate is in use; None if nothing is."""
        return self._problem

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate that is in use."""
        return self._certificate.fingerprint

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials of one listener that follow the files."""
        given = self._configuration

        def fetch() -> object | None:
            nonlocal given
            self.refresh()
            if self._configuration is given:
                return None
            given = self._configuration
            return given

        return grpc.dynamic_ssl_server_credentials(given, fetch, self._files.clients is not None)

    def refresh(self) -> None:
        """Read the files again if they changed. What cannot be used is told, and changes nothing."""
        with self._lock:
            signature = self._signature()
            if signature == self._seen:
                return
            # Before they are read: what changes while they are is seen the next time.
            self._seen = signature
            try:
                self._certificate = read_certificate(self._files)
            except ConfigError as error:
                self._said = _BROKEN
                if isinstance(error, _UnreadableError):
                    # The disk may be well again with the same files on it: they are looked at again the next time.
                    self._seen = None
                    self._said = (
                        f"{error.said}, the last good TLS certificate stays; put it right, `hearthd doctor` helps"
                    )
                problem = f"the new certificate is not used, the last good one stays: {error}"
                if problem != self._problem:
                    _logger.error("%s", problem)
                self._problem = problem
                return
            self._configuration = _configuration(self._certificate)
            self._problem = self._said = None
        _logger.info("certificate %s read again", self._files.certificate)

    def _signature(self) -> _Signature | None:
        paths = [self._files.certificate, self._files.key]
        paths += [self._files.clients] if self._files.clients else []
        try:
            found = [path.stat() for path in paths]
        except OSError:  # in the middle of a renewal, or gone: either way, not what was read
            return None
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in found)


def _configuration(certificate: Certificate) -> object:
    return grpc.ssl_server_certificate_configuration([(certificate.key, certificate.chain)], certificate.clients)


def _fault(error: OSError | ValueError, chain: bytes) -> str:
    """Say in words what OpenSSL says by a number, or not at all: which of the two files it is."""
    if not isinstance(error, ssl.SSLError):
        return str(error)
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key is that of another certificate"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=chain.decode("ascii"))
    except (ssl.SSLError, ValueError):
        return "the first holds no certificate"
    return "the second holds no key"


def _read(name: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        said = f"{name} cannot be read ({error.strerror})"
        raise _UnreadableError(f"{name}: {path} cannot be read: {error.strerror}{_remedy(path)}", said) from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{name}: {path} has over {_MAX_FILE_BYTES} bytes; it is no certificate and no key")
    return data


def _remedy(path: Path) -> str:
    remedy = "; `hearthd pair NAME` makes one, with --address HOST:PORT where only this machine can call"
    return remedy if path.name == CERTIFICATE_NAME and not os.path.lexists(path) else ""


def _refuse_password() -> NoReturn:
    raise ValueError("the key has a passphrase; store it without one, readable by the daemon alone")


@contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """Give a path under which this process, and no other user, reads the data: OpenSSL takes nothing else."""
    descriptor = os.memfd_create("hearthd", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
