"""A daemon's certificate over the network: which one is shown at an address, and what name stands in it.

A handshake only; nothing is sent. And whether a caller's own certificate and key are a pair. Knows no gRPC. Called by
`_pairing`, `_whereabouts` and `_settings`.
"""

import hashlib
import socket
import ssl
from pathlib import Path
from typing import NoReturn

from hearth._errors import ConnectError


def split_address(address: str) -> tuple[str, int]:
    """host:port or [IPv6]:port as the two."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def fetch_certificate(address: str, timeout: float) -> bytes:
    """The certificate (DER) that is shown at `address`, whoever that is. ConnectError if none is."""
    context = _context()
    context.verify_mode = ssl.CERT_NONE
    with _handshake(address, context, timeout) as connection:
        return connection.getpeercert(binary_form=True) or b""


def read_name(address: str, certificate: bytes, timeout: float) -> str:
    """A name that stands in `certificate`, which must be the one shown at `address`. ConnectError if it is not."""
    context = _context()
    # A certificate that somebody else signed can be trusted by itself, too.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=certificate)
    with _handshake(address, context, timeout) as connection:
        decoded = connection.getpeercert() or {}
    names = [
        str(entry[1])
        for wanted in ("DNS", "IP Address")
        for entry in decoded.get("subjectAltName", ())
        if entry[0] == wanted and "*" not in entry[1]
    ]
    if not names:
        raise ConnectError(
            f"cannot use {address}: its certificate has no subjectAltName, without which TLS accepts none",
            is_transient=False,
        )
    return names[0]


def find_fault(certificate: Path, key: Path) -> str | None:
    """Why the two files (PEM) do not belong together, for a person; None if they do."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password=_refuse_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key is that of another certificate"
        return "they are not a certificate and its key in PEM form"
    except ValueError as error:
        return str(error)
    return None


def _refuse_passphrase() -> NoReturn:
    raise ValueError("the key has a passphrase; store it without one, readable by you alone")


def fingerprint(certificate: bytes) -> str:
    """SHA-256, base 16."""
    return hashlib.sha256(certificate).hexdigest()


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The certificate itself is compared, or pinned.
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    return context


def _handshake(address: str, context: ssl.SSLContext, timeout: float) -> ssl.SSLSocket:
    try:
        connection = socket.create_connection(split_address(address), timeout=timeout)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConnectError(f"cannot reach {address}: {reason}") from error
    try:
        return context.wrap_socket(connection)
    except ssl.SSLCertVerificationError as error:
        connection.close()
        raise ConnectError(
            f"cannot use {address}: its certificate is not accepted ({error.verify_message}); are the clocks of both "
            "machines right?",
            is_transient=False,
        ) from error
    except OSError as error:
        connection.close()
        raise ConnectError(f"cannot reach {address}: it does not speak TLS ({error.strerror or error})") from error
