"""Client certificates: who holds one is who it names, with a role, and TLS alone decides whether it is genuine."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import hearth
from hearth.v1 import status_pb2, status_pb2_grpc
from hearth_program import run
from hearthd.access.tokens import create_token, revoke_token
from hearthd.configuration.roles import Role
from hearthd.server import Server
from serving import answer, asynchronous, chat_request, make_config, serving, tcp_target
from tls_files import TlsFiles, make_tls_files

CODE = grpc.StatusCode
NAMES = (("phone.lan", "user"), ("tv.lan", "monitor"), ("Old Phone", "user"))


@dataclass(frozen=True)
class ClientFiles:
    certificate: bytes
    key: bytes


def issue(authority: TlsFiles, common_name: str, *names: str, ends: timedelta = timedelta(days=2)) -> ClientFiles:
    """Make a client's certificate, signed by the authority."""
    signer = serialization.load_pem_private_key(authority.ca.with_name("ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)]))
        .issuer_name(x509.load_pem_x509_certificate(authority.ca.read_bytes()).subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=30))
        .not_valid_after(now + ends)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False)
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return ClientFiles(builder.sign(signer, hashes.SHA256()).public_bytes(pem), key.private_bytes(pem, *plain))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls_files(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def phone(authority: TlsFiles) -> ClientFiles:
    return issue(authority, "somebody", "phone.lan", "phone.local")


@asynccontextmanager
async def daemon(directory: Path, authority: TlsFiles, **sections: Any) -> AsyncIterator[Server]:
    """Run a daemon that is open to the network for whoever holds a certificate."""
    config = make_config(
        directory,
        **{
            "server": {"tcp": ("0.0.0.0:0",)},
            "tls": {"certificate": authority.certificate, "key": authority.key, "clients": authority.ca},
            "auth": {"certificates": NAMES},
        }
        | sections,
    )
    async with serving(config) as server:
        yield server


def connect(server: Server, authority: TlsFiles, client: ClientFiles | None) -> grpc.aio.Channel:
    pair = (client.key, client.certificate) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes(), *pair)
    target = f"127.0.0.1:{tcp_target(server).rpartition(':')[2]}"
    return grpc.aio.secure_channel(target, credentials, options=[("grpc.use_local_subchannel_pool", 1)])


async def code_of(channel: grpc.aio.Channel, token: str | None = None) -> grpc.StatusCode:
    metadata = (("authorization", f"Bearer {token}"),) if token else None
    call = status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest(), metadata=metadata)
    return await call.code()


@asynchronous
async def test_a_certificate_names_its_holder_and_the_configuration_says_the_role(
    tmp_path: Path, authority: TlsFiles, phone: ClientFiles, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tv = issue(authority, "tv", "other.lan", "tv.lan")
    async with daemon(tmp_path, authority) as server:
        async with connect(server, authority, phone) as channel:
            await answer(channel, chat_request())
            assert " of phone.lan: " in caplog.text
            _, final = await answer(channel, chat_request())
            assert final.usage.cached_prompt_tokens > 0
        async with connect(server, authority, phone) as channel:
            _, final = await answer(channel, chat_request())
            assert final.usage.cached_prompt_tokens > 0, "another connection of the same holder is another caller"
        async with connect(server, authority, tv) as channel:
            assert await code_of(channel) is CODE.OK
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer(channel, chat_request())
            assert caught.value.code() is CODE.PERMISSION_DENIED


@asynchronous
async def test_the_common_name_counts_only_where_there_is_no_other(tmp_path: Path, authority: TlsFiles) -> None:
    """RFC 6125: otherwise a name that the authority never meant as a host would do."""
    old = issue(authority, "Old Phone")
    sly = issue(authority, "phone.lan", "sly.lan")
    async with daemon(tmp_path, authority) as server:
        async with connect(server, authority, old) as channel:
            assert await code_of(channel) is CODE.OK
        async with connect(server, authority, sly) as channel:
            assert await code_of(channel) is CODE.UNAUTHENTICATED


@asynchronous
async def test_without_a_certificate_of_the_authority_there_is_no_connection(
    tmp_path: Path, authority: TlsFiles
) -> None:
    (tmp_path / "other").mkdir()
    other = make_tls_files(tmp_path / "other")
    forged = issue(other, "phone", "phone.lan")
    expired = issue(authority, "phone", "phone.lan", ends=timedelta(days=-1))
    async with daemon(tmp_path, authority) as server:
        for client in (None, forged, expired):
            async with connect(server, authority, client) as channel:
                assert await code_of(channel) is CODE.UNAVAILABLE


@asynchronous
async def test_a_genuine_certificate_that_nobody_has_named_is_told_what_everybody_is_told(
    tmp_path: Path, authority: TlsFiles
) -> None:
    stranger = issue(authority, "stranger", "stranger.lan")
    async with daemon(tmp_path, authority) as server, connect(server, authority, stranger) as channel:
        for method in ("hearth.v1.StatusService/GetStatus", "grpc.health.v1.Health/Check", "x/y"):
            call = channel.unary_unary(f"/{method}")(b"")
            assert await call.code() is CODE.UNAUTHENTICATED
            assert (await call.details()).startswith("no valid credential: ")


@asynchronous
async def test_a_token_says_more_than_a_certificate_and_a_wrong_one_is_refused(
    tmp_path: Path, authority: TlsFiles, phone: ClientFiles
) -> None:
    tokens = tmp_path / "tokens"
    token = create_token(tokens, "kitchen", role="nothing")
    auth = {"certificates": NAMES, "token_file": tokens}
    roles = {"nothing": Role(methods=())}
    async with (
        daemon(tmp_path, authority, auth=auth, roles=roles) as server,
        connect(server, authority, phone) as channel,
    ):
        assert await code_of(channel) is CODE.OK
        assert await code_of(channel, token) is CODE.PERMISSION_DENIED
        revoke_token(tokens, "kitchen")
        assert await code_of(channel, token) is CODE.UNAUTHENTICATED
        assert await code_of(channel) is CODE.OK


@asynchronous
async def test_a_name_that_is_taken_out_ends_at_the_next_call_of_an_open_connection(
    tmp_path: Path, authority: TlsFiles, phone: ClientFiles
) -> None:
    async with daemon(tmp_path, authority) as server, connect(server, authority, phone) as channel:
        assert await code_of(channel) is CODE.OK
        # The last one, too: an empty table is no open door.
        for names in (NAMES[1:], ()):
            config = make_config(tmp_path, auth={"certificates": names})
            server._parts.authenticator.update(config.auth, config.roles)
            assert await code_of(channel) is CODE.UNAUTHENTICATED


@asynchronous
async def test_a_certificate_that_ends_ends_at_the_next_call_of_an_open_connection(
    tmp_path: Path, authority: TlsFiles
) -> None:
    """The handshake was good, and gRPC looks at it once."""
    guest = issue(authority, "guest", "phone.lan", ends=timedelta(hours=1))
    async with daemon(tmp_path, authority) as server, connect(server, authority, guest) as channel:
        assert await code_of(channel) is CODE.OK
        now = datetime.now(UTC).timestamp()
        server._parts.authenticator._clock._wall = lambda: now + 3590
        assert await code_of(channel) is CODE.OK
        server._parts.authenticator._clock._wall = lambda: now + 3601
        assert await code_of(channel) is CODE.UNAUTHENTICATED
        # Whoever sets the clock back does not bring it back to life.
        server._parts.authenticator._clock._wall = lambda: now
        assert await code_of(channel) is CODE.UNAUTHENTICATED


@asynchronous
async def test_limits_are_those_of_the_holder(tmp_path: Path, authority: TlsFiles, phone: ClientFiles) -> None:
    roles = {"user": Role(requests_per_minute=2)}
    async with daemon(tmp_path, authority, roles=roles) as server:
        for expected in (CODE.OK, CODE.OK, CODE.RESOURCE_EXHAUSTED):
            async with connect(server, authority, phone) as channel:
                assert await code_of(channel) is expected


# Hearth's own client.


@pytest.fixture
def own(tmp_path: Path, phone: ClientFiles) -> dict[str, str]:
    paths = {"cert": tmp_path / "phone.pem", "key": tmp_path / "phone.key"}
    paths["cert"].write_bytes(phone.certificate)
    paths["key"].write_bytes(phone.key)
    return {name: str(path) for name, path in paths.items()}


@asynccontextmanager
async def with_clients_crt(directory: Path, authority: TlsFiles) -> AsyncIterator[str]:
    """The address of a daemon as docs/pairing.md describes it: three files in one directory."""
    tls = directory / "tls"
    tls.mkdir()
    for name, path in (
        ("server.crt", authority.certificate),
        ("server.key", authority.key),
        ("clients.crt", authority.ca),
    ):
        shutil.copy(path, tls / name)
    async with daemon(directory, authority, tls={"directory": tls}) as server:
        yield f"127.0.0.1:{tcp_target(server).rpartition(':')[2]}"


@asynchronous
async def test_the_clients_show_their_certificate(tmp_path: Path, authority: TlsFiles, own: dict[str, str]) -> None:
    options: hearth.ClientOptions = {"ca": authority.ca, "cert": own["cert"], "key": own["key"]}
    async with with_clients_crt(tmp_path, authority) as address:
        async with hearth.AsyncClient(address, **options) as client:
            assert (await client.chat("hello")).text

        def ask() -> str:
            with hearth.Client(address, **options) as client:
                return client.chat("hello").text

        assert await asyncio.to_thread(ask)


@asynchronous
async def test_the_program_shows_its_certificate(tmp_path: Path, authority: TlsFiles, own: dict[str, str]) -> None:
    async with with_clients_crt(tmp_path, authority) as address:
        words = ("ask", "--address", address, "--ca", str(authority.ca), "--wait", "0", "hello")
        by_option = await asyncio.to_thread(run, *words, "--cert", own["cert"], "--key", own["key"])
        assert (by_option.returncode, by_option.stdout != b"") == (0, True), by_option.stderr
        by_environment = await asyncio.to_thread(run, *words, HEARTH_CERT=own["cert"], HEARTH_KEY=own["key"])
        assert by_environment.returncode == 0, by_environment.stderr
        without = await asyncio.to_thread(run, *words)
        assert without.returncode == 1
        assert b"or a certificate of its callers (then name yours and its key)" in without.stderr
