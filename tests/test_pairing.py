"""Pairing on the daemon's side: codes, records that are used once, the gate, the certificate, --open-lan."""

import asyncio
import datetime
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from hearth import ConfigurationError
from hearth._pairing_code import parse_code
from hearth.v1 import pairing_pb2, pairing_pb2_grpc, status_pb2, status_pb2_grpc
from hearthd.access.tokens import create_token, list_tokens, make_token_file
from hearthd.configuration.config import Config, load_config
from hearthd.errors import ConfigError, HearthdError, QuotaExceededError, UnauthenticatedError
from hearthd.listening.lan_addresses import lan_addresses
from hearthd.listening.tls import find_exposure, find_files, read_certificate
from hearthd.pairing import records as records_module
from hearthd.pairing.certificate import FIXED_NAME, make_certificate
from hearthd.pairing.code import make_code
from hearthd.pairing.gate import PAIR_METHOD, PairingGate
from hearthd.pairing.open_lan import missing_lines, plan_open_lan
from hearthd.pairing.records import SECRET_BYTES, PairingRecords
from serving import asynchronous, make_config, serving, tcp_target, unix_target

# Codes.

HOSTS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}\.local", fullmatch=True) | st.ip_addresses(v=4).map(str)


@given(
    hosts=st.lists(HOSTS, min_size=1, max_size=3),
    port=st.integers(1, 65535),
    fingerprint=st.binary(min_size=32, max_size=32),
    secret=st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES),
)
def test_the_client_reads_what_the_daemon_writes(
    hosts: list[str], port: int, fingerprint: bytes, secret: bytes
) -> None:
    code = make_code(hosts, port, fingerprint, secret)
    # Typed by hand, scanned from a QR code, pasted from a terminal that broke the line.
    for text in (code, code.upper(), code.lower(), f" {code[:30]}\n{code[30:]} ", code.replace("0", "O")):
        if "O" in text and "O" in text.partition("//")[2].partition("/")[0]:
            continue  # a host's name is not in the alphabet that forgives this
        parsed = parse_code(text)
        assert (list(parsed.hosts), parsed.port, parsed.secret) == (hosts, port, secret)
        assert fingerprint.startswith(parsed.fingerprint)
        assert len(parsed.fingerprint) == 16


def example() -> str:
    return make_code(["raspberrypi.local", "192.168.1.7"], 50051, bytes(range(32)), bytes(range(SECRET_BYTES)))


def test_a_code_fits_a_line_a_shell_and_a_small_qr_code() -> None:
    code = example()
    assert code.startswith("hearth://raspberrypi.local+192.168.1.7:50051/")
    assert len(code) <= 120
    assert not set(code) & set(" \t'\"\\$&|;<>()*?[]#~=%!{}`")
    # QR's alphanumeric form.
    assert set(code.upper()) <= set("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ $%*+-./:")
    import segno

    symbol = segno.make_qr(code.upper(), error="l")
    assert (symbol.mode, symbol.symbol_size(border=2)[0] <= 45) == ("alphanumeric", True)


def test_every_slip_of_the_fingers_is_told_and_the_code_never_quoted() -> None:
    code = example()
    start = len("hearth://")
    for at in range(start, len(code)):
        slipped = code[:at] + ("7" if code[at] != "7" else "8") + code[at + 1 :]
        with pytest.raises(ConfigurationError) as caught:
            parse_code(slipped)
        assert code[-12:] not in str(caught.value)
    for text in ("", "hearth://", "https://raspberrypi.local", code[:-1], code + "0", "hearth://" + "a" * 5000):
        with pytest.raises(ConfigurationError, match=r"copy the whole line|begins with"):
            parse_code(text)


@given(st.text(max_size=200) | st.text(max_size=200).map(lambda text: f"hearth://{text}"))
def test_no_text_does_more_than_to_be_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_code(text)


# Records.


@pytest.fixture
def records(tmp_path: Path) -> PairingRecords:
    return PairingRecords(tmp_path / "tokens")


def test_a_secret_is_good_once(records: PairingRecords) -> None:
    secret = records.create("phone", "user", seconds=60)
    assert [(each.name, each.role) for each in records.list()] == [("phone", "user")]
    claimed = records.claim(secret)
    assert claimed is not None
    assert (claimed.name, claimed.role) == ("phone", "user")
    assert records.claim(secret) is None
    assert records.list() == []
    assert records.claim(b"\0" * SECRET_BYTES) is None


def test_no_file_holds_the_secret_and_others_may_read_none(records: PairingRecords) -> None:
    secret = records.create("phone", "user", seconds=60)
    (file,) = records.directory.iterdir()
    assert secret.hex() not in file.name + file.read_text()
    assert [oct(each.stat().st_mode & 0o777) for each in (records.directory, file)] == ["0o700", "0o600"]


def test_a_code_ends_with_its_time_and_with_the_run_of_the_machine(
    records: PairingRecords, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = records.create("phone", "user", seconds=600)
    started = records_module._seconds_since_boot()
    with monkeypatch.context() as patch:
        patch.setattr(records_module, "_seconds_since_boot", lambda: started + 599)
        assert records.find(secret)
        patch.setattr(records_module, "_seconds_since_boot", lambda: started + 601)
        assert records.find(secret) is None
        assert records.claim(secret) is None
    assert records.find(secret)
    (tmp_path / "boot_id").write_text("another run\n")
    with monkeypatch.context() as patch:
        patch.setattr(records_module, "_BOOT_ID", tmp_path / "boot_id")
        assert records.claim(secret) is None
        # The next code sweeps what is no good any more.
        records.create("tablet", "user", seconds=600)
        assert len(list(records.directory.iterdir())) == 1


def test_a_wall_clock_that_jumps_changes_nothing(records: PairingRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = records.create("phone", "user", seconds=600)
    for jump in (-365, 365):
        with monkeypatch.context() as patch:
            patch.setattr("time.time", lambda jump=jump: 1.8e9 + jump * 86400)
            assert records.find(secret)


def test_a_new_code_of_a_name_ends_the_old_one(records: PairingRecords) -> None:
    old = records.create("phone", "user", seconds=60)
    new = records.create("phone", "user", seconds=60)
    assert records.claim(old) is None
    assert records.claim(new)


def test_a_code_can_be_taken_back(records: PairingRecords) -> None:
    secret = records.create("phone", "user", seconds=60)
    records.cancel("phone")
    assert records.claim(secret) is None
    with pytest.raises(ConfigError, match="no device 'phone' is being paired"):
        records.cancel("phone")


def test_what_hearth_did_not_write_lets_nobody_in(records: PairingRecords) -> None:
    secret = records.create("phone", "user", seconds=60)
    (file,) = records.directory.iterdir()
    fields = json.loads(file.read_text())
    for content in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 4096, json.dumps(fields | {"ends": "soon"}).encode()):
        file.write_bytes(content)
        assert records.claim(secret) is None
    for key in fields:
        file.write_text(json.dumps({name: value for name, value in fields.items() if name != key}))
        assert records.claim(secret) is None


def test_of_many_that_claim_at_once_exactly_one_wins(records: PairingRecords) -> None:
    for _ in range(50):
        secret = records.create("phone", "user", seconds=60)
        barrier, won = threading.Barrier(8), []

        def claim(secret: bytes = secret, barrier: threading.Barrier = barrier, won: list[object] = won) -> None:
            barrier.wait()
            if records.claim(secret):
                won.append(1)

        threads = [threading.Thread(target=claim) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [1]


KILLED = """
import json, os, signal, sys
from pathlib import Path
from hearthd.access import tokens
from hearthd.pairing.records import PairingRecords

def claim(token_file, secret, last_step):
    '''What the daemon does, in a process that is killed at this call into C. Returns how many there were.'''
    step = 0
    def count(frame, event, argument):
        nonlocal step
        if event == "c_call":
            step += 1
            if step == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(count)
    record = PairingRecords(token_file).claim(secret)
    if record is not None:
        tokens.create_token(token_file, record.name, role=record.role)
    sys.setprofile(None)
    return step

def prepare(name):
    token_file = Path(sys.argv[1]) / name
    tokens.make_token_file(token_file)
    return token_file, PairingRecords(token_file).create("phone", "user", seconds=60)

steps = claim(*prepare("whole"), -1)
outcomes = []
for step in range(1, steps + 1):
    token_file, secret = prepare(f"killed-{step}")
    if (child := os.fork()) == 0:
        claim(token_file, secret, step)
        os._exit(0)
    was_killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    is_used_up = PairingRecords(token_file).claim(secret) is None
    outcomes.append((was_killed, is_used_up, len(tokens.list_tokens(token_file))))
print(json.dumps(outcomes))
"""


def test_killed_at_any_step_there_is_never_a_second_token(tmp_path: Path) -> None:
    """SIGKILL at every call into C of claiming and making the token, as the daemon does it; then another tries."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True)
    outcomes = [tuple(each) for each in json.loads(done.stdout)]
    assert len(outcomes) > 100
    assert all(was_killed for was_killed, _, _ in outcomes)
    # The code is as good as before, or it is used up, without a token or with one.
    assert {outcome[1:] for outcome in outcomes} == {(False, 0), (True, 0), (True, 1)}


def test_the_name_of_a_role_and_a_device_come_back_as_they_were(records: PairingRecords) -> None:
    secret = records.create("mum.s-phone_2", "guest", seconds=60)
    found = records.find(secret)
    assert found is not None
    assert (found.name, found.role) == ("mum.s-phone_2", "guest")


# The gate.


def secured(directory: Path) -> Config:
    make_certificate(directory / "tls")
    make_token_file(directory / "tokens")
    return make_config(directory, tls={"directory": directory / "tls"}, auth={"token_file": directory / "tokens"})


@asynccontextmanager
async def connected(directory: Path, config: Config) -> AsyncIterator[grpc.aio.Channel]:
    certificate = (directory / "tls/server.crt").read_bytes()
    async with serving(config) as server:
        options = [("grpc.ssl_target_name_override", FIXED_NAME)]
        credentials = grpc.ssl_channel_credentials(certificate)
        async with grpc.aio.secure_channel(tcp_target(server), credentials, options) as channel:
            yield channel


async def pair(channel: grpc.aio.Channel, secret: bytes | str | None) -> pairing_pb2.PairResponse:
    shown = secret if isinstance(secret, str) else f"Bearer pair_{secret.hex()}" if secret else None
    metadata = [("authorization", shown)] if shown else []
    response: pairing_pb2.PairResponse = await pairing_pb2_grpc.PairingServiceStub(channel).Pair(
        pairing_pb2.PairRequest(), metadata=metadata
    )
    return response


async def code_of(awaitable: object) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable  # type: ignore[misc]
    return caught.value.code()


@asynchronous
async def test_a_secret_becomes_a_token_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = PairingRecords(tmp_path / "tokens")
    async with connected(tmp_path, secured(tmp_path)) as channel:
        # Made while the daemon runs.
        secret = records.create("phone", "monitor", seconds=60)
        response = await pair(channel, secret)
        assert (response.name, response.role) == ("phone", "monitor")
        assert response.daemon_name == socket.gethostname().partition(".")[0]
        status = status_pb2_grpc.StatusServiceStub(channel)
        bearer = [("authorization", f"Bearer {response.token}")]
        assert (await status.GetStatus(status_pb2.GetStatusRequest(), metadata=bearer)).version
        assert await code_of(pair(channel, secret)) is grpc.StatusCode.UNAUTHENTICATED
    assert [(token.name, token.role) for token in list_tokens(tmp_path / "tokens")] == [("phone", "monitor")]
    assert secret.hex() not in caplog.text
    assert response.token not in caplog.text


@asynchronous
async def test_a_secret_opens_no_other_method_and_a_token_does_not_pair(tmp_path: Path) -> None:
    records, config = PairingRecords(tmp_path / "tokens"), secured(tmp_path)
    token = create_token(tmp_path / "tokens", "tablet")
    async with connected(tmp_path, config) as channel:
        secret = records.create("phone", "user", seconds=60)
        status = status_pb2_grpc.StatusServiceStub(channel)
        bearer = [("authorization", f"Bearer pair_{secret.hex()}")]
        refused = status.GetStatus(status_pb2.GetStatusRequest(), metadata=bearer)
        assert await code_of(refused) is grpc.StatusCode.UNAUTHENTICATED
        for shown in (None, "Bearer pair_", "Bearer pair_zz", f"Bearer {secret.hex()}", f"Bearer pair_{'0' * 22}"):
            assert await code_of(pair(channel, shown)) is grpc.StatusCode.UNAUTHENTICATED
        assert await code_of(pair(channel, f"Bearer {token}")) is not grpc.StatusCode.OK
        # None of this used it up.
        assert (await pair(channel, secret)).token


@asynchronous
async def test_of_two_devices_with_one_code_exactly_one_gets_a_token(tmp_path: Path) -> None:
    records = PairingRecords(tmp_path / "tokens")
    async with connected(tmp_path, secured(tmp_path)) as channel:
        # Four, so that this address is not shut out as one that guesses.
        for number in range(4):
            secret = records.create(f"phone{number}", "user", seconds=60)
            outcomes = await asyncio.gather(pair(channel, secret), pair(channel, secret), return_exceptions=True)
            tokens = [each for each in outcomes if isinstance(each, pairing_pb2.PairResponse)]
            refused = [each.code() for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
            assert len(tokens) == 1
            assert refused == [grpc.StatusCode.UNAUTHENTICATED]
        assert len(list_tokens(tmp_path / "tokens")) == 4


async def guess(gate: PairingGate, address: str) -> type[Exception]:
    """Show a wrong secret from an address; return the error that answers it."""
    metadata = (("authorization", f"Bearer pair_{'0' * 2 * SECRET_BYTES}"),)
    details = SimpleNamespace(method=PAIR_METHOD, invocation_metadata=metadata)

    async def no_other(_: object) -> None:
        raise AssertionError

    handler = await gate.intercept_service(no_other, details)
    assert handler is not None
    with pytest.raises(HearthdError) as caught:
        await handler.unary_unary(pairing_pb2.PairRequest(), SimpleNamespace(peer=lambda: address))
    return caught.type


@asynchronous
async def test_one_machine_that_guesses_from_many_addresses_is_one_and_the_journal_stays_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    gate = PairingGate(tmp_path / "tokens", clock=lambda: now)
    answers = [await guess(gate, f"ipv6:%5B2001:db8::{host:x}%5D:{host}") for host in range(1, 8)]
    assert answers == [UnauthenticatedError] * 5 + [QuotaExceededError] * 2
    # Another house, and a neighbour of IPv4.
    assert await guess(gate, "ipv6:%5B2001:db8:0:1::1%5D:1") is UnauthenticatedError
    for host in range(50):
        assert await guess(gate, f"ipv4:192.0.2.{host}:1") is UnauthenticatedError
    lines = [record.message for record in caplog.records if "wrong pairing code" in record.message]
    assert len(lines) == 10
    now = 7.0
    await guess(gate, "ipv4:192.0.2.99:1")
    assert caplog.records[-1].message == "a wrong pairing code came from ipv4:192.0.2.99:1 (46 others before it)"


@asynchronous
async def test_who_guesses_is_sent_away_for_a_while(tmp_path: Path) -> None:
    records = PairingRecords(tmp_path / "tokens")
    config = secured(tmp_path)
    async with connected(tmp_path, config) as channel:
        secret = records.create("phone", "user", seconds=60)
        for _ in range(5):
            assert await code_of(pair(channel, b"\1" * SECRET_BYTES)) is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pair(channel, secret)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 0 < int(dict(caught.value.trailing_metadata() or ())["grpc-retry-pushback-ms"]) <= 60_000
        # Whoever comes from somewhere else is not held up by that, and the code is as good as before.
        async with grpc.aio.insecure_channel(unix_target(config)) as other:
            assert (await pair(other, secret)).token


@asynchronous
async def test_a_name_that_was_taken_meanwhile_gets_no_second_token(tmp_path: Path) -> None:
    records = PairingRecords(tmp_path / "tokens")
    async with connected(tmp_path, secured(tmp_path)) as channel:
        secret = records.create("phone", "user", seconds=60)
        create_token(tmp_path / "tokens", "phone")
        with pytest.raises(grpc.aio.AioRpcError, match="hearthd token revoke phone") as caught:
            await pair(channel, secret)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert len(list_tokens(tmp_path / "tokens")) == 1


# The certificate.


def test_a_certificate_is_made_once_and_is_good_for_ten_years_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return cls(1970, 1, 1, tzinfo=tz)

    with monkeypatch.context() as patch:
        module = SimpleNamespace(datetime=Clock, timedelta=datetime.timedelta, UTC=datetime.UTC)
        patch.setattr("hearthd.pairing.certificate.datetime", module)
        assert make_certificate(tmp_path / "tls")
    first = (tmp_path / "tls/server.crt").read_bytes()
    made = x509.load_pem_x509_certificate(first)
    today = datetime.datetime.now(datetime.UTC)
    assert made.not_valid_before_utc < today
    assert made.not_valid_after_utc.year >= 2036
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert FIXED_NAME in names.get_values_for_type(x509.DNSName)
    assert not make_certificate(tmp_path / "tls")
    assert (tmp_path / "tls/server.crt").read_bytes() == first


def test_the_key_is_the_owners_alone_and_both_fit(tmp_path: Path) -> None:
    make_certificate(tmp_path / "tls")
    config = make_config(tmp_path, tls={"directory": tmp_path / "tls"})
    files = find_files(config.tls)
    assert files is not None
    assert len(read_certificate(files).fingerprint) == 32
    assert find_exposure(files.key) is None
    assert (tmp_path / "tls").stat().st_mode & 0o777 == 0o700


def test_a_key_without_certificate_which_a_kill_leaves_is_replaced(tmp_path: Path) -> None:
    make_certificate(tmp_path / "tls")
    (tmp_path / "tls/server.crt").unlink()
    assert make_certificate(tmp_path / "tls")
    config = make_config(tmp_path, tls={"directory": tmp_path / "tls"})
    files = find_files(config.tls)
    assert files is not None
    read_certificate(files)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")
def test_what_root_makes_belongs_to_the_service(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 64321, 64322)
    make_token_file(state / "tokens")
    make_certificate(state / "tls")
    PairingRecords(state / "tokens").create("phone", "user", seconds=60)
    paths = list(state.rglob("*"))
    assert {path.name for path in paths} >= {"tokens", "tls", "server.key", "server.crt", "tokens.pairings"}
    assert {(path.stat().st_uid, path.stat().st_gid) for path in paths} == {(64321, 64322)}


@pytest.mark.parametrize("name", ["tls", "tokens.pairings"])
def test_root_does_not_follow_a_link_that_the_service_may_have_planted(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    makers: dict[str, Callable[[], object]] = {
        "tls": lambda: make_certificate(tmp_path / "tls"),
        "tokens.pairings": lambda: PairingRecords(tmp_path / "tokens").create("phone", "user", seconds=60),
    }
    with pytest.raises(ConfigError, match="is a link"):
        makers[name]()
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --open-lan.


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("HEARTHD_")]:
        monkeypatch.delenv(name)
    for name in ("STATE", "RUNTIME", "CONFIGURATION"):
        monkeypatch.setenv(f"{name}_DIRECTORY", str(tmp_path / name.lower()))
    return tmp_path / "configuration/hearthd.toml"


def open_file(file: Path) -> Config:
    config = load_config(file if file.exists() else None)
    before = file.read_text() if file.exists() else None
    planned = plan_open_lan(file, missing_lines(config, is_exposed=False))
    assert (file.read_text() if file.exists() else None) == before, "a plan writes nothing"
    planned.write()
    return planned.config


@pytest.mark.parametrize("start", [None, "", "# nothing\n", '[server]\ntcp = ["127.0.0.1:50051"]', "[log]\n[tls]\n"])
def test_open_lan_comes_to_an_open_daemon(environment: Path, start: str | None) -> None:
    environment.parent.mkdir()
    if start is not None:
        environment.write_text(start)
    config = open_file(environment)
    assert config == load_config(environment)
    assert config.server.tcp == ("0.0.0.0:50051",)
    assert config.tls.directory == environment.parent.parent / "state/tls"
    assert config.auth.token_file == environment.parent.parent / "state/tokens"
    assert missing_lines(config, is_exposed=True) == {}


def test_open_lan_changes_three_lines_of_the_documented_file(environment: Path, repository: Path) -> None:
    environment.parent.mkdir()
    before = (repository / "deploy/hearthd.toml").read_text()
    environment.write_text(before)
    environment.chmod(0o640)
    open_file(environment)
    after = environment.read_text()
    assert [line for line in after.splitlines() if line not in before.splitlines()] == [
        'tcp = ["0.0.0.0:50051"]', 'directory = "auto"', 'token_file = "auto"',
    ]  # fmt: skip
    assert [line for line in before.splitlines() if line not in after.splitlines()] == []
    # Each below the comment that explains it.
    assert '#tcp = ["127.0.0.1:50051"]\ntcp = ["0.0.0.0:50051"]' in after
    assert environment.stat().st_mode & 0o777 == 0o640


def test_open_lan_keeps_the_port_and_what_is_there(environment: Path, tmp_path: Path) -> None:
    environment.parent.mkdir()
    environment.write_text(
        '[server] # mine\ntcp = ["127.0.0.1:50099"] # local\n[log]\nlevel="debug"\n'
        f'[auth]\ntoken_file = "{tmp_path}/mine"\n'
    )
    config = open_file(environment)
    assert config.server.tcp == ("0.0.0.0:50099",)
    assert config.auth.token_file == tmp_path / "mine"
    assert config.log.level == "debug"


def test_open_lan_writes_nothing_that_would_not_hold(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment.parent.mkdir()
    for content in ('server = {tcp = ["127.0.0.1:50051"]}\n', '[server]\ntcp = [\n  "127.0.0.1:50051",\n]\n'):
        environment.write_text(content)
        with pytest.raises(ConfigError, match=r'write \[server\] tcp = \["0.0.0.0:50051"\], \[tls\] directory'):
            open_file(environment)
        assert environment.read_text() == content
    environment.write_text("")
    monkeypatch.setenv("HEARTHD_SERVER_TCP", "127.0.0.1:50051")
    with pytest.raises(ConfigError, match="HEARTHD_SERVER_TCP is set in the environment"):
        open_file(environment)
    assert environment.read_text() == ""


# Addresses.


def test_addresses_of_this_machine_are_those_of_its_networks() -> None:
    shown = subprocess.run(["ip", "-4", "-j", "addr"], capture_output=True, text=True, check=True).stdout
    networks = {
        address["local"]
        for interface in json.loads(shown)
        if {"UP", "MULTICAST"} <= set(interface["flags"]) and "LOOPBACK" not in interface["flags"]
        for address in interface["addr_info"]
    }
    found = lan_addresses()
    assert set(found) <= networks
    assert "127.0.0.1" not in found
    assert bool(found) == bool(networks)
