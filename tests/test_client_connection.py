"""The connection: a daemon that is not there yet, that dies, that freezes; TLS, tokens, proxies. On real sockets."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import hearth
import scripted_daemon as peer
from client_kinds import KINDS, Connect
from hearth._channel import channel_options
from hearth._settings import read_settings
from hearth.v1 import chat_pb2
from relay import Relay
from tls_files import TlsFiles, make_tls_files

ADVICE = "; gRPC finds .local names only if GRPC_DNS_RESOLVER=native is in the environment when it is imported"


@pytest.fixture
def daemon() -> Iterator[peer.ScriptedDaemon]:
    with peer.ScriptedDaemon() as daemon:
        yield daemon


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Connect:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls_files(tmp_path_factory.mktemp("tls"))


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(files.key.read_bytes(), files.certificate.read_bytes())])


def half_an_answer(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
    yield peer.delta("half")
    peer.wait_for_end(context)


class OnFirstRecord(logging.Handler):
    """Does something once, at the client's first word that it waits."""

    def __init__(self, action: Any) -> None:
        super().__init__()
        self._action = action
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if len(self.messages) == 1:
            self._action()


@pytest.fixture
def on_first_wait() -> Iterator[Any]:
    logger = logging.getLogger("hearth")
    before = logger.level
    logger.setLevel(logging.INFO)

    def attach(action: Any) -> OnFirstRecord:
        handler = OnFirstRecord(action)
        logger.addHandler(handler)
        return handler

    yield attach
    logger.handlers.clear()
    logger.setLevel(before)


def test_a_daemon_that_is_just_being_started_is_waited_for(
    connect: Connect, tmp_path: Path, on_first_wait: Any
) -> None:
    daemon = peer.ScriptedDaemon(address=f"unix://{tmp_path}/hearthd.sock")
    # Binding already made the socket: take it away until the client has met its absence.
    (tmp_path / "hearthd.sock").rename(tmp_path / "later.sock")

    def appear() -> None:
        (tmp_path / "later.sock").rename(tmp_path / "hearthd.sock")
        daemon.start()

    handler = on_first_wait(appear)
    try:
        with connect(daemon.address) as client:
            assert client.chat("?").text == "Hello, world"
        assert handler.messages == [
            f"cannot reach {daemon.address}: there is no such socket; is hearthd running? (waiting up to 10 s)"
        ]
    finally:
        daemon.stop()


@pytest.mark.parametrize("call", ["chat", "models"])
def test_a_daemon_that_never_comes_is_given_up(connect: Connect, tmp_path: Path, call: str) -> None:
    with connect(f"unix://{tmp_path}/none.sock", ready_timeout=0.5) as client:
        begin = time.monotonic()
        with pytest.raises(hearth.ConnectError, match="no such socket; is hearthd running"):
            client.chat("?") if call == "chat" else client.models()
        assert time.monotonic() - begin < 5


def test_a_question_about_now_is_answered_at_once(connect: Connect, tmp_path: Path) -> None:
    with connect(f"unix://{tmp_path}/none.sock", ready_timeout=60) as client:
        begin = time.monotonic()
        for call in (client.status, client.health):
            with pytest.raises(hearth.ConnectError):
                call()
        assert time.monotonic() - begin < 5


def test_nobody_listening_is_said_plainly(connect: Connect) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with connect(address, ready_timeout=0) as client, pytest.raises(hearth.ConnectError) as caught:
            client.chat("?")
        assert str(caught.value) == f"cannot reach {address}: nobody listens there; is hearthd running?"


def test_an_unknown_name_is_said_plainly(connect: Connect) -> None:
    for address in ("no-such-host.invalid:1", "no-such-pi.local:1"):
        said = f"cannot reach {re.escape(address)}: the name is not known"
        with connect(address, ready_timeout=0) as client, pytest.raises(hearth.ConnectError, match=said):
            client.models()


@pytest.mark.parametrize("kind", ["_client.Client", "_async_client.AsyncClient"])
@pytest.mark.parametrize(
    ("before", "environment", "remark"),
    [
        ("", {}, ""),
        ("import grpc", {}, ADVICE),
        ("import grpc", {"GRPC_DNS_RESOLVER": "native"}, ""),
        ("", {"GRPC_DNS_RESOLVER": "ares"}, ADVICE),
    ],
)
def test_the_client_looks_for_local_names_where_the_system_does(
    kind: str, before: str, environment: dict[str, str], remark: str
) -> None:
    """That the system's own resolver was asked shows in that there is nothing to advise."""
    module, name = kind.split(".")
    code = f"""{before}
import asyncio, importlib, inspect, hearth
async def ask():
    client = importlib.import_module("hearth.{module}").{name}("no-such-pi.local:1", ready_timeout=0)
    status = client.status()
    return await status if inspect.isawaitable(status) else status
try:
    asyncio.run(ask())
except hearth.ConnectError as error:
    print(error)
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"PYTHONPATH": str(Path(hearth.__file__).parent.parent)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"cannot reach no-such-pi.local:1: the name is not known{remark}\n"


def test_a_peer_that_hangs_up_at_once_names_both_causes(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    # A preface is on its way: a reset, as from a full daemon.
                    connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        try:
            with connect(address, ready_timeout=0) as client, pytest.raises(hearth.ConnectError) as caught:
                client.chat("?")
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(20)
    said = (
        "it hangs up at once: it has as many connections as it takes, or it wants TLS (then name the CA file), or a "
        "certificate of its callers (then name yours and its key)"
    )
    assert str(caught.value) == f"cannot reach {address}: {said}"
    assert caught.value.is_transient


def test_a_peer_that_takes_the_connection_and_stays_silent_is_noticed(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with connect(address, keepalive=0.5, ready_timeout=0.2) as client:
            begin = time.monotonic()
            with pytest.raises(hearth.ConnectError, match=r"stays silent|does not answer"):
                client.chat("?")
            assert time.monotonic() - begin < 5


def test_a_daemon_that_freezes_in_a_long_silence_is_noticed(connect: Connect) -> None:
    """gRPC gives up its pings after two in a silence unless it is told otherwise; a frozen peer then goes unnoticed."""
    with (
        peer.ScriptedDaemon(half_an_answer) as daemon,
        Relay(daemon.port) as relay,
        connect(relay.address, keepalive=0.4, ready_timeout=0) as client,
    ):
        stream = client.stream("?", timeout=60)
        outcome: list[BaseException] = []

        def read() -> None:
            try:
                stream.read()
            except hearth.HearthError as error:
                outcome.append(error)

        assert next(stream).text == "half"
        reader = threading.Thread(target=read)
        reader.start()
        relay.wait_for_client_reads(4)
        relay.freeze()
        begin = time.monotonic()
        reader.join(30)
        # 0.4 s of silence and 0.2 s for the pong; the rest is for a busy machine.
        assert time.monotonic() - begin < 5
        assert isinstance(outcome[0], hearth.ConnectError)
        remedy = "ask again when `hearth status` finds it"
        assert str(outcome[0]) == f"lost {relay.address}: the daemon stopped answering; {remedy}"
        assert stream.text == "half"


def test_a_dead_daemon_is_noticed_within_20_seconds_by_default() -> None:
    options = dict(channel_options(read_settings("127.0.0.1:1", {}, {})))
    for answer_within in ("grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"):
        assert int(options["grpc.keepalive_time_ms"]) + int(options[answer_within]) <= 20_000
    assert options["grpc.http2.max_pings_without_data"] == 0
    assert int(options["grpc.min_reconnect_backoff_ms"]) <= 20_000


def test_a_broken_connection_is_no_answer(connect: Connect) -> None:
    with peer.ScriptedDaemon(half_an_answer) as daemon, Relay(daemon.port) as relay, connect(relay.address) as client:
        stream = client.stream("?")
        assert next(stream).text == "half"
        relay.break_connections()
        with pytest.raises(hearth.ConnectError, match="the connection broke"):
            stream.read()
        assert len(daemon.requests) == 1


def test_a_client_outlives_a_restart_of_the_daemon(connect: Connect) -> None:
    first = peer.ScriptedDaemon().start()
    with connect(first.address) as client:
        assert client.chat("?").text == "Hello, world"
        first.stop()
        with pytest.raises(hearth.ConnectError):
            client.status()
        with peer.ScriptedDaemon(peer.say("again"), address=first.address):
            assert client.chat("?").text == "again"


def test_the_token_goes_with_every_call(connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("abc.DEF-123_~\n")
    with peer.ScriptedDaemon(token="abc.DEF-123_~") as daemon:
        with connect(daemon.address, token_file=file) as client:
            client.chat("?")
            client.models()
            client.model()
            client.count_tokens("?")
            client.status()
            client.health()
        assert len(daemon.metadata) == 5
        for options in ({}, {"token": "wrong"}):
            with connect(daemon.address, **options) as client:
                for call in (lambda: client.chat("?"), client.models, client.status):
                    with pytest.raises(hearth.AuthenticationError, match="no token that this daemon knows"):
                        call()
        monkeypatch.setenv("HEARTH_TOKEN_FILE", str(file))
        with connect(daemon.address) as client:
            assert client.chat("?").text == "Hello, world"


def test_tls_with_the_daemons_authority(connect: Connect, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with peer.ScriptedDaemon(credentials=server_credentials(tls), token="t") as daemon:
        with connect(daemon.address, ca=tls.ca, token="t") as client:
            assert client.chat("?").text == "Hello, world"
        monkeypatch.setenv("HEARTH_CA", str(tls.ca))
        with connect(f"localhost:{daemon.port}", token="t") as client:
            assert client.health() is hearth.Health.SERVING


def test_a_daemon_that_another_authority_vouches_for_is_refused_at_once(
    connect: Connect, tls: TlsFiles, tmp_path: Path
) -> None:
    strangers = make_tls_files(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    misnamed = make_tls_files(elsewhere, "DNS:elsewhere.example")
    with peer.ScriptedDaemon(credentials=server_credentials(tls)) as daemon:
        check_refusal(connect, daemon, {"ca": strangers.ca, "token": "t"}, "not signed by that of the CA file")
        assert daemon.requests == []
        # A daemon that is being stopped or started may hang up as well: worth a wait.
        said = r"hangs up at once: .* or it wants TLS \(then name the CA file\)"
        with connect(daemon.address, ready_timeout=0.3) as client, pytest.raises(hearth.ConnectError, match=said):
            client.chat("?")
    with peer.ScriptedDaemon(credentials=server_credentials(misnamed)) as daemon:
        check_refusal(connect, daemon, {"ca": misnamed.ca}, "its certificate is for another name")
    with peer.ScriptedDaemon() as daemon:
        check_refusal(connect, daemon, {"ca": tls.ca}, "does not speak TLS")


def check_refusal(connect: Connect, daemon: peer.ScriptedDaemon, options: dict[str, Any], reason: str) -> None:
    with connect(daemon.address, ready_timeout=60, **options) as client:
        begin = time.monotonic()
        with pytest.raises(hearth.ConnectError, match=reason) as caught:
            client.chat("?")
        assert not caught.value.is_transient
        assert time.monotonic() - begin < 10


def test_no_proxy_of_the_environment_sees_a_call(
    daemon: peer.ScriptedDaemon, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with connect(daemon.address) as client:
            assert client.chat("?", timeout=20).text == "Hello, world"
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()
