"""Where connections run short, strangers are hung up on, and nobody else; it is told until it is over."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from hearth import AsyncClient, Client
from hearth.v1 import status_pb2, status_pb2_grpc
from hearthd.listening import connection_guard, transport
from hearthd.listening.connection_guard import ConnectionGuard
from hearthd.listening.own_connections import Connection, find_connections, hang_up
from hearthd.listening.peer_address import End, find_end, find_source, parse_ip
from serving import asynchronous, make_config, serving, tcp_target, warnings_of

PORTS = {50051}


class House:
    """What the kernel would say, and a clock."""

    def __init__(self, max_connections: int) -> None:
        self.now = 0.0
        self.is_slow = False
        self.num_closed = 0
        self.open: list[Connection] = []
        self.guard = ConnectionGuard(max_connections, find=self.find, close=self.close, clock=lambda: self.now)

    def find(self, ports: Collection[int]) -> list[Connection]:
        assert ports == PORTS
        return list(self.open)

    def close(self, connection: Connection) -> bool:
        if self.is_slow:
            self.num_closed += 1
        else:
            self.open.remove(connection)
        return True

    def connect(self, host: str, count: int) -> list[Connection]:
        first = len(self.open) + int(self.now * 1000)
        made = [Connection(n, n, End(parse_ip(host), n)) for n in range(first, first + count)]
        self.open += made
        return made

    def admit(self, *connections: Connection) -> None:
        for each in connections:
            self.guard.note_admitted(f"ipv{each.end.ip.version}:[{each.end.ip}]:{each.end.port}")

    def look(self, seconds: float = 0.0) -> bool:
        self.now += seconds
        return self.guard.look(PORTS)


def test_nobody_is_hung_up_on_while_there_is_room() -> None:
    house = House(64)
    house.connect("192.0.2.1", 47)
    assert not house.look()
    assert not house.look(1000)
    assert len(house.open) == 47
    assert house.guard.find_problem() is None


def test_strangers_are_hung_up_on_and_who_was_admitted_stays() -> None:
    house = House(64)
    phone, tv = house.connect("192.0.2.2", 1), house.connect("2001:db8::2", 2)
    house.admit(*phone, *tv)
    strangers = house.connect("192.0.2.66", 61)
    assert house.look()
    # An eighth of the number, the newest of them, for as long as it takes to show a credential.
    assert house.open == [*phone, *tv, *strangers[-8:]]
    more = house.connect("192.0.2.67", 37)
    assert house.look(4.9)
    assert house.open == [*phone, *tv, *strangers[-8:], *more[-8:]]
    house.admit(strangers[-1])
    house.connect("192.0.2.68", 30)
    house.look(0.2)
    assert house.open[:5] == [*phone, *tv, strangers[-1], more[-8]]


def test_who_is_admitted_fills_the_house_and_is_only_told_of() -> None:
    house = House(8)
    house.admit(*house.connect("192.0.2.2", 8))
    assert house.look()
    assert house.look(100)
    assert len(house.open) == 8
    assert house.guard.find_problem() is not None


def test_a_credential_that_is_no_longer_valid_makes_a_stranger_of_its_holder() -> None:
    house = House(8)
    (phone,), (lost,) = house.connect("192.0.2.2", 1), house.connect("192.0.2.3", 1)
    house.admit(phone, lost, *house.connect("192.0.2.4", 5))
    house.guard.note_refused(f"ipv4:{lost.end.ip}:{lost.end.port}")
    assert house.look()
    assert lost in house.open
    house.look(5)
    assert lost not in house.open
    assert phone in house.open


def test_the_port_of_who_has_left_admits_nobody_else() -> None:
    house = House(8)
    house.admit(*house.connect("192.0.2.2", 8))
    house.look()
    left, house.open = house.open, []
    house.look(1)
    house.open = left
    house.look(1)
    assert len(house.open) == 1
    house.look(5)
    house.open += left[:6]
    house.look(1)
    assert len(house.open) < 6


def test_one_machine_with_many_addresses_of_its_network_is_one_source() -> None:
    house = House(64)
    for number in range(64):
        house.connect(f"2001:db8:0:1::{number:x}", 1)
    house.look()
    assert len(house.open) == 8
    warned = house.guard.find_problem()
    assert warned is not None
    assert "64 of 64 TCP connections were open, 64 of them from one address" in warned


def test_the_journal_hears_of_it_once_a_minute_and_the_status_until_a_minute_after(
    caplog: pytest.LogCaptureFixture,
) -> None:
    house = House(16)
    with caplog.at_level(logging.WARNING):
        for _ in range(59):
            house.connect("192.0.2.66", 14)
            house.look(1)
        (record,) = caplog.records
        assert record.message == (
            "14 of 16 TCP connections (server.max_connections) are open, 14 of them from 192.0.2.66; 12 without a "
            "valid credential were closed since the last such line"
        )
        house.connect("192.0.2.66", 14)
        house.look(2)
        assert len(caplog.records) == 2
    house.open.clear()
    house.look(59)
    assert house.guard.find_problem() is not None
    house.look(1)
    assert house.guard.find_problem() is None


def test_who_was_hung_up_on_is_so_once_however_long_grpc_takes() -> None:
    house = House(8)
    house.is_slow = True
    house.connect("192.0.2.66", 8)
    for _ in range(3):
        assert house.look(0.25)
    assert house.num_closed == 7


def test_without_a_descriptor_left_it_looks_again_later() -> None:
    def find(_: Collection[int]) -> list[Connection]:
        raise OSError(24, "Too many open files")

    assert ConnectionGuard(8, find=find).look(PORTS)


@pytest.mark.parametrize(
    ("peer", "end"),
    [
        ("ipv4:192.0.2.1:36014", ("192.0.2.1", 36014)),
        ("ipv6:%5B2001:db8::1%5D:5", ("2001:db8::1", 5)),
        ("ipv6:[fe80::1%25eth0]:5", ("fe80::1", 5)),
        ("ipv6:[::ffff:192.0.2.1]:5", ("192.0.2.1", 5)),
        ("unix:", None),
        ("unix:/run/hearth/hearthd.sock", None),
        ("ipv4:nonsense", None),
        ("", None),
    ],
)
def test_peers_as_grpc_names_them(peer: str, end: tuple[str, int] | None) -> None:
    assert find_end(peer) == (end and End(ipaddress.ip_address(end[0]), end[1]))


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::1", "::1"),
    ],
)
def test_sources(address: str, source: str) -> None:
    assert find_source(parse_ip(address)) == source


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_own_connections_are_found_and_hung_up_on(family: socket.AddressFamily, host: str) -> None:
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server((host, 0), family=family))
        port = listening.getsockname()[1]
        callers = [stack.enter_context(socket.create_connection((host, port))) for _ in range(3)]
        taken = [stack.enter_context(listening.accept()[0]) for _ in callers]
        found = {each.end.port: each for each in find_connections({port})}
        assert found.keys() == {caller.getsockname()[1] for caller in callers}
        assert {each.end.ip for each in found.values()} == {ipaddress.ip_address(host)}
        assert find_connections({port + 1}) == []

        mine = callers[1].getsockname()[1]
        gone = found[mine]
        assert hang_up(gone)
        assert callers[1].recv(1) == b""
        callers[0].sendall(b"x")
        assert next(each for each in taken if each.fileno() == found[callers[0].getsockname()[1]].descriptor).recv(1)
        # Another that comes to have its descriptor is not hung up on.
        assert not hang_up(Connection(found[callers[0].getsockname()[1]].descriptor, gone.inode, gone.end))
        callers[0].sendall(b"x")


@asynchronous
async def test_the_status_tells_until_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_guard, "_TOLD_SECONDS", 0.5)
    monkeypatch.setattr(connection_guard, "_SECONDS_BETWEEN_LOOKS", 0.05)
    async with serving(make_config(tmp_path, server={"max_connections": 8})) as server:
        host, _, port = tcp_target(server).rpartition(":")
        assert await warnings_of(server) == []
        # Admitted, for this port is open to this machine: they are not hung up on, and leave when they like.
        channels = [
            grpc.aio.insecure_channel(tcp_target(server), options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(6)
        ]
        for channel in channels:
            await status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest())
        while not (warned := await warnings_of(server)):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.02)
        assert warned[0].startswith("server.max_connections: 6 of 8 TCP connections were open, 6 of them from one")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        # All but one of those who say nothing, before gRPC's five seconds are over; and none of the others.
        reading = [asyncio.create_task(reader.read(-1)) for reader, _ in silent]
        done, waiting = await asyncio.wait(reading, timeout=4, return_when=asyncio.FIRST_COMPLETED)
        assert (len(done), len(waiting)) == (1, 1)
        for channel in channels:
            await status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest())
            await channel.close()
        for _, writer in silent:
            writer.close()
        await asyncio.gather(*waiting)
        while await warnings_of(server):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.02)


@asynchronous
async def test_clients_that_were_idle_for_too_long_connect_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_IDLE_SECONDS", 1)
    async with serving(make_config(tmp_path)) as server:
        address = tcp_target(server)
        ports = {int(address.rpartition(":")[2])}
        client = Client(address, max_retries=0, ready_timeout=0)
        async with AsyncClient(address, max_retries=0, ready_timeout=0) as beside:
            for _ in range(2):
                assert (await asyncio.to_thread(client.chat, "hello", max_tokens=2)).text
                assert (await beside.chat("hello", max_tokens=2)).text
                assert find_connections(ports)
                while find_connections(ports):  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.02)
        client.close()
