"""Where the daemon is now.

A paired one is at a stored address, or, if the network can be asked, at another one. An address counts only if the
daemon's own certificate is shown there: another machine may have taken the address over. Where nobody is paired and
nobody named an address, it is at a Unix socket of this machine, or at its loopback address if there was no socket when
the client began: a port of loopback proves nobody's identity, and while a daemon restarts anybody may listen on it.

Blocks; `Client` and `AsyncClient` call it before a channel is opened, the latter in a thread; `_pairing` to know a
daemon again whose certificate has changed.
"""

import contextlib
import logging
import os
import queue
import socket
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hearth._address import Address, closed_socket, local_addresses, loopback_address
from hearth._certificate import fetch_certificate, fingerprint
from hearth._discovery import FoundDaemon, can_discover, discover
from hearth._errors import ConfigurationError, ConnectError
from hearth._paired import PairedDaemon, PairedDaemons

_logger = logging.getLogger("hearth")

_STORED_SECONDS = 3.0
_DISCOVER_SECONDS = 4.0
_LOCAL_SECONDS = 0.5


def find_address(daemon: PairedDaemon, seconds: float, environ: Mapping[str, str]) -> str | None:
    """The address to use; None if none answers.

    Raises ConnectError if only machines with other certificates answer.
    """
    deadline = time.monotonic() + seconds
    found, is_other = _first_that_answers(daemon, daemon.addresses, min(_STORED_SECONDS, seconds))
    if found is None and can_discover() and (left := deadline - time.monotonic()) > 0:
        _logger.info("%s does not answer at %s; looking for it", daemon.name, ", ".join(daemon.addresses))
        found = _ask_the_network(daemon, min(_DISCOVER_SECONDS, left))
        if found is not None:
            _remember(daemon, found, environ)
    if found is None and is_other:
        raise ConnectError(
            f"what answers at {is_other} shows another certificate than the one that {daemon.name} was paired with: it "
            f"is another machine, or the daemon's certificate was renewed; then pair again (hearthd pair, hearth pair)",
            is_transient=False,
        )
    return found


def find_local(environ: Mapping[str, str], *, only_sockets: bool = False) -> str | None:
    """The first place of this machine where somebody listens; None if nobody does anywhere.

    `only_sockets`: never the loopback address, which anybody may have taken who saw the socket go.
    """
    addresses = [each for each in local_addresses(environ) if each.startswith("unix:") or not only_sockets]
    return next((address for address in addresses if _is_listened_on(address)), None)


def advise(daemon: PairedDaemon | None, address: Address, environ: Mapping[str, str]) -> str:
    """What may help a person whose daemon is not at `address` nor elsewhere; empty if nothing is known."""
    if daemon is not None:
        # Never by itself: it is another one than this user chose, with another model and other rules.
        local = find_local(environ)
        return f"a daemon answers on this machine; to ask that one: --address {local}" if local else ""
    if path := closed_socket(environ):
        with contextlib.suppress(OSError, KeyError):
            # Where there are Unix sockets, there are groups.
            import grp

            found = os.stat(path)
            if found.st_mode & stat.S_IWGRP:
                group = grp.getgrgid(found.st_gid).gr_name
                return f'{path} is there for its group: sudo usermod -aG {group} "$USER", then log in again'
        return f"{path} is there, and this user may not open it"
    if address.is_unix and _is_listened_on(loopback := loopback_address()):
        return f"{loopback} is asked only if named, for anybody on this machine may listen there: --address {loopback}"
    return "on another machine: hearth pair CODE, or --address"


def _is_listened_on(address: str) -> bool:
    path = address.removeprefix("unix://")
    host, _, port = address.rpartition(":")
    family, where = (socket.AF_UNIX, path) if path != address else (socket.AF_INET, (host, int(port)))
    with socket.socket(family) as probe:
        probe.settimeout(_LOCAL_SECONDS)
        try:
            probe.connect(where)
        except BlockingIOError:
            # Its line of those who connect is full.
            return True
        except OSError:
            return False
    return True


def has_other_certificate(daemon: PairedDaemon, mark: str) -> bool:
    """Whether the certificate with this fingerprint has taken the place of the one that the daemon was paired with.

    It is shown at a stored address, and the stored one is shown at none.
    """
    marks = {shown for _, shown in _ask(daemon.addresses, _STORED_SECONDS)}
    return mark in marks and daemon.fingerprint not in marks


def _ask_the_network(daemon: PairedDaemon, seconds: float) -> str | None:
    def is_it(found: FoundDaemon) -> bool:
        return found.fingerprint == daemon.fingerprint

    try:
        addresses = [address for found in discover(seconds, is_it) if is_it(found) for address in found.addresses]
    except ConfigurationError as error:
        _logger.info("%s", error)
        return None
    return _first_that_answers(daemon, addresses, _STORED_SECONDS)[0] if addresses else None


def _remember(daemon: PairedDaemon, address: str, environ: Mapping[str, str]) -> None:
    _logger.info("%s is at %s now", daemon.name, address)
    kept = tuple(dict.fromkeys((address, *daemon.addresses)))[:8]
    # It works without, at the price of asking again the next time.
    with contextlib.suppress(ConfigurationError):
        PairedDaemons(environ).write(replace(daemon, addresses=kept))


def _first_that_answers(
    daemon: PairedDaemon, addresses: Sequence[str], seconds: float
) -> tuple[str | None, str | None]:
    """(the first address with the daemon's certificate, an address where another one is shown), as far as there are."""
    other = None
    for address, mark in _ask(addresses, seconds):
        if mark == daemon.fingerprint:
            return address, None
        other = other or (address if mark else None)
    return None, other


def _ask(addresses: Sequence[str], seconds: float) -> Iterator[tuple[str, str | None]]:
    """Each address that answers in time, with the fingerprint of the certificate there; None: there is none."""
    answers: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()

    def ask(address: str) -> None:
        mark = None
        with contextlib.suppress(ConnectError):
            mark = fingerprint(fetch_certificate(address, seconds))
        answers.put((address, mark))

    # At once: a name that nobody knows may take its resolver many seconds, which must not delay the others.
    for address in addresses:
        threading.Thread(target=ask, args=(address,), name="hearth-find", daemon=True).start()
    deadline = time.monotonic() + seconds
    for _ in addresses:
        try:
            yield answers.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            return
