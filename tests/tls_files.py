"""Certificates for tests, made by the openssl program: an authority, and a daemon's certificate signed by it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TlsFiles:
    ca: Path
    certificate: Path
    key: Path


def make_tls_files(directory: Path, names: str = "IP:127.0.0.1,DNS:localhost") -> TlsFiles:
    """Write an authority and a certificate for `names`, in openssl's notation, into `directory`."""
    files = TlsFiles(directory / "ca.pem", directory / "daemon.pem", directory / "daemon.key")
    new_key = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    ca_key = str(directory / "ca.key")
    _openssl(*new_key, "-subj", "/CN=test authority", "-keyout", ca_key, "-out", str(files.ca))
    _openssl(
        *new_key, "-subj", "/CN=daemon", "-addext", f"subjectAltName={names}",
        "-CA", str(files.ca), "-CAkey", ca_key, "-keyout", str(files.key), "-out", str(files.certificate),
    )  # fmt: skip
    return files


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def renew_certificate(files: TlsFiles, names: str = "IP:127.0.0.1,DNS:localhost", *, days: int = 2) -> None:
    """Put another certificate of the same authority, with another key, in place of the daemon's: first the key.

    As a renewal does it: each file whole, but two renames, between which key and certificate are no pair.
    """
    directory, ca_key = files.ca.parent, str(files.ca.with_name("ca.key"))
    new_key, new_certificate = directory / "renewed.key", directory / "renewed.pem"
    _openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", str(days),
        "-subj", "/CN=daemon", "-addext", f"subjectAltName={names}",
        "-CA", str(files.ca), "-CAkey", ca_key, "-keyout", str(new_key), "-out", str(new_certificate),
    )  # fmt: skip
    new_key.replace(files.key)
    new_certificate.replace(files.certificate)
