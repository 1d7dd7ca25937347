"""The files that decide who may call: certificate, key, tokens. Called by `cli`."""

import datetime
import os
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from hearthd.access.tokens import list_tokens
from hearthd.configuration.config import Config
from hearthd.doctor.finding import Finding, good, note, problem, warning
from hearthd.errors import ConfigError
from hearthd.listening.listeners import find_listeners
from hearthd.listening.tls import TlsFiles, find_exposure, find_files, read_certificate

__all__ = ["check_certificate", "check_tokens"]

_LATE_DAYS: Final = 30


def check_certificate(
    config: Config, now: datetime.datetime | None = None, *, file: Path | None = None
) -> Iterable[Finding]:
    """Read certificate and key as the daemon does, and their dates. file: of the configuration, if one was given."""
    from cryptography import x509

    files = find_files(config.tls)
    if files is None:
        yield note("certificate", "no TLS is configured: nothing but this machine can call")
        return
    try:
        chain = read_certificate(files).chain
        certificates = x509.load_pem_x509_certificates(chain)
    except (ConfigError, ValueError) as error:
        yield problem("certificate", str(error), _remedy(files, _pair_command(config, file)))
        return
    now = now or datetime.datetime.now(datetime.UTC)
    # The chain is as good as its worst part.
    begins = max(each.not_valid_before_utc for each in certificates)
    ends = min(each.not_valid_after_utc for each in certificates)
    remedy = (
        f"renew {files.certificate}; the daemon takes it over by itself. Made by `hearthd pair`: remove it and "
        f"{files.key}, and pair the devices again"
    )
    if now >= ends:
        yield problem("certificate", f"{files.certificate} expired on {ends:%Y-%m-%d}", remedy)
    elif now < begins:
        yield problem(
            "certificate",
            f"{files.certificate} is not valid before {begins:%Y-%m-%d}, and this machine has {now:%Y-%m-%d}",
            "set the clock: timedatectl",
        )
    elif (ends - now).days < _LATE_DAYS:
        yield warning(
            "certificate", f"{files.certificate} expires on {ends:%Y-%m-%d}, in {(ends - now).days} days", remedy
        )
    else:
        yield good("certificate", f"valid until {ends:%Y-%m-%d}")
    if exposure := find_exposure(files.key):
        said, _, command = exposure.partition("; run: ")
        yield warning("key", said, command)
    else:
        yield good("key", f"{files.key} is readable by its owner alone")


def _pair_command(config: Config, file: Path | None) -> str:
    """Return the command that makes certificate and token, and opens no more than what is open; "" where none does."""
    if not config.tls.directory:
        return ""
    listeners = find_listeners(config.server, config.tls, config.auth)
    is_inside = bool(config.server.tcp) and not any(listener.is_exposed for listener in listeners)
    words = ["hearthd pair NAME"]
    if is_inside:
        words.append("--address HOST:PORT")
    if not is_inside or config.auth.token_file is None:
        # Beside an address it writes what is missing of tokens, and opens nothing.
        words.append("--open-lan")
    if file:
        words.append(f"--config {shlex.quote(os.fspath(file))}")
    return " ".join(words)


def _remedy(files: TlsFiles, pair_command: str) -> str:
    """Say what helps with files that cannot be used. pair_command: what makes them; "" where the owner does."""
    certificate, key = files.certificate, files.key
    if any(os.path.lexists(each) and not os.access(each, os.R_OK) for each in (certificate, key)):
        return "run this as root; if it is, the files, or the disk, must be put right"
    if files.clients and _is_usable(replace(files, clients=None)):
        return f"put the authority's certificate back, or remove {files.clients} and restart the daemon"
    if not pair_command:
        return f"put the pair back: {certificate} and its key {key}, both PEM"
    anew = f"sudo {pair_command}, which makes new ones; then every device pairs again"
    if not os.path.lexists(certificate):
        return f"put the pair back, or: {anew}"
    return f"put the pair back, or: sudo rm {certificate} {key}; {anew}"


def _is_usable(files: TlsFiles) -> bool:
    try:
        read_certificate(files)
    except ConfigError:
        return False
    return True


def check_tokens(config: Config, *, file: Path | None = None) -> Iterable[Finding]:
    """Read the token file as the daemon does. file: as of `check_certificate`."""
    path = config.auth.token_file
    if path is None:
        yield note("tokens", "no token file is configured: callers on loopback need none")
        return
    try:
        tokens = list_tokens(path)
    except ConfigError as error:
        text, _, remedy = str(error).rpartition("; ")
        yield problem("tokens", text, remedy)
        return
    without_rights = [token.name for token in tokens if token.role not in config.roles]
    if without_rights:
        yield warning(
            "tokens",
            f"no such role, so no rights: {', '.join(without_rights)}",
            "add [roles.NAME] to hearthd.toml, or make the token again with another --role",
        )
    if tokens:
        yield good("tokens", f"{len(tokens)} in {path}")
    else:
        remedy = _pair_command(config, file) or "hearthd pair NAME"
        yield warning("tokens", f"{path} has none, so nobody can call over the network", remedy)
