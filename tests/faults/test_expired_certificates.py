"""A certificate whose time is over: callers on the network hear so in plain words, those on the machine are served."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from fake_daemon import FakeDaemon

import hearth
from tls_files import TlsFiles, make_tls_files, renew_certificate


def date(files: TlsFiles, first_day: int, last_day: int) -> None:
    """Sign the daemon's own certificate anew, for a time that is told in days from now."""
    authority = x509.load_pem_x509_certificate(files.ca.read_bytes())
    key = serialization.load_pem_private_key(files.ca.with_name("ca.key").read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    current = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(current.subject)
        .issuer_name(authority.subject)
        .public_key(current.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=first_day))
        .not_valid_after(now + datetime.timedelta(days=last_day))
    )
    names = current.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    expired = builder.add_extension(names.value, critical=False).sign(key, hashes.SHA256())
    new = files.certificate.with_suffix(".new")
    new.write_bytes(expired.public_bytes(serialization.Encoding.PEM))
    new.replace(files.certificate)


@pytest.mark.parametrize(("days", "said"), [((-2, -1), "has expired"), ((1, 2), "is not valid yet")])
def test_a_certificate_out_of_its_time_is_said_and_a_renewed_one_lets_callers_in_again(
    days: tuple[int, int], said: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    files = make_tls_files(tmp_path)
    with FakeDaemon(tmp_path, tls={"certificate": files.certificate, "key": files.key}) as daemon:
        with daemon.client(daemon.tcp, ca=files.ca) as early:
            expected = early.chat("hello", temperature=0, max_tokens=4).text
            date(files, *days)
            with daemon.client(daemon.tcp, ca=files.ca, ready_timeout=5) as late:
                with pytest.raises(hearth.ConnectError, match=f"its certificate {said}; .*clock") as caught:
                    late.chat("hello")
                assert not caught.value.is_transient
            # Whoever is inside stays inside, and so does the machine itself.
            assert early.chat("hello", temperature=0, max_tokens=4).text == expected
            with daemon.client() as beside:
                assert beside.chat("hello", temperature=0, max_tokens=4).text == expected
        renew_certificate(files)
        with daemon.client(daemon.tcp, ca=files.ca) as again:
            assert again.chat("hello", temperature=0, max_tokens=4).text == expected
    figure(f"a new caller hears: {str(caught.value).partition(': ')[2]}")
