"""A certificate of the daemon's own, which nobody signed: devices know it by its fingerprint, from the pairing code.

Devices check that it is this very certificate, so what it says matters little; it names the host all the same, so that
`--ca server.crt` works for programs that check names. Called by `pairing.cli`.
"""

import datetime
import ipaddress
import os
import socket
from pathlib import Path
from typing import Final

from hearthd.durable_file import replace_file
from hearthd.errors import ConfigError
from hearthd.listening.tls import CERTIFICATE_NAME, KEY_NAME

__all__ = ["FIXED_NAME", "make_certificate"]

FIXED_NAME: Final = "hearthd"
"""A name that depends on no address and no host name, for clients that have pinned the certificate."""
_YEARS: Final = 10
# Boards without a battery may believe that it is 1970: the certificate must be good today even so.
_NOT_BEFORE: Final = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_WRITTEN: Final = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)


def make_certificate(directory: Path) -> bool:
    """Write server.key and server.crt, unless there is a server.crt. Return whether they were made.

    Raises ConfigError if the directory cannot be written.
    """
    if os.path.lexists(directory / CERTIFICATE_NAME):
        return False
    try:
        _make_directory(directory)
        key, certificate = _make(socket.gethostname().partition(".")[0])
        # The certificate last: where there is one, there is its key.
        replace_file(directory / KEY_NAME, key)
        replace_file(directory / CERTIFICATE_NAME, certificate, mode=0o644)
    except OSError as error:
        raise ConfigError(
            f"tls.directory {directory} cannot be written: {error.strerror}; run this as root, or as the daemon's user"
        ) from None
    return True


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        # Root must not be led to write elsewhere by whoever owns the directory above.
        if directory.is_symlink():
            raise ConfigError(f"tls.directory {directory} is a link and has no {CERTIFICATE_NAME}; remove it") from None
        return
    if os.geteuid() == 0:
        owner = directory.parent.stat()
        os.chown(directory, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _make(host: str) -> tuple[bytes, bytes]:
    """Return key and certificate, PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"Hearth on {host}"[:64])])
    names: list[x509.GeneralName] = [
        x509.DNSName(each) for each in dict.fromkeys((FIXED_NAME, f"{host}.local", host, "localhost"))
    ]
    names += [x509.IPAddress(ipaddress.ip_address(each)) for each in ("127.0.0.1", "::1")]
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    ends = max(datetime.datetime.now(datetime.UTC), _WRITTEN) + datetime.timedelta(days=365 * _YEARS + _YEARS // 4)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(pem)
