"""Addresses: what is bound, and that nothing is open to the house by accident."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearthd.configuration.config import AuthConfig, MetricsConfig, ServerConfig, TlsConfig
from hearthd.errors import ConfigError
from hearthd.listening.listeners import Listener, find_listeners, find_metrics_listeners

NO_TLS, TLS = TlsConfig(), TlsConfig(certificate=Path("/c.pem"), key=Path("/k.pem"))
NO_TOKENS, TOKENS = AuthConfig(), AuthConfig(token_file=Path("/tokens"))
MUTUAL_TLS = TlsConfig(certificate=Path("/c.pem"), key=Path("/k.pem"), clients=Path("/ca.pem"))
CERTIFICATES = AuthConfig(certificates=(("phone.lan", "user"),))
EXPOSED = ["0.0.0.0:50051", "[::]:50051", "192.0.2.7:50051", "[2001:db8::7]:50051", "[::ffff:192.0.2.7]:1", "0:50051"]
LOOPBACK = ["127.0.0.1:50051", "127.255.0.9:1", "[::1]:50051", "localhost:50051"]


def find(*tcp: str, tls: TlsConfig = NO_TLS, auth: AuthConfig = NO_TOKENS, **server: Any) -> tuple[Listener, ...]:
    return find_listeners(ServerConfig(tcp=tcp, **server), tls, auth)


def refusal(*tcp: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        find(*tcp, **options)
    return str(caught.value)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let every host name stand for the given addresses."""

    def set_addresses(*addresses: str) -> None:
        def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return set_addresses


@pytest.mark.parametrize("address", EXPOSED)
def test_an_address_for_other_machines_needs_tls_and_authentication(address: str) -> None:
    missing = "auth.token_file (or auth.certificates)"
    assert f"without tls.directory (or tls.certificate and tls.key), {missing}:" in refusal(address)
    assert f"without {missing}:" in refusal(address, tls=TLS)
    assert f"without {missing}:" in refusal(address, tls=MUTUAL_TLS)
    assert "without tls.directory (or tls.certificate and tls.key):" in refusal(address, auth=TOKENS)
    assert [listener.is_exposed for listener in find(address, tls=TLS, auth=TOKENS)] == [True]
    assert [listener.is_exposed for listener in find(address, tls=MUTUAL_TLS, auth=CERTIFICATES)] == [True]


def test_names_of_certificates_need_an_authority_that_proves_them(tmp_path: Path) -> None:
    """Otherwise nobody could ever show one, and a daemon without tokens would seem to have authentication."""
    directory = TlsConfig(directory=tmp_path)
    for tls, where in ((NO_TLS, "tls.clients"), (TLS, "tls.clients"), (directory, f"{tmp_path} as clients.crt")):
        for address in ("127.0.0.1:50051", "0.0.0.0:50051"):
            message = refusal(address, tls=tls, auth=CERTIFICATES)
            assert "there is no authority to check them against" in message
            assert where in message
    (tmp_path / "clients.crt").touch()
    assert find("0.0.0.0:50051", tls=directory, auth=CERTIFICATES)


@pytest.mark.parametrize("address", EXPOSED)
def test_only_the_flag_that_says_so_opens_it(address: str) -> None:
    assert "allow_insecure_lan = true" in refusal(address)
    assert find(address, allow_insecure_lan=True)[0].is_exposed


@pytest.mark.parametrize("address", LOOPBACK)
def test_loopback_needs_neither(address: str) -> None:
    listeners = find(address)
    assert listeners
    assert not any(listener.is_exposed for listener in listeners)


def test_a_host_name_is_judged_by_its_addresses(resolve: Callable[..., None]) -> None:
    resolve("127.0.0.1", "192.0.2.7")
    assert "pi.local:50051, which other machines can reach" in refusal("pi.local:50051")
    resolve("127.0.0.1")
    assert find("pi.local:50051")[0].target == "127.0.0.1:50051"


def test_a_host_name_is_bound_at_each_of_its_addresses(resolve: Callable[..., None]) -> None:
    resolve("192.0.2.7", "192.0.2.8")
    targets = [listener.target for listener in find("pi.local:9", tls=TLS, auth=TOKENS)]
    assert targets == ["192.0.2.7:9", "192.0.2.8:9"]


def test_an_address_given_twice_is_bound_once() -> None:
    assert len(find("127.0.0.1:1", "127.0.0.1:1")) == 1
    assert len(find("0.0.0.0:1", "[::]:1", allow_insecure_lan=True)) == 1
    assert len(find("127.0.0.1:1", "127.0.0.1:2")) == 2


def test_one_exposed_address_among_others_is_found() -> None:
    assert "0.0.0.0:2" in refusal("127.0.0.1:1", "0.0.0.0:2")


@pytest.mark.parametrize(
    "address",
    ["", "50051", ":50051", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "::1:50051", "[::1]", "[]:1",
     "[localhost]:1", "http://127.0.0.1:1", "127.0.0.1:1/x", "127.0.0.1:1 ", "a..b:1", "[127.0.0.1]:1\n"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_the_form(address: str) -> None:
    message = refusal(address)
    assert repr(address) in message
    assert "write host:port or [IPv6 address]:port" in message


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    # Digits only after the colon, or a resolver would be asked for whatever hypothesis thinks of.
    with pytest.raises(ConfigError, match=r"server\.tcp has"):
        find(text.replace(":", "") + ":port")


def test_a_unix_socket_is_never_exposed() -> None:
    (listener,) = find(unix_socket=Path("/run/hearth/a b%41.sock"))
    assert not listener.is_exposed
    assert listener.text == "unix:///run/hearth/a b%41.sock"
    assert listener.target == "unix:/run/hearth/a%20b%2541.sock"


def test_metrics_are_for_this_machine_unless_somebody_means_otherwise() -> None:
    assert find_metrics_listeners(MetricsConfig()) == ()
    (found,) = find_metrics_listeners(MetricsConfig(address="127.0.0.1:9464"))
    assert (found.target, found.is_exposed) == ("127.0.0.1:9464", False)
    for address in ("0.0.0.0:9464", "[::]:9464", "192.168.1.7:9464"):
        with pytest.raises(ConfigError, match=r"metrics\.address is .* asks for no credential.*allow_lan = true"):
            find_metrics_listeners(MetricsConfig(address=address))
        assert find_metrics_listeners(MetricsConfig(address=address, allow_lan=True))[0].is_exposed
    with pytest.raises(ConfigError, match=r"metrics\.address has '9464'; write host:port"):
        find_metrics_listeners(MetricsConfig(address="9464"))


@pytest.mark.parametrize(
    ("tcp", "metrics", "is_refused"),
    [
        ("127.0.0.1:9464", "127.0.0.1:9464", True),
        ("127.0.0.1:9464", "localhost:9464", True),
        ("127.0.0.1:9464", "127.0.0.1:9465", False),
        ("127.0.0.1:9464", "127.0.0.2:9464", False),
        ("0.0.0.0:9464", "127.0.0.1:9464", True),
        ("127.0.0.1:9464", "0.0.0.0:9464", True),
        ("127.0.0.1:0", "127.0.0.1:0", False),
    ],
)
def test_metrics_have_a_port_of_their_own(tmp_path: Path, tcp: str, metrics: str, is_refused: bool) -> None:
    server = ServerConfig(unix_socket=tmp_path / "socket", tcp=(tcp,), allow_insecure_lan=True)
    taken = find_listeners(server, TlsConfig(), AuthConfig())
    config = MetricsConfig(address=metrics, allow_lan=True)
    if is_refused:
        with pytest.raises(ConfigError, match=rf"metrics\.address is {metrics}, and server\.tcp has {tcp}"):
            find_metrics_listeners(config, taken)
    else:
        assert find_metrics_listeners(config, taken)
