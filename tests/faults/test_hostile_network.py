"""Peers that are silent, loud, mad or frozen: others are served as before, and what they took is given back."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_daemon import FakeDaemon

from hearth import Client
from hearth.v1 import status_pb2, status_pb2_grpc
from hearthd.access.tokens import create_token
from serving import PROOF_FORWARDS
from tls_files import make_tls_files

NUM_SILENT = 1000
NUM_HOLDERS = 64
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes.fromhex("000000040000000000")
PING = bytes.fromhex("000008060000000000") + bytes(8)
# By the requirement, for a slot whose caller is frozen; keepalive finds it after 15.
FROZEN_SECONDS = 20
SILENCE_SECONDS = 60


def median_ms(client: Client, count: int = 40) -> float:
    """How long a short chat takes."""
    taken = []
    for _ in range(count):
        begin = time.monotonic()
        client.chat("hello", temperature=0, max_tokens=8)
        taken.append(1000 * (time.monotonic() - begin))
    return statistics.median(taken)


def connect(daemon: FakeDaemon) -> socket.socket:
    return socket.create_connection(("127.0.0.1", daemon.port), timeout=30)


def test_a_thousand_silent_connections_and_a_real_client(tmp_path: Path, figure: Callable[[str], None]) -> None:
    with FakeDaemon(tmp_path) as daemon, daemon.client(daemon.tcp) as early, daemon.client() as beside:
        idle, idle_unix = median_ms(early), median_ms(beside)
        before, descriptors = daemon.resident_mb, daemon.num_descriptors
        silent = [connect(daemon) for _ in range(NUM_SILENT)]
        try:
            busy, busy_unix = median_ms(early), median_ms(beside)
            grown = daemon.resident_mb - before
            begin = time.monotonic()
            with daemon.client(daemon.tcp, ready_timeout=20) as late:
                late.chat("hello", max_tokens=2)
            newcomer = time.monotonic() - begin
        finally:
            for connection in silent:
                connection.close()
        daemon.wait_for_descriptors(descriptors + 2)
    figure(
        f"a chat takes {busy:.1f} ms beside {NUM_SILENT} of them, {idle:.1f} idle; on the Unix socket {busy_unix:.1f} "
        f"and {idle_unix:.1f}; a new TCP client waits {newcomer:.1f} s; {grown:+.1f} MB resident"
    )
    assert busy <= 2 * idle
    assert busy_unix <= 2 * idle_unix
    # The silent ones are cut off after 5 seconds.
    assert newcomer < 10
    assert grown < 30


def hold(daemon: FakeDaemon, authority: bytes) -> grpc.Channel:
    """Connect as anybody can, with TLS and HTTP/2, and call without a credential."""
    channel = grpc.secure_channel(
        daemon.tcp, grpc.ssl_channel_credentials(authority), options=[("grpc.use_local_subchannel_pool", 1)]
    )
    with contextlib.suppress(grpc.RpcError):
        status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest(), timeout=10)
    return channel


def warned_of_connections(client: Client) -> str | None:
    return next((line for line in client.status().warnings if line.startswith("server.max_connections")), None)


def test_strangers_that_hold_every_connection_shut_nobody_out(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """Each has made a call, which was refused, and is silent; gRPC itself would wait for two minutes."""
    files, tokens = make_tls_files(tmp_path), tmp_path / "tokens"
    token = create_token(tokens, "phone")
    with FakeDaemon(
        tmp_path,
        server={"max_connections": NUM_HOLDERS},
        tls={"certificate": files.certificate, "key": files.key},
        auth={"token_file": tokens},
    ) as daemon:
        options: dict[str, Any] = {"ca": files.ca, "token": token, "max_retries": 0}
        with daemon.client(daemon.tcp, **options) as early, daemon.client() as beside:
            early.chat("hello", max_tokens=2)
            assert warned_of_connections(beside) is None
            authority = files.ca.read_bytes()
            with ThreadPoolExecutor(8) as pool:
                holders = list(pool.map(lambda _: hold(daemon, authority), range(NUM_HOLDERS)))
            try:
                begin = time.monotonic()
                with daemon.client(daemon.tcp, **options) as late:
                    assert late.chat("hello", max_tokens=2).text
                newcomer = time.monotonic() - begin
                assert early.chat("hello", max_tokens=2).text
                warned = warned_of_connections(beside)
            finally:
                for channel in holders:
                    channel.close()
    figure(f"a newcomer with a token waits {newcomer:.1f} s beside {NUM_HOLDERS} strangers")
    assert warned is not None
    assert f"of {NUM_HOLDERS} TCP connections were open" in warned
    assert newcomer < 10
    assert "a valid credential were closed" in daemon.log.read_text()


def storm(daemon: FakeDaemon, seconds: float) -> tuple[int, int, bool]:
    """Send pings as fast as they are taken; how many, over how many connections, and whether it was told to be calm."""
    num_pings = num_connections = 0
    was_calmed = False
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with connect(daemon) as peer:
            num_connections += 1
            received = b""
            with contextlib.suppress(OSError):
                peer.sendall(PREFACE + SETTINGS)
                while time.monotonic() < deadline:
                    peer.sendall(PING * 100)
                    num_pings += 100
                    received = received[-4096:] + peer.recv(65536)
                    was_calmed = was_calmed or b"too_many_pings" in received
                    if b"too_many_pings" in received:
                        break
    return num_pings, num_connections, was_calmed


def test_a_storm_of_pings_is_cut_off(tmp_path: Path, figure: Callable[[str], None]) -> None:
    with FakeDaemon(tmp_path) as daemon, daemon.client(daemon.tcp) as client:
        median_ms(client)
        before, descriptors = daemon.resident_mb, daemon.num_descriptors
        num_pings, num_connections, was_calmed = storm(daemon, 3.0)
        assert client.chat("hello", temperature=0).text
        grown = daemon.resident_mb - before
        daemon.wait_for_descriptors(descriptors + 2)
    figure(f"{num_pings} pings over {num_connections} connections, each cut off; {grown:+.1f} MB resident")
    assert was_calmed
    assert num_connections > 10
    assert grown < 20


def nonsense(chance: random.Random) -> Iterator[bytes]:
    """What comes to an open port: noise, other protocols, and HTTP/2 that goes wrong at every depth."""
    yield b""
    yield chance.randbytes(chance.randrange(1, 65536))
    yield b"GET / HTTP/1.1\r\nHost: hearth\r\n\r\n"
    yield bytes.fromhex("16030100050100000100")
    yield b"SSH-2.0-OpenSSH_9.2\r\n"
    yield PREFACE[: chance.randrange(len(PREFACE))]
    yield PREFACE + chance.randbytes(500)
    # A frame that promises 16 MiB, one of an unknown kind, a header block that is none, a window of zero.
    yield PREFACE + SETTINGS + bytes.fromhex("ffffff000000000001") + chance.randbytes(9000)
    yield PREFACE + SETTINGS + bytes.fromhex("000004ff00000000ff") + chance.randbytes(4)
    yield PREFACE + SETTINGS + bytes.fromhex("000100010500000001") + chance.randbytes(256)
    yield PREFACE + SETTINGS + bytes.fromhex("00000408000000000000000000")
    for _ in range(10):
        frame = bytearray(PREFACE + SETTINGS + bytes.fromhex("000040010400000001") + chance.randbytes(64))
        for _ in range(3):
            frame[chance.randrange(len(PREFACE), len(frame))] = chance.randrange(256)
        yield bytes(frame)


@pytest.mark.parametrize("where", ["tcp", "tls", "unix"])
def test_nonsense_on_the_port_harms_nobody(where: str, tmp_path: Path, figure: Callable[[str], None]) -> None:
    files = make_tls_files(tmp_path)
    tls = {"certificate": files.certificate, "key": files.key} if where == "tls" else {}
    with FakeDaemon(tmp_path, tls=tls) as daemon, daemon.client() as client:
        median_ms(client)
        before, descriptors = daemon.resident_mb, daemon.num_descriptors
        chance = random.Random(41)
        count = 0
        for _ in range(15):
            for data in nonsense(chance):
                count += 1
                with socket.socket(socket.AF_UNIX) if where == "unix" else connect(daemon) as peer:
                    peer.settimeout(0.02)
                    with contextlib.suppress(OSError):
                        if where == "unix":
                            peer.connect(str(daemon.socket))
                        peer.sendall(data)
                        peer.recv(4096)
        assert client.chat("hello", temperature=0).text
        assert client.status().num_chats_failed == 0
        daemon.wait_for_descriptors(descriptors + 2)
        grown = daemon.resident_mb - before
    figure(f"{count} connections with nonsense; {grown:+.1f} MB resident, no descriptor left")
    assert grown < 20


ASK_FOR_EVER = """
import sys
from hearth import Client
with Client(sys.argv[1]) as client, client.stream("hello", max_tokens=200) as stream:
    print(next(stream).text != "", flush=True)
    stream.read()
"""


def test_a_frozen_client_loses_its_slot(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """SIGSTOP: the connection stays open and its peer says nothing any more, as when a laptop is closed."""
    with FakeDaemon(tmp_path, allowed=PROOF_FORWARDS + 3, runner={"is_gated": True}) as daemon:
        frozen = subprocess.Popen(
            [sys.executable, "-c", ASK_FOR_EVER, daemon.tcp],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            assert frozen.stdout
            assert select.select([frozen.stdout], [], [], 30)[0]
            assert frozen.stdout.readline() == b"True\n"
            frozen.send_signal(signal.SIGSTOP)
            begin = time.monotonic()
            with daemon.client() as client:
                while client.status().num_running:
                    assert time.monotonic() - begin < FROZEN_SECONDS + 5
                    threading.Event().wait(0.1)
            taken = time.monotonic() - begin
        finally:
            frozen.kill()
            frozen.communicate()
    figure(f"its slot was free after {taken:.1f} s")
    assert taken <= FROZEN_SECONDS


@pytest.mark.slow
def test_a_long_silence_survives_a_client_that_pings(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """gRPC's own default calls pings each 10 seconds in a silence too many, and cuts the client off at 40 seconds."""
    with (
        FakeDaemon(tmp_path, allowed=PROOF_FORWARDS, runner={"is_gated": True}) as daemon,
        daemon.client(daemon.tcp, keepalive=10, max_retries=0, ready_timeout=0) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answered = pool.submit(client.chat, "hello", max_tokens=2, timeout=120)
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            answered.result(SILENCE_SECONDS)
        daemon.allow(100)
        assert answered.result(30).usage.completion_tokens
    figure(f"answered after {time.monotonic() - begin:.0f} s of silence, on the first connection")
