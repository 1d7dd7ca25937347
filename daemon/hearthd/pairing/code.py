"""The code that a person carries from the board to a device: where the daemon is, which certificate it has, a secret.

    hearth://raspberrypi.local+192.168.1.7:50051/7Q2MXA-...        8 groups of 6

The last part is 30 bytes in Crockford's base32, which has no letters that look like digits: the first 16 bytes of the
certificate's SHA-256, 12 bytes of secret, and the first 2 bytes of a SHA-256 over all before, so that a slip of the
fingers is told before anything is sent. 16 bytes are enough for the fingerprint: whoever wants to pass for the board
needs a certificate with the same 128 bits, and cannot choose both. No character is special to a shell; case does not
matter, so that a QR code can hold it in its compact alphanumeric form.

`hearth._pairing_code` reads it; a test compares the two. Pure functions; called by `pairing.cli`.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

__all__ = ["make_code"]

FINGERPRINT_BYTES: Final = 16
_CHECK_BYTES: Final = 2
_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_GROUP: Final = 6


def make_code(hosts: Sequence[str], port: int, fingerprint: bytes, secret: bytes) -> str:
    """Return the code. hosts: names or IPv4 addresses, the likeliest to be reached first."""
    where = f"{'+'.join(hosts)}:{port}".lower()
    body = fingerprint[:FINGERPRINT_BYTES] + secret
    body += hashlib.sha256(where.encode("ascii") + b"/" + body).digest()[:_CHECK_BYTES]
    bits, count = int.from_bytes(body, "big"), len(body) * 8 // 5
    letters = "".join(_ALPHABET[bits >> 5 * place & 31] for place in reversed(range(count)))
    groups = "-".join(letters[start : start + _GROUP] for start in range(0, count, _GROUP))
    return f"hearth://{where}/{groups}"
