"""A client's settings: arguments first, then the environment, then defaults; read and checked once.

Knows nothing of gRPC. Called by `Client` and `AsyncClient` when they are made.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from hearth._address import Address, default_address, parse_address
from hearth._certificate import find_fault
from hearth._errors import ConfigurationError
from hearth._paired import PairedDaemon, PairedDaemons
from hearth._values import ClientOptions

# A token is one short line and a CA file a few certificates: whatever is larger is another file, named by mistake.
_MAX_TOKEN_FILE_BYTES = 4096
_MAX_PEM_FILE_BYTES = 1 << 20
# Options, and as HEARTH_... variables of the environment, that a paired daemon has of its own.
_CREDENTIALS = ("token", "token_file", "ca", "cert", "key")
# What RFC 6750 lets stand after `Bearer `.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


@dataclass(frozen=True, slots=True)
class OwnCertificate:
    """A caller's certificate, PEM."""

    chain: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a client needs to know. Times are in seconds."""

    address: Address
    token: str | None = field(repr=False)
    ca: bytes | None = field(repr=False)
    timeout: float = 600.0
    call_timeout: float = 10.0
    ready_timeout: float = 10.0
    max_retries: int = 3
    keepalive: float = 10.0
    server_name: str | None = None
    """The name to look for in the daemon's certificate; None: the host of the address."""
    paired: PairedDaemon | None = None
    """Whose address this is, so that it may be looked for elsewhere."""
    is_default: bool = False
    """Nobody said where the daemon is, so that it may be looked for elsewhere on this machine."""
    own: OwnCertificate | None = field(default=None, repr=False)
    """What says to the daemon who calls, where it asks for a certificate."""


def read_settings(address: str | None, options: ClientOptions, environ: Mapping[str, str]) -> Settings:
    """Combine arguments, environment and defaults. Raises ConfigurationError, TypeError on an unknown option."""
    known = ClientOptions.__annotations__
    if unknown := options.keys() - known.keys():
        raise TypeError(f"unknown option {min(unknown)!r}; there are {', '.join(sorted(known))}")
    paired = _choose_paired(address, options, environ)
    if paired is not None:
        where = parse_address(paired.addresses[0])
        ca: bytes | None = paired.certificate.encode()
        token: str | None = paired.token
        own = None
    else:
        where = parse_address(default_address(environ) if address is None else address)
        ca = _read_ca(where, options, environ)
        token = _read_token(options, environ)
        own = _read_own(where, ca, options, environ)
    if token and not (where.is_loopback or ca or options.get("allow_plaintext_token")):
        raise ConfigurationError(
            f"address {where.text!r}: the token would cross the network unencrypted; name the file that the daemon's "
            "certificate is checked against (ca, --ca or HEARTH_CA), or allow it by name (allow_plaintext_token, "
            "--allow-plaintext-token)"
        )
    check_seconds("timeout", options.get("timeout", 1.0))
    check_seconds("call_timeout", options.get("call_timeout", 1.0))
    if not 0 < options.get("keepalive", 1.0) <= 3600:
        raise ConfigurationError(f"keepalive is {options.get('keepalive')}; it is a number of seconds over 0, to 3600")
    if not 0 <= options.get("ready_timeout", 0) < math.inf:
        raise ConfigurationError(f"ready_timeout is {options.get('ready_timeout')}; it is 0 or a number of seconds")
    if not 0 <= options.get("max_retries", 0) <= 100:
        raise ConfigurationError(f"max_retries is {options.get('max_retries')}; it is from 0 to 100")
    numbers = {
        name: options[name]
        for name in ("timeout", "call_timeout", "ready_timeout", "max_retries", "keepalive")
        if name in options
    }
    return Settings(
        address=where,
        token=token,
        ca=ca,
        server_name=paired.server_name if paired else None,
        paired=paired,
        is_default=paired is None and address is None and not _names_a_place(options, environ),
        own=own,
        **cast(dict[str, int], numbers),
    )


def check_seconds(name: str, seconds: float) -> float:
    """Return `seconds`; ConfigurationError unless it is over 0, math.inf included."""
    if not seconds > 0:
        raise ConfigurationError(f"{name} is {seconds}; it is a number of seconds over 0 (math.inf: no limit)")
    return seconds


def _choose_paired(address: str | None, options: ClientOptions, environ: Mapping[str, str]) -> PairedDaemon | None:
    """The paired daemon to use: the one that is named, else the only one; None if something else says where to go."""
    name = options.get("daemon")
    own = [option for option in _CREDENTIALS if options.get(option) is not None]
    if name is not None:
        if address is not None or own:
            raise ConfigurationError(
                f"daemon {name[:80]!r} is given beside {own[0] if own else 'an address'}; a paired daemon has its own"
            )
        return PairedDaemons(environ).read(name)
    if address is not None or environ.get("HEARTH_ADDRESS"):
        return None
    if name := environ.get("HEARTH_DAEMON"):
        return PairedDaemons(environ).read(name)
    # Whoever brings credentials means a daemon that was not paired.
    if own or any(environ.get(f"HEARTH_{option.upper()}") for option in _CREDENTIALS):
        return None
    daemons = PairedDaemons(environ)
    names = daemons.names()
    if len(names) > 1:
        raise ConfigurationError(
            f"this user is paired with several daemons: {', '.join(names)}; name one (--daemon, HEARTH_DAEMON or "
            "daemon=), or an address; one that is no more: hearth pair --forget NAME"
        )
    return daemons.read(names[0]) if names else None


def _names_a_place(options: ClientOptions, environ: Mapping[str, str]) -> bool:
    """Whether something beside the argument says where the daemon is: an address, or TLS, which no socket has."""
    tls = ("ca", "cert", "key")
    named = [options.get(name) for name in tls] + [environ.get(f"HEARTH_{name.upper()}") for name in (*tls, "address")]
    return any(named)


def _read_ca(address: Address, options: ClientOptions, environ: Mapping[str, str]) -> bytes | None:
    path = options.get("ca")
    if path is not None and address.is_unix:
        raise ConfigurationError(f"address {address.text!r}: a Unix socket has no TLS; leave ca out")
    if path is None:
        path = environ.get("HEARTH_CA")
    if not path or address.is_unix:
        return None
    pem = _read_file("CA file", path, _MAX_PEM_FILE_BYTES)
    # gRPC would take anything, and say at the first call only that no connection came about.
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise ConfigurationError(f"CA file {os.fspath(path)!r} holds no certificate in PEM form")
    return pem


def _read_own(
    address: Address, ca: bytes | None, options: ClientOptions, environ: Mapping[str, str]
) -> OwnCertificate | None:
    certificate, key = options.get("cert"), options.get("key")
    if address.is_unix:
        if certificate or key:
            name = "cert" if certificate else "key"
            raise ConfigurationError(f"address {address.text!r}: a Unix socket has no TLS; leave {name} out")
        return None
    certificate, key = certificate or environ.get("HEARTH_CERT"), key or environ.get("HEARTH_KEY")
    if not (certificate or key):
        return None
    if not (certificate and key):
        raise ConfigurationError(
            f"{'cert' if certificate else 'key'} is given alone: a caller's certificate and its key go together (cert "
            "and key, --cert and --key, or HEARTH_CERT and HEARTH_KEY)"
        )
    if ca is None:
        raise ConfigurationError(
            f"cert {os.fspath(certificate)!r} is shown over TLS alone; name the file that the daemon's certificate is "
            "checked against (ca, --ca or HEARTH_CA)"
        )
    own = OwnCertificate(
        _read_file("cert file", certificate, _MAX_PEM_FILE_BYTES), _read_file("key file", key, _MAX_PEM_FILE_BYTES)
    )
    # gRPC would take anything, as above.
    if fault := find_fault(Path(certificate), Path(key)):
        raise ConfigurationError(f"cert {os.fspath(certificate)!r} and key {os.fspath(key)!r} cannot be used: {fault}")
    return own


def _read_token(options: ClientOptions, environ: Mapping[str, str]) -> str | None:
    token, path, origin = options.get("token"), options.get("token_file"), "token"
    if token is not None and path is not None:
        raise ConfigurationError("both token and token_file are given; give one")
    if token is None and path is None:
        token, path = environ.get("HEARTH_TOKEN") or None, environ.get("HEARTH_TOKEN_FILE") or None
        origin = "HEARTH_TOKEN"
        if token is not None and path is not None:
            raise ConfigurationError("both HEARTH_TOKEN and HEARTH_TOKEN_FILE are set; set one")
    if path is not None:
        origin = f"token file {os.fspath(path)!r}"
        token = _read_file("token file", path, _MAX_TOKEN_FILE_BYTES).decode("ascii", "replace").strip()
    # Says nothing of the value: the message may reach a log.
    if token is not None and not _TOKEN.fullmatch(token):
        raise ConfigurationError(f"{origin}: a token is one line of letters, digits and ._~+/-, and not empty")
    return token


def _read_file(what: str, path: str | os.PathLike[str], max_bytes: int) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigurationError(f"{what} {os.fspath(path)!r} cannot be read: {reason}") from error
    if len(data) > max_bytes:
        raise ConfigurationError(f"{what} {os.fspath(path)!r} has over {max_bytes} bytes; it is not a {what}")
    return data
