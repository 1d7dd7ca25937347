"""Read the code that `hearthd pair` prints: where the daemon is, which certificate it shows, a one-time secret.

    hearth://raspberrypi.local+192.168.1.7:50051/7Q2MXA-...        8 groups of 6

`hearthd.pairing.code` says what the last part is made of, and why. Case does not matter, nor do hyphens and spaces in
the last part; the letters that look like digits are read as those. Knows no network. Called by `_pairing`.
"""

import hashlib
import ipaddress
import re
from dataclasses import dataclass, field

from hearth._errors import ConfigurationError

_SCHEME = "hearth://"
_FINGERPRINT_BYTES, _SECRET_BYTES, _CHECK_BYTES = 16, 12, 2
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LOOK_ALIKE = str.maketrans("OIL", "011")
_MAX_HOSTS = 8
_MAX_CHARACTERS = 1024
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_REMEDY = "copy the whole line that `hearthd pair` printed"


@dataclass(frozen=True, slots=True)
class PairingCode:
    """What a code says."""

    hosts: tuple[str, ...]
    port: int
    fingerprint: bytes
    """The beginning of the certificate's SHA-256."""
    secret: bytes = field(repr=False)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Each host with the port."""
        return tuple(f"{host}:{self.port}" for host in self.hosts)

    def is_of(self, certificate: bytes) -> bool:
        """Whether a certificate (DER) is the one that the code means."""
        return hashlib.sha256(certificate).digest().startswith(self.fingerprint)


def parse_code(text: str) -> PairingCode:
    """Read a code. Raises ConfigurationError, which does not quote it: it holds a secret."""
    # A terminal may have broken the line.
    text = "".join(text.split())
    if len(text) > _MAX_CHARACTERS or not text.isascii() or not text.lower().startswith(_SCHEME):
        raise ConfigurationError(f"this is no pairing code, which begins with {_SCHEME}; {_REMEDY}")
    where, _, written = text[len(_SCHEME) :].lower().partition("/")
    body = _decode(written)
    hosts_text, _, port = where.rpartition(":")
    if body[-_CHECK_BYTES:] != hashlib.sha256(f"{where}/".encode() + body[:-_CHECK_BYTES]).digest()[:_CHECK_BYTES]:
        raise ConfigurationError(f"the pairing code has a wrong character somewhere; {_REMEDY}")
    hosts = tuple(hosts_text.split("+"))
    if not (port.isascii() and port.isdigit() and len(port) < 6 and 1 <= int(port) <= 65535):
        raise ConfigurationError(f"the pairing code names no port; {_REMEDY}")
    if len(hosts) > _MAX_HOSTS or not all(_is_host(host) for host in hosts):
        raise ConfigurationError(f"the pairing code names no host that can be reached; {_REMEDY}")
    secret_at = _FINGERPRINT_BYTES + _SECRET_BYTES
    return PairingCode(hosts, int(port), body[:_FINGERPRINT_BYTES], body[_FINGERPRINT_BYTES:secret_at])


def _decode(written: str) -> bytes:
    letters = written.upper().replace("-", "").translate(_LOOK_ALIKE)
    num_bytes = _FINGERPRINT_BYTES + _SECRET_BYTES + _CHECK_BYTES
    if len(letters) != num_bytes * 8 // 5:
        raise ConfigurationError(
            f"the pairing code ends in {len(letters)} letters and digits, not {num_bytes * 8 // 5}; {_REMEDY}"
        )
    bits = 0
    for letter in letters:
        if letter not in _ALPHABET:
            raise ConfigurationError(f"the pairing code has a character that none has; {_REMEDY}")
        bits = bits << 5 | _ALPHABET.index(letter)
    return bits.to_bytes(num_bytes, "big")


def _is_host(host: str) -> bool:
    if not _HOST.fullmatch(host) or ".." in host:
        return False
    if all(part.isdigit() for part in host.split(".")):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            return False
    return True
