"""The certificate that a caller has shown in the TLS handshake, as gRPC tells of it afterwards.

gRPC has verified it then, and never looks at it again: a connection may outlive it, so its end is judged at each call.
Knows no role. Called by `auth`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Final

__all__ = ["find_names", "has_expired"]

_MAX_REMEMBERED: Final = 256


def find_names(peer: Mapping[str, Sequence[bytes]]) -> list[str]:
    """Return the names of the certificate's holder; none, if the caller has shown no certificate.

    peer: the call's `auth_context()`. RFC 6125, 6.4.4: the common name counts only where there is no subject
    alternative name.
    """
    names = peer.get("x509_subject_alternative_name") or peer.get("x509_common_name") or ()
    return [name.decode("utf-8", "replace") for name in names]


def has_expired(peer: Mapping[str, Sequence[bytes]], now: float) -> bool:
    """Whether the certificate is not valid any more. now: seconds since 1970."""
    return any(now >= _ends(pem) for pem in peer.get("x509_pem_cert", ()))


@functools.lru_cache(_MAX_REMEMBERED)
def _ends(pem: bytes) -> float:
    # At the first caller with a certificate: most daemons have none, and this import takes its time on a board.
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
