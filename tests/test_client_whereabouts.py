"""Where a client looks when nobody named an address: every place of this machine, for as long as it waits."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hearth
import scripted_daemon as peer
from client_kinds import KINDS, Connect
from hearth import _whereabouts
from hearth._paired import PairedDaemon, PairedDaemons


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Connect:
    return KINDS[request.param]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free one, in place of the daemon's."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number: int = taken.getsockname()[1]
    monkeypatch.setattr("hearth._address.DEFAULT_PORT", number)
    return number


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of the test's own: nobody listens, and this user is paired with nobody."""
    for name in [name for name in os.environ if name.startswith("HEARTH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("hearth._address.SYSTEM_SOCKET", str(tmp_path / "system.sock"))
    monkeypatch.setattr(_whereabouts, "can_discover", lambda: False)
    (tmp_path / "user/hearth").mkdir(parents=True)
    return tmp_path


class AtFirstRemark(logging.Handler):
    """Does something when the client says that it waits."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__()
        self._actions = [action]
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        if self._actions:
            self._actions.pop()()


@pytest.fixture
def when_it_waits() -> Iterator[Callable[[Callable[[], object]], AtFirstRemark]]:
    logger = logging.getLogger("hearth")
    before = logger.level
    logger.setLevel(logging.INFO)

    def attach(action: Callable[[], object]) -> AtFirstRemark:
        handler = AtFirstRemark(action)
        logger.addHandler(handler)
        return handler

    yield attach
    logger.handlers.clear()
    logger.setLevel(before)


def nobody_at(place: str) -> str:
    return f"cannot reach {place}: nobody listens there; is hearthd running? "


@pytest.mark.parametrize("place", ["user/hearth/hearthd.sock", "system.sock"])
def test_a_socket_that_appears_while_it_waits_is_found(
    connect: Connect, machine: Path, port: int, place: str, when_it_waits: Any
) -> None:
    daemons: list[peer.ScriptedDaemon] = []
    remarks = when_it_waits(
        lambda: daemons.append(peer.ScriptedDaemon(peer.say("here"), address=f"unix://{machine}/{place}").start())
    )
    try:
        with connect() as client:
            assert client.chat("?").text == "here"
            assert client.chat("?").text == "here"
        assert remarks.said == [
            f"{nobody_at(f'127.0.0.1:{port}')}On another machine: hearth pair CODE, or --address (waiting up to 10 s)"
        ]
    finally:
        for daemon in daemons:
            daemon.stop()


def only_if_named(port: int) -> str:
    loopback = f"127.0.0.1:{port}"
    return f"{loopback} is asked only if named, for anybody on this machine may listen there: --address {loopback}"


def test_a_socket_of_a_dead_daemon_is_passed_over_for_another_socket(
    connect: Connect, machine: Path, port: int
) -> None:
    dead = f"unix://{machine}/user/hearth/hearthd.sock"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(dead.removeprefix("unix://"))
    with (
        peer.ScriptedDaemon(peer.say("anybody"), address=f"127.0.0.1:{port}") as anybody,
        connect(ready_timeout=0) as client,
    ):
        with pytest.raises(hearth.ConnectError) as caught:
            client.chat("?")
        assert str(caught.value) == nobody_at(dead) + only_if_named(port)
        with peer.ScriptedDaemon(peer.say("system"), address=f"unix://{machine}/system.sock"):
            assert client.chat("?").text == "system"
        with connect(f"127.0.0.1:{port}") as other:
            assert other.chat("?").text == "anybody"
        assert len(anybody.requests) == 1


def test_a_daemon_that_comes_back_elsewhere_is_found_by_a_client_that_knew_it(
    connect: Connect, machine: Path, port: int
) -> None:
    system, own = f"unix://{machine}/system.sock", f"unix://{machine}/user/hearth/hearthd.sock"
    with connect() as client:
        for place in (f"127.0.0.1:{port}", system, own, system):
            with peer.ScriptedDaemon(peer.say(place), address=place):
                assert client.chat("?").text == place
            with pytest.raises(hearth.ConnectError):
                client.status()


def test_nobody_gets_what_is_meant_for_a_socket_by_taking_the_port_while_the_daemon_restarts(
    connect: Connect, machine: Path, port: int
) -> None:
    place = f"unix://{machine}/system.sock"
    with connect(ready_timeout=0, token="secret") as hasty, connect(token="secret") as patient:
        with peer.ScriptedDaemon(peer.say("daemon"), address=place):
            assert hasty.chat("?").text == patient.chat("?").text == "daemon"
        (machine / "system.sock").unlink(missing_ok=True)
        with peer.ScriptedDaemon(peer.say("anybody"), address=f"127.0.0.1:{port}") as anybody:
            for call in (lambda: hasty.chat("?"), hasty.status, patient.status, lambda: hasty.chat("?")):
                with pytest.raises(hearth.ConnectError) as caught:
                    call()
            said = f"cannot reach {place}: there is no such socket; is hearthd running? "
            assert str(caught.value) == said + only_if_named(port)
            with peer.ScriptedDaemon(peer.say("daemon again"), address=place):
                assert patient.chat("?").text == "daemon again"
            assert anybody.requests == []
            assert anybody.metadata == []


def test_loopback_is_waited_for_where_there_was_no_socket(connect: Connect, port: int, when_it_waits: Any) -> None:
    come: list[peer.ScriptedDaemon] = []
    when_it_waits(lambda: come.append(peer.ScriptedDaemon(peer.say("here"), address=f"127.0.0.1:{port}").start()))
    try:
        with connect() as client:
            assert client.chat("?").text == "here"
    finally:
        for daemon in come:
            daemon.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_socket_in_a_strangers_directory_is_none(connect: Connect, machine: Path) -> None:
    """As after `su`, which keeps the other one's XDG_RUNTIME_DIR."""
    place = machine / "user/hearth/hearthd.sock"
    with peer.ScriptedDaemon(peer.say("somebody"), address=f"unix://{place}") as somebody:
        with connect(ready_timeout=0) as client:
            assert client.chat("?").text == "somebody"
        machine.joinpath("user").chmod(0o777)
        os.chown(place.parent, 12345, 12345)
        with connect(ready_timeout=0) as client, pytest.raises(hearth.ConnectError):
            client.chat("?")
        assert len(somebody.requests) == 1
        # What root has given away, where nobody else can put a directory: the service's own user has it.
        machine.joinpath("user").chmod(0o755)
        with connect(ready_timeout=0) as client:
            assert client.chat("?").text == "somebody"


def test_an_address_that_was_named_is_the_only_one(
    connect: Connect, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = f"unix://{machine}/named.sock"
    with peer.ScriptedDaemon(address=f"unix://{machine}/system.sock") as daemon:
        with connect(named, ready_timeout=0) as client, pytest.raises(hearth.ConnectError) as caught:
            client.chat("?")
        assert str(caught.value) == f"cannot reach {named}: there is no such socket; is hearthd running?"
        monkeypatch.setenv("HEARTH_ADDRESS", named)
        with connect(ready_timeout=0) as client, pytest.raises(hearth.ConnectError, match=r"named\.sock"):
            client.chat("?")
        assert daemon.requests == []


def test_a_socket_that_this_user_may_not_open_is_named_with_what_helps(
    connect: Connect, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = machine / "system.sock"
    with peer.ScriptedDaemon(address=f"unix://{path}"):
        # Root may write to every socket, so the refusal that others get is played.
        monkeypatch.setattr("hearth._address.os.access", lambda *_: False)
        for mode, said in (
            (0o660, f'{path} is there for its group: sudo usermod -aG {path.group()} "$USER", then log in again'),
            (0o600, f"{path} is there, and this user may not open it"),
        ):
            path.chmod(mode)
            with connect(ready_timeout=0) as client, pytest.raises(hearth.ConnectError) as caught:
                client.chat("?")
            assert str(caught.value).endswith(f"is hearthd running? {said}")


def test_a_paired_daemon_is_not_exchanged_for_another_one_which_is_named(
    connect: Connect, machine: Path, port: int
) -> None:
    """Which model answers, by whose rules, is not for the program to change."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gone = f"127.0.0.1:{taken.getsockname()[1]}"
    PairedDaemons(os.environ).write(
        PairedDaemon("pi", (gone,), "no certificate", "pi", "00", token="t", device="phone", role="user")
    )
    with connect(ready_timeout=0) as client, pytest.raises(hearth.ConnectError) as caught:
        client.chat("?")
    assert str(caught.value) == nobody_at(gone).rstrip()
    with peer.ScriptedDaemon(address=f"unix://{machine}/system.sock") as daemon:
        with connect(ready_timeout=0) as client, pytest.raises(hearth.ConnectError) as caught:
            client.chat("?")
        advice = f"A daemon answers on this machine; to ask that one: --address unix://{machine}/system.sock"
        assert str(caught.value) == nobody_at(gone) + advice
        assert daemon.requests == []


def test_a_full_line_of_callers_is_no_absence(machine: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(f"{machine}/system.sock")
        busy.listen(0)
        first.connect(f"{machine}/system.sock")
        assert _whereabouts.find_local(os.environ) == f"unix://{machine}/system.sock"
