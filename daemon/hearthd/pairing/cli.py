"""`hearthd pair NAME`: make a code with which one device becomes a caller; list and take back codes.

Runs beside the daemon, usually as root, and talks to it by files only: certificate, token file and pairing record, all
in the service's own directories and owned by it. Checks everything before it writes anything, and hearthd.toml last.
Imports what makes certificates and QR codes when it needs them.
Called by `__main__`.
"""

import argparse
import os
import re
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hearthd.configuration import paths
from hearthd.configuration.config import Config, choose_file, load_config
from hearthd.errors import ConfigError

if TYPE_CHECKING:
    from hearthd.listening.listeners import Listener

__all__ = ["add_parser"]

_MAX_HOSTS: Final = 3
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser(
        "pair",
        help="make a code with which a device becomes a caller",
        description="Prints a code, and a QR code on a terminal, that lets one device in, once, within some minutes. "
        "On the device: hearth pair CODE. To shut it out again: hearthd token revoke NAME.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="what to call the device; its token gets this name")
    parser.add_argument("--role", metavar="ROLE", help="what it may do; user if not given")
    parser.add_argument(
        "--minutes", type=int, default=10, metavar="N", help="how long the code is good; 1 to 60, or 10"
    )
    parser.add_argument(
        "--address",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="where the device finds the daemon, in place of this machine's own name and addresses; up to 3",
    )
    parser.add_argument(
        "--open-lan",
        action="store_true",
        help="write what hearthd.toml lacks for other machines to call, and restart the service if it has to",
    )
    parser.add_argument("--no-qr", action="store_true", help="print no QR code")
    parser.add_argument("--list", action="store_true", help="list the devices that are being paired")
    parser.add_argument("--cancel", metavar="NAME", help="take a code back that nobody has used yet")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file, as for hearthd serve")
    parser.set_defaults(run=_run, parser=parser)


def _run(parsed: argparse.Namespace) -> None:
    if sum((parsed.name is not None, parsed.list, parsed.cancel is not None)) != 1:
        parsed.parser.error("give one of NAME, --list and --cancel NAME")
    if parsed.list:
        _list(parsed)
    elif parsed.cancel is not None:
        _cancel(parsed)
    else:
        _pair(parsed)


def _list(parsed: argparse.Namespace) -> None:
    from hearthd.pairing.records import PairingRecords

    records = PairingRecords(_token_file(load_config(parsed.config))).list()
    for record in records:
        print(f"{record.name}\t{record.role}\t{record.seconds_left / 60:.0f} minutes left")
    if not records:
        print("hearthd: no device is being paired; hearthd pair NAME makes a code", file=sys.stderr)


def _cancel(parsed: argparse.Namespace) -> None:
    from hearthd.pairing.records import PairingRecords

    PairingRecords(_token_file(load_config(parsed.config))).cancel(parsed.cancel)
    print(f"hearthd: the code of {parsed.cancel} is no good any more", file=sys.stderr)


def _pair(parsed: argparse.Namespace) -> None:
    from hearthd.access.tokens import DEFAULT_ROLE, make_token_file
    from hearthd.listening.listeners import find_listeners
    from hearthd.listening.tls import find_files, read_certificate
    from hearthd.pairing.certificate import make_certificate
    from hearthd.pairing.code import make_code
    from hearthd.pairing.open_lan import by_hand, missing_lines, plan_open_lan
    from hearthd.pairing.records import PairingRecords
    from hearthd.pairing.running_daemon import find_problem, restart_service

    # All that can be refused is, before anything is written.
    if not 1 <= parsed.minutes <= 60:
        raise ConfigError(f"--minutes is {parsed.minutes}; give 1 to 60")
    file = choose_file(parsed.config)
    config = load_config(file, paths.service_environment())
    given_hosts, given_port = _given_addresses(parsed.address)
    role = parsed.role or DEFAULT_ROLE
    _check_device(config, parsed.name, role)
    listeners = find_listeners(config.server, config.tls, config.auth)
    is_exposed = bool(given_hosts) or any(listener.is_exposed for listener in listeners)
    lines = missing_lines(config, is_exposed=is_exposed)
    file = file or paths.configuration_file()
    if lines and not parsed.open_lan:
        given = f" --config {shlex.quote(os.fspath(parsed.config))}" if parsed.config else ""
        # A loopback address that has TLS and tokens already: a tunnel or a proxy may lead there.
        is_inside = bool(config.server.tcp) and set(lines) == {("server", "tcp")}
        inside = f"; or, to open nothing, `hearthd pair {parsed.name} --address HOST:PORT{given}`" if is_inside else ""
        raise ConfigError(
            f"no other machine may call this daemon yet; {by_hand(lines)} to {file}, restart the daemon, and run this "
            f"again; or let `hearthd pair {parsed.name} --open-lan{given}` do that{inside}"
        )
    planned = plan_open_lan(file, lines) if lines else None
    if planned:
        config = planned.config
        listeners = find_listeners(config.server, config.tls, config.auth)
    port = given_port or _port(listeners)
    hosts = given_hosts or _own_hosts(listeners)

    # What the daemon does not start without is there before the file that says so: killed in between, or refused by a
    # disk, this leaves a daemon that starts, and the same command goes on from there.
    token_file = _token_file(config)
    make_token_file(token_file)
    if config.tls.directory and make_certificate(config.tls.directory):
        print(f"hearthd: made a certificate in {config.tls.directory}; devices know it by its hash", file=sys.stderr)
    files = find_files(config.tls)
    assert files is not None
    fingerprint = read_certificate(files).fingerprint
    if planned:
        planned.write()
        print(f"hearthd: {file} lets other machines call now, with TLS and a token each", file=sys.stderr)
    problem = None if planned else find_problem(listeners, fingerprint)
    if parsed.open_lan and (planned or problem):
        restart_service()
        problem = find_problem(listeners, fingerprint)
    if problem:
        print(f"hearthd: warning: {problem}", file=sys.stderr)

    secret = PairingRecords(token_file).create(parsed.name, role, seconds=parsed.minutes * 60)
    code = make_code(hosts, port, fingerprint, secret)
    print(
        f"hearthd: for {parsed.minutes} minutes, and once, this lets a device in as {parsed.name} (role {role}):",
        file=sys.stderr,
    )
    if sys.stdout.isatty() and not parsed.no_qr:
        _print_qr(code)
    print(code, flush=True)
    print("hearthd: on the device: hearth pair CODE, with the line above as CODE", file=sys.stderr)


def _check_device(config: Config, name: str, role: str) -> None:
    """Raise ConfigError for a device that could not be paired whatever hearthd.toml says of addresses."""
    from hearthd.access.tokens import check_new_token
    from hearthd.listening.tls import find_files

    check_new_token(_token_file(config), name)
    if role not in config.roles:
        raise ConfigError(f"there is no role {role[:80]!r}; there are: {', '.join(config.roles)}")
    tls = config.tls if config.tls.is_configured else replace(config.tls, directory=paths.tls_directory())
    files = find_files(tls)
    if files and files.clients:
        raise ConfigError(
            f"callers of this daemon must show a certificate of {files.clients}, and a device that is being paired has "
            "none; give the device such a certificate instead, or take that file away and restart the daemon"
        )


def _token_file(config: Config) -> Path:
    path = config.auth.token_file or paths.token_file()
    if paths.is_credential(path):
        raise ConfigError(
            f'auth.token_file is {path}, which systemd made and no device can be added to; set it to "auto", and '
            "restart the daemon; or make the token by `hearthd token create` in the file that systemd copies"
        )
    return path


def _given_addresses(texts: Sequence[str]) -> tuple[list[str], int | None]:
    """Return the hosts of --address, and the port that they share if they name one. Raises ConfigError."""
    hosts: list[str] = []
    ports: set[int] = set()
    for text in texts:
        host, colon, port = text.partition(":")
        if colon and not (port.isascii() and port.isdigit() and len(port) < 6 and 1 <= int(port) <= 65535):
            raise ConfigError(f"--address {text[:80]!r}: the port is no number from 1 to 65535")
        if not _HOST.fullmatch(host):
            raise ConfigError(f"--address {text[:80]!r}: give a host name or an IPv4 address, and :PORT if need be")
        hosts.append(host)
        ports.update([int(port)] if colon else [])
    if len(ports) > 1 or len(hosts) > _MAX_HOSTS:
        raise ConfigError(f"--address: give at most {_MAX_HOSTS}, all with the same port")
    return hosts, ports.pop() if ports else None


def _port(listeners: "Sequence[Listener]") -> int:
    tcp = sorted((each for each in listeners if not each.socket_path), key=lambda each: not each.is_exposed)
    port = int(tcp[0].target.rpartition(":")[2]) if tcp else 0
    if not port:
        raise ConfigError("server.tcp names no port; give one there, or to --address")
    return port


def _own_hosts(listeners: "Sequence[Listener]") -> list[str]:
    """Return this machine's name and addresses, as far as the daemon listens there."""
    from hearthd.listening.lan_addresses import lan_addresses

    # A socket behind a proxy says nothing of where that listens.
    exposed = [each.target.rpartition(":")[0] for each in listeners if each.is_exposed and not each.socket_path]
    addresses = list(lan_addresses()) if "[::]" in exposed else [host for host in exposed if "[" not in host]
    name = socket.gethostname().partition(".")[0]
    # Multicast DNS finds the name whatever address the router gives this machine tomorrow.
    named = [f"{name}.local"] if _HOST.fullmatch(name) and name != "localhost" else []
    if not addresses and not named:
        raise ConfigError("this machine has no address on a network; connect it, or name one with --address HOST")
    return [*named, *addresses][:_MAX_HOSTS]


def _print_qr(code: str) -> None:
    """Print the QR code with half blocks, one character for two modules; a narrow terminal gets none."""
    import segno

    # Upper case: QR's alphanumeric form takes 5.5 bits a character instead of 8.
    symbol = segno.make_qr(code.upper(), error="l")
    width, _ = symbol.symbol_size(border=2)
    # 0: a terminal that does not know its width.
    if width <= (os.get_terminal_size(sys.stdout.fileno()).columns or width):
        symbol.terminal(compact=True, border=2)
