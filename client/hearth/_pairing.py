"""Pairing: trade a code for a token that stays valid, with the daemon that the code means and with no other.

The certificate is fetched and compared with the code's fingerprint first; only then is the secret sent, over TLS that
accepts this certificate alone. A daemon whose certificate has changed is known again by its own name and its address:
it takes the place that it had. Called by the command `pair`.
"""

import ssl
from dataclasses import dataclass
from typing import Any

from hearth._address import parse_address
from hearth._certificate import fetch_certificate, fingerprint, read_name
from hearth._channel import call_metadata, open_channel
from hearth._errors import ConfigurationError, ConnectError, ProtocolError
from hearth._grpc import grpc
from hearth._paired import PairedDaemon, PairedDaemons
from hearth._pairing_code import PairingCode, parse_code
from hearth._settings import Settings
from hearth._translate import translate
from hearth._whereabouts import has_other_certificate
from hearth.v1 import pairing_pb2

_PAIR = f"/{pairing_pb2.DESCRIPTOR.services_by_name['PairingService'].full_name}/Pair"
_CONNECT_SECONDS = 5.0
_CALL_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Pairing:
    """What came of a code."""

    daemon: PairedDaemon
    has_replaced: bool
    """Whether it was stored under its name before, with another certificate."""
    namesakes: tuple[str, ...]
    """Other stored ones that call themselves the same: this very daemon at an earlier time, or another one."""


def pair(text: str, daemons: PairedDaemons, *, name: str | None = None) -> Pairing:
    """Use up the code, store what it gives in `daemons` and return it.

    name: what to call the daemon; None: as it calls itself. Raises ConfigurationError, ConnectError if the daemon is
    not there or shows another certificate, AuthenticationError if the code is not valid (any more).
    """
    code = parse_code(text)
    # What can go wrong here goes wrong before the code is used up.
    daemons.prepare()
    address, certificate = _find(code)
    server_name = read_name(address, certificate, _CONNECT_SECONDS)
    mark = fingerprint(certificate)
    if name is not None and not _is_usable(name, daemons, mark):
        raise ConfigurationError(
            f"name {name[:80]!r} cannot be used: it is another daemon's, or this daemon is stored under another one, "
            "or it has other characters than letters, digits, '.', '_', '-'; see: hearth pair --list"
        )
    pem = ssl.DER_cert_to_PEM_cert(certificate)
    response = _claim(code, address, pem, server_name)
    if not response.token:
        raise ProtocolError(f"the daemon at {address} answered without a token")
    name = name or _choose_name(daemons, response.daemon_name, mark)
    before = [daemon for daemon in daemons.readable() if daemon.name == name]
    daemon = PairedDaemon(
        name=name,
        # What has just worked first.
        addresses=tuple(dict.fromkeys((address, *code.addresses))),
        certificate=pem,
        server_name=server_name,
        fingerprint=mark,
        token=response.token,
        device=response.name,
        role=response.role,
        own_name=response.daemon_name,
    )
    daemons.write(daemon)
    return Pairing(
        daemon,
        has_replaced=any(each.fingerprint != mark for each in before),
        namesakes=tuple(
            each.name for each in daemons.readable() if each.name != name and each.calls_itself(response.daemon_name)
        ),
    )


def _is_usable(name: str, daemons: PairedDaemons, mark: str) -> bool:
    free = daemons.free_name(name, mark)
    if free == name or name not in daemons.names():
        return free == name
    # Another certificate's, then; unless this one has taken its place. `free` is in the list if it has a name already.
    return free not in daemons.names() and has_other_certificate(daemons.read(name), mark)


def _choose_name(daemons: PairedDaemons, own_name: str, mark: str) -> str:
    """A name for a daemon: the one that it has, even if its certificate was another one then; else a new one."""
    known = daemons.readable()
    if all(each.fingerprint != mark for each in known):
        for each in known:
            if each.calls_itself(own_name) and has_other_certificate(each, mark):
                return each.name
    return daemons.free_name(own_name, mark)


def _find(code: PairingCode) -> tuple[str, bytes]:
    """The first address where the code's certificate is shown, and the certificate."""
    failures: list[ConnectError] = []
    for address in code.addresses:
        try:
            certificate = fetch_certificate(address, _CONNECT_SECONDS)
        except ConnectError as error:
            failures.append(error)
            continue
        if code.is_of(certificate):
            return address, certificate
        failures.append(
            ConnectError(
                f"what answers at {address} shows another certificate than the code says: it is another daemon, or "
                "somebody is in between; nothing was sent",
                is_transient=False,
            )
        )
    wrong = [error for error in failures if not error.is_transient]
    if wrong:
        raise wrong[0]
    raise ConnectError("; ".join(map(str, failures)) + "; are both in the same network, and is hearthd running?")


def _claim(code: PairingCode, address: str, pem: str, server_name: str) -> Any:
    settings = Settings(
        address=parse_address(address), token=f"pair_{code.secret.hex()}", ca=pem.encode(), server_name=server_name
    )
    channel = open_channel(settings)
    try:
        call = channel.unary_unary(_PAIR, response_deserializer=pairing_pb2.PairResponse.FromString)
        request = pairing_pb2.PairRequest().SerializeToString()
        return call(request, timeout=_CALL_SECONDS, metadata=call_metadata(settings))
    except grpc.RpcError as error:
        raise translate(error, address) from error
    finally:
        channel.close()
