"""Addresses, tokens, files and times: what a person writes, and the one clear line about what cannot be used."""

from __future__ import annotations

import math
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hearth
from hearth._address import default_address, parse_address
from hearth._patience import Patience
from hearth._settings import OwnCertificate, read_settings
from tls_files import make_tls_files


@pytest.mark.parametrize(
    ("text", "target", "is_loopback"),
    [
        ("unix:///run/hearth/hearthd.sock", "unix:/run/hearth/hearthd.sock", True),
        ("unix:///tmp/a b%41#?.sock", "unix:/tmp/a%20b%2541%23%3F.sock", True),
        ("127.0.0.1:50051", "dns:///127.0.0.1:50051", True),
        ("127.8.9.1:1", "dns:///127.8.9.1:1", True),
        ("localhost:65535", "dns:///localhost:65535", True),
        ("[::1]:50051", "dns:///[::1]:50051", True),
        ("[fe80::1%eth0]:50051", "dns:///[fe80::1%25eth0]:50051", False),
        ("192.168.1.7:50051", "dns:///192.168.1.7:50051", False),
        ("0.0.0.0:50051", "dns:///0.0.0.0:50051", False),
        ("kitchen_pi.local:50051", "dns:///kitchen_pi.local:50051", False),
        ("localhost.example.org:50051", "dns:///localhost.example.org:50051", False),
    ],
)
def test_addresses(text: str, target: str, is_loopback: bool) -> None:
    address = parse_address(text)
    assert (address.text, address.target, address.is_loopback) == (text, target, is_loopback)
    assert address.is_unix == text.startswith("unix:")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the port is missing"),
        ("raspberrypi", "the port is missing, for example 'raspberrypi:50051'"),
        ("192.168.1.7", "the port is missing"),
        ("[::1]", "the port is missing"),
        ("::1:50051", "more than one colon"),
        ("::1", "more than one colon"),
        (":50051", "the host is missing"),
        ("host:", "not a number from 1 to 65535"),
        ("host:0", "not a number from 1 to 65535"),
        ("host:65536", "not a number from 1 to 65535"),
        ("host:-1", "not a number from 1 to 65535"),
        ("host:٣", "not a number from 1 to 65535"),
        ("host:000000000000000000001", "not a number from 1 to 65535"),
        ("http://host:1", "no such scheme"),
        ("tcp://host:1", "no such scheme"),
        ("unix:relative", "is absolute"),
        ("unix://relative", "is absolute"),
        ("unix:///" + "x" * 107, "at most 107 bytes"),
        ("unix:///a\0b", "none of them zero"),
        ("ho st:1", "'ho st' is not the name or address of a host"),
        ("-host:1", "is not the name"),
        ("host,other:1", "is not the name"),
        ("300.1.2.3:1", "is not an IPv4 address"),
        ("1.2.3:1", "is not an IPv4 address"),
        ("[1.2.3.4]:1", "is not an IPv6 address"),
        ("[::1:1", "the port is missing"),
    ],
)
def test_what_is_no_address_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(hearth.ConfigurationError, match=r"^address ") as caught:
        parse_address(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.one_of(st.text(), st.text().map("unix:///".__add__), st.from_regex(r"[\[\]:.%a-z0-9]{0,12}:[0-9]{0,6}")))
def test_any_text_is_an_address_or_one_clear_line(text: str) -> None:
    try:
        target, line = parse_address(text).target, "-"
    except hearth.ConfigurationError as error:
        target, line = "unix:/", str(error)
    assert len(line.splitlines()) == 1
    assert target.isascii()
    assert target.startswith(("unix:/", "dns:///"))


def test_where_a_daemon_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hearth._address.SYSTEM_SOCKET", f"{tmp_path}/system.sock")
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert default_address({}) == default_address(environ) == "127.0.0.1:50051"
    (tmp_path / "hearth").mkdir()
    with socket.socket(socket.AF_UNIX) as system, socket.socket(socket.AF_UNIX) as mine:
        system.bind(f"{tmp_path}/system.sock")
        assert default_address(environ) == f"unix://{tmp_path}/system.sock"
        (tmp_path / "hearth/hearthd.sock").write_text("not a socket")
        assert default_address(environ) == f"unix://{tmp_path}/system.sock"
        (tmp_path / "hearth/hearthd.sock").unlink()
        mine.bind(f"{tmp_path}/hearth/hearthd.sock")
        assert default_address(environ) == f"unix://{tmp_path}/hearth/hearthd.sock"
        assert default_address({"XDG_RUNTIME_DIR": "relative"}) == f"unix://{tmp_path}/system.sock"
        assert default_address(environ | {"HEARTH_ADDRESS": "pi:1"}) == "pi:1"
        # Root may write to every socket, so the refusal that others get is played.
        monkeypatch.setattr("hearth._address.os.access", lambda path, mode: "system" not in path)
        assert default_address({}) == "127.0.0.1:50051"
        assert default_address(environ) == f"unix://{tmp_path}/hearth/hearthd.sock"


def test_an_argument_wins_over_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert read_settings("pi:1", {"ca": certificate(tmp_path)}, {"HEARTH_ADDRESS": "other:2"}).address.text == "pi:1"
    environ = {"HEARTH_TOKEN": "from-environment"}
    assert read_settings("localhost:1", {}, environ).token == "from-environment"
    assert read_settings("localhost:1", {"token": "given"}, environ).token == "given"
    assert read_settings("localhost:1", {"token_file": file}, environ).token == "from-file"
    assert read_settings("localhost:1", {}, {"HEARTH_TOKEN_FILE": str(file)}).token == "from-file"
    assert read_settings("localhost:1", {}, {"HEARTH_TOKEN": "", "HEARTH_TOKEN_FILE": ""}).token is None


def certificate(directory: Path) -> Path:
    file = directory / "ca.pem"
    file.write_text("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n")
    return file


def test_a_token_never_crosses_the_network_in_the_clear_unless_told(tmp_path: Path) -> None:
    for address in ("192.168.1.7:1", "pi.local:1", "[fe80::1]:1"):
        with pytest.raises(hearth.ConfigurationError, match=r"unencrypted.*allow_plaintext_token") as caught:
            read_settings(address, {"token": "s3cret"}, {})
        assert "s3cret" not in str(caught.value)
        with pytest.raises(hearth.ConfigurationError, match="unencrypted"):
            read_settings(address, {}, {"HEARTH_TOKEN": "s3cret"})
        assert read_settings(address, {"token": "s3cret", "allow_plaintext_token": True}, {}).token == "s3cret"
        assert read_settings(address, {"token": "s3cret", "ca": certificate(tmp_path)}, {}).ca
        assert read_settings(address, {}, {}).token is None
    for address in ("127.0.0.1:1", "[::1]:1", "localhost:1", "unix:///run/x.sock"):
        assert read_settings(address, {"token": "s3cret"}, {}).token == "s3cret"


def test_a_token_is_never_shown(tmp_path: Path) -> None:
    settings = read_settings("localhost:1", {"token": "s3cret"}, {})
    assert "s3cret" not in repr(settings)
    with hearth.Client("localhost:1", token="s3cret") as client:
        assert repr(client) == "<Client localhost:1>"
    wrong = tmp_path / "wrong"
    for content in (b"", b"\n", b"s3cret two", b"s3cret\nmore", b"s3cret\xff", b"s3cret\0", b"s3cret" * 1000):
        wrong.write_bytes(content)
        with pytest.raises(hearth.ConfigurationError, match="token file") as caught:
            read_settings("localhost:1", {"token_file": wrong}, {})
        assert "s3cret" not in str(caught.value)
    with pytest.raises(hearth.ConfigurationError, match=r"^HEARTH_TOKEN: a token is one line") as caught:
        read_settings("localhost:1", {}, {"HEARTH_TOKEN": "s3cret\r\nx: y"})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "environ", "reason"),
    [
        ({"token": "a", "token_file": "b"}, {}, "both token and token_file"),
        ({}, {"HEARTH_TOKEN": "a", "HEARTH_TOKEN_FILE": "b"}, "both HEARTH_TOKEN and HEARTH_TOKEN_FILE"),
        ({"token_file": "/nonexistent/token"}, {}, "'/nonexistent/token' cannot be read: No such file or directory"),
        ({"token_file": "/"}, {}, "cannot be read: Is a directory"),
        ({"token_file": "a\0b"}, {}, "cannot be read"),
        ({"ca": "/nonexistent/ca"}, {}, "CA file '/nonexistent/ca' cannot be read"),
        ({}, {"HEARTH_CA": "/nonexistent/ca"}, "CA file"),
        ({"ca": "/dev/null"}, {}, "holds no certificate"),
        ({"ca": "/dev/zero"}, {}, "has over"),
        ({"timeout": 0}, {}, "timeout is 0"),
        ({"timeout": math.nan}, {}, "timeout is nan"),
        ({"call_timeout": -1}, {}, "call_timeout is -1"),
        ({"ready_timeout": -1}, {}, "ready_timeout is -1"),
        ({"ready_timeout": math.inf}, {}, "ready_timeout is inf"),
        ({"keepalive": math.inf}, {}, "keepalive is inf"),
        ({"max_retries": -1}, {}, "max_retries is -1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_in_one_line(
    options: Any, environ: dict[str, str], reason: str
) -> None:
    with pytest.raises(hearth.ConfigurationError) as caught:
        read_settings("localhost:1", options, environ)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_unix_socket_has_no_tls(tmp_path: Path) -> None:
    with pytest.raises(hearth.ConfigurationError, match="has no TLS"):
        read_settings("unix:///run/x.sock", {"ca": certificate(tmp_path)}, {})
    # That of the environment is for the addresses that need one.
    assert read_settings("unix:///run/x.sock", {}, {"HEARTH_CA": str(certificate(tmp_path))}).ca is None


def test_a_callers_certificate_that_cannot_be_shown_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    files, other = make_tls_files(tmp_path), make_tls_files(tmp_path / "other")
    ca, cert, key = str(files.ca), str(files.certificate), str(files.key)
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked],
        check=True,
        capture_output=True,
    )
    own = read_settings("localhost:1", {"ca": ca, "cert": cert, "key": key}, {}).own
    assert own == OwnCertificate(files.certificate.read_bytes(), files.key.read_bytes())
    environ = {"HEARTH_CA": ca, "HEARTH_CERT": cert, "HEARTH_KEY": key}
    assert read_settings("localhost:1", {}, environ).own == own
    # That of the environment is for the addresses that need one.
    assert read_settings("unix:///run/x.sock", {}, environ).own is None
    refusals: list[tuple[str | None, Any, str]] = [
        ("localhost:1", {"ca": ca, "cert": cert}, "cert is given alone: "),
        ("localhost:1", {"ca": ca, "key": key}, "key is given alone: "),
        ("localhost:1", {"cert": cert, "key": key}, "is shown over TLS alone; name the file"),
        ("unix:///run/x.sock", {"cert": cert, "key": key}, "a Unix socket has no TLS; leave cert out"),
        ("localhost:1", {"ca": ca, "cert": "/nonexistent", "key": key}, "cert file '/nonexistent' cannot be read"),
        ("localhost:1", {"ca": ca, "cert": cert, "key": str(other.key)}, "the key is that of another certificate"),
        ("localhost:1", {"ca": ca, "cert": cert, "key": cert}, "they are not a certificate and its key in PEM form"),
        ("localhost:1", {"ca": ca, "cert": "/dev/null", "key": key}, "they are not a certificate and its key"),
        ("localhost:1", {"ca": ca, "cert": cert, "key": str(locked)}, "the key has a passphrase; store it without"),
        (None, {"daemon": "kitchen", "cert": cert, "key": key}, "is given beside cert; a paired daemon has its own"),
    ]
    for address, options, reason in refusals:
        with pytest.raises(hearth.ConfigurationError) as caught:
            read_settings(address, options, {})
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


class Clock:
    """Time that passes only when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def patience(clock: Clock, **options: Any) -> Patience:
    defaults: dict[str, Any] = {"timeout": 600.0, "ready_timeout": 10.0, "max_retries": 3}
    return Patience(**defaults | options, clock=clock, jitter=lambda: 1.0)


def test_waiting_for_a_daemon_ends_at_its_bound() -> None:
    clock = Clock()
    asked = patience(clock)
    delays = []
    while (delay := asked.delay_after(hearth.UnavailableError("loading"))) is not None:
        delays.append(delay)
        clock.now += delay
    assert delays[:6] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0]
    assert max(delays) == 1.0
    assert 9 < sum(delays) <= 10


def test_a_daemons_own_delay_is_kept() -> None:
    clock = Clock()
    asked = patience(clock, ready_timeout=60)
    assert asked.delay_after(hearth.UnavailableError("loading", retry_after=5)) == 5
    # All whom a full queue sent away at one moment come back within a tenth, not at one moment.
    assert asked.delay_after(hearth.QueueFullError("full", retry_after=5)) == pytest.approx(5.5)
    assert patience(clock).delay_after(hearth.UnavailableError("loading", retry_after=11)) is None


@pytest.mark.parametrize(
    "error",
    [
        hearth.ConnectError("certificate", is_transient=False),
        hearth.InvalidRequestError("wrong"),
        hearth.InternalError("fault"),
        hearth.DeadlineError("late"),
        hearth.LimitExceededError("too large"),
        hearth.QueueFullError("never again", retry_after=None),
    ],
)
def test_what_waiting_cannot_help_is_not_waited_for(error: hearth.HearthError) -> None:
    assert patience(Clock()).delay_after(error) is None


def test_the_deadline_counts_every_attempt() -> None:
    clock = Clock()
    asked = patience(clock, timeout=8.0)
    assert asked.remaining() == 8
    clock.now += 5
    assert asked.remaining() == 3
    assert asked.delay_after(hearth.QueueFullError("full", retry_after=3)) is None
    clock.now += 5
    assert asked.remaining() == 0
    assert patience(clock, timeout=math.inf).remaining() is None
