"""TLS: a certificate that fits, that is followed when it changes, and that stays when the new one is broken."""

import asyncio
import ssl
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from hearth.v1 import status_pb2, status_pb2_grpc
from hearthd.access.tokens import create_token
from hearthd.errors import ConfigError
from hearthd.listening.tls import CertificateSource, find_exposure, read_certificate
from hearthd.listening.tls import TlsFiles as ServerFiles
from serving import answer, asynchronous, chat_request, make_config, serving, tcp_target, warnings_of
from tls_files import TlsFiles, make_tls_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls_files(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def other_files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls_files(tmp_path_factory.mktemp("second"))


def copy(files: TlsFiles, directory: Path) -> TlsFiles:
    """Put certificate and key where a renewal would put them, each in place of the old one."""
    for source in (files.certificate, files.key):
        (directory / "new").write_bytes(source.read_bytes())
        (directory / "new").replace(directory / source.name)
    return TlsFiles(files.ca, directory / files.certificate.name, directory / files.key.name)


async def trusts(target: str, ca: Path) -> bool:
    """Whether a new connection is accepted by somebody who trusts this authority."""
    credentials = grpc.ssl_channel_credentials(ca.read_bytes())  # noqa: ASYNC240 - a test's own small file
    # Otherwise gRPC reuses a connection of this process.
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100))
    async with grpc.aio.secure_channel(target, credentials, options) as channel:
        call = status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest())
        code = await call.code()
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    return code is grpc.StatusCode.OK


@asynchronous
async def test_a_caller_with_the_authority_and_a_token_is_answered(tmp_path: Path, files: TlsFiles) -> None:
    token = create_token(tmp_path / "tokens", "kitchen")
    config = make_config(
        tmp_path,
        server={"tcp": ("0.0.0.0:0",)},
        tls={"certificate": files.certificate, "key": files.key},
        auth={"token_file": tmp_path / "tokens"},
    )
    async with serving(config) as server:
        target = f"127.0.0.1:{tcp_target(server).rpartition(':')[2]}"
        credentials = grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(files.ca.read_bytes()), grpc.access_token_call_credentials(token)
        )
        async with grpc.aio.secure_channel(target, credentials) as channel:
            text, _ = await answer(channel, chat_request())
            assert text
        async with grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(files.ca.read_bytes())) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer(channel, chat_request())
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        async with grpc.aio.insecure_channel(target) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer(channel, chat_request())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@asynchronous
async def test_a_renewed_certificate_is_used_and_a_broken_one_is_not(
    tmp_path: Path, files: TlsFiles, other_files: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    current = copy(files, tmp_path)
    config = make_config(tmp_path, tls={"certificate": current.certificate, "key": current.key})
    async with serving(config) as server:
        target = tcp_target(server)
        assert await trusts(target, files.ca)
        assert not await trusts(target, other_files.ca)

        copy(other_files, tmp_path)
        assert await trusts(target, other_files.ca)
        assert not await trusts(target, files.ca)

        current.certificate.write_text("broken")
        assert await trusts(target, other_files.ca)
        assert "the new certificate is not used, the last good one stays" in caplog.text

        current.key.unlink()
        assert await trusts(target, other_files.ca)

        copy(files, tmp_path)
        assert await trusts(target, files.ca)


@asynchronous
async def test_calls_under_way_outlive_a_renewal(tmp_path: Path, files: TlsFiles, other_files: TlsFiles) -> None:
    current = copy(files, tmp_path)
    config = make_config(tmp_path, tls={"certificate": current.certificate, "key": current.key})
    credentials = grpc.ssl_channel_credentials(files.ca.read_bytes())
    async with serving(config) as server, grpc.aio.secure_channel(tcp_target(server), credentials) as channel:
        await answer(channel, chat_request())
        copy(other_files, tmp_path)
        assert await trusts(tcp_target(server), other_files.ca)
        await asyncio.gather(*(answer(channel, chat_request(str(number))) for number in range(3)))


def fill_directory(directory: Path, files: TlsFiles) -> Path:
    """Put the files under the names that tls.directory wants, each in place of the old one."""
    directory.mkdir(exist_ok=True)
    for source, name in ((files.certificate, "server.crt"), (files.key, "server.key")):
        put(directory / name, source.read_bytes())
    return directory


def put(path: Path, data: bytes) -> None:
    (path.parent / "new").write_bytes(data)
    (path.parent / "new").replace(path)


@asynchronous
async def test_certificates_that_rotate_under_load_fail_no_call(tmp_path: Path) -> None:
    """Thirty renewals while four callers open a connection for each call and two keep theirs."""
    # One authority, so that every caller can trust the old and the new.
    sets = [make_tls_files(tmp_path / name) for name in ("a", "b") if not (tmp_path / name).mkdir()]
    trusted = b"".join(files.ca.read_bytes() for files in sets)
    directory = fill_directory(tmp_path / "tls", sets[0])
    config = make_config(tmp_path, tls={"directory": directory}, server={"max_connections": 256})
    num_calls, is_over, counted = 0, asyncio.Event(), asyncio.Condition()

    async def call_over(channel: grpc.aio.Channel) -> None:
        nonlocal num_calls
        try:
            await status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest(), timeout=20)
            num_calls += 1
        except grpc.aio.AioRpcError:
            is_over.set()
            raise
        finally:
            async with counted:
                counted.notify_all()

    async def reach(least: int) -> None:
        async with counted:
            await counted.wait_for(lambda: num_calls >= least or is_over.is_set())

    def open_channel(target: str) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(trusted)
        return grpc.aio.secure_channel(target, credentials, [("grpc.use_local_subchannel_pool", 1)])

    async def come_and_go(target: str) -> None:
        while not is_over.is_set():
            async with open_channel(target) as channel:
                await call_over(channel)

    async def stay(target: str) -> None:
        async with open_channel(target) as channel:
            while not is_over.is_set():
                await call_over(channel)

    async with serving(config) as server:
        target = tcp_target(server)
        callers = [asyncio.create_task(come_and_go(target)) for _ in range(4)]
        callers += [asyncio.create_task(stay(target)) for _ in range(2)]
        for number in range(1, 31):
            before = num_calls
            # As a renewal does it: one file after the other, with calls in between.
            files = sets[number % 2]
            put(directory / "server.key", files.key.read_bytes())
            await reach(before + 6)
            put(directory / "server.crt", files.certificate.read_bytes())
            await reach(before + 12)
        is_over.set()
        # Raises what any call raised.
        await asyncio.gather(*callers)
        assert await trusts(target, sets[0].ca)
        assert not await trusts(target, sets[1].ca)
    assert num_calls >= 30 * 12


@asynchronous
async def test_key_and_certificate_of_two_pairs_are_never_used_together(
    tmp_path: Path, files: TlsFiles, other_files: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    directory = fill_directory(tmp_path / "tls", files)
    async with serving(make_config(tmp_path, tls={"directory": directory})) as server:
        target = tcp_target(server)
        put(directory / "server.key", other_files.key.read_bytes())
        assert await trusts(target, files.ca)
        assert "the key is that of another certificate" in caplog.text
        assert await warnings_of(server) == [
            "the renewed TLS certificate is not used, the last good one is; the journal says why"
        ]
        put(directory / "server.crt", other_files.certificate.read_bytes())
        assert await trusts(target, other_files.ca)
        assert not await trusts(target, files.ca)
        assert await warnings_of(server) == []


def test_what_is_proved_is_what_is_used_even_if_the_files_change_meanwhile(
    tmp_path: Path, files: TlsFiles, other_files: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = fill_directory(tmp_path / "tls", files)
    paths = ServerFiles(directory / "server.crt", directory / "server.key")
    load = ssl.SSLContext.load_cert_chain

    def load_after_a_renewal(self: ssl.SSLContext, *arguments: Any, **named: Any) -> None:
        fill_directory(directory, other_files)
        load(self, *arguments, **named)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load_after_a_renewal)
    read = read_certificate(paths)
    assert (read.chain, read.key) == (files.certificate.read_bytes(), files.key.read_bytes())


def test_a_change_while_the_files_are_read_is_seen_the_next_time(
    tmp_path: Path, files: TlsFiles, other_files: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = fill_directory(tmp_path / "tls", files)
    source = CertificateSource(ServerFiles(directory / "server.crt", directory / "server.key"))
    first = source.fingerprint
    put(directory / "server.key", other_files.key.read_bytes())
    load = ssl.SSLContext.load_cert_chain

    def load_and_renew(self: ssl.SSLContext, *arguments: Any, **named: Any) -> None:
        monkeypatch.undo()
        put(directory / "server.crt", other_files.certificate.read_bytes())
        load(self, *arguments, **named)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load_and_renew)
    source.refresh()
    assert source.fingerprint == first
    assert source.problem
    source.refresh()
    assert source.fingerprint != first
    assert source.problem is None


def client_credentials(ca: TlsFiles, shown: TlsFiles | None) -> grpc.ChannelCredentials:
    if shown is None:
        return grpc.ssl_channel_credentials(ca.ca.read_bytes())
    return grpc.ssl_channel_credentials(ca.ca.read_bytes(), shown.key.read_bytes(), shown.certificate.read_bytes())


@asynchronous
async def test_with_an_authority_for_callers_only_those_with_its_certificates_connect(
    tmp_path: Path, files: TlsFiles, other_files: TlsFiles
) -> None:
    directory = fill_directory(tmp_path / "tls", files)
    put(directory / "clients.crt", other_files.ca.read_bytes())
    async with serving(make_config(tmp_path, tls={"directory": directory})) as server:
        for shown, code in ((None, "UNAVAILABLE"), (files, "UNAVAILABLE"), (other_files, "OK")):
            options = (("grpc.use_local_subchannel_pool", 1),)
            target = tcp_target(server)
            async with grpc.aio.secure_channel(target, client_credentials(files, shown), options) as channel:
                call = status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest())
                assert (await call.code()).name == code
        # Gone or broken, the authority that was there goes on: nobody is let in for want of a file.
        (directory / "clients.crt").unlink()
        async with grpc.aio.secure_channel(target, client_credentials(files, None), options) as channel:
            call = status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest())
            assert (await call.code()).name == "UNAVAILABLE"
        assert await warnings_of(server)


def test_an_authority_for_callers_that_is_none_is_refused(tmp_path: Path, files: TlsFiles) -> None:
    (tmp_path / "clients.crt").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"tls\.clients .*clients.crt holds no certificate"):
        read_certificate(ServerFiles(files.certificate, files.key, tmp_path / "clients.crt"))


def test_an_empty_directory_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.crt cannot be read: .* pair NAME` makes one, with --address"):
        read_certificate(ServerFiles(tmp_path / "server.crt", tmp_path / "server.key"))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_key_that_others_may_read_is_told_with_the_remedy(tmp_path: Path, files: TlsFiles, mode: int) -> None:
    key = copy(files, tmp_path).key
    key.chmod(mode)
    assert find_exposure(key) == (
        f"tls.key: key file {key} has mode {mode:04o}; others may read it; run: chmod 600 {key}"
    )


def test_a_key_of_its_owner_alone_is_not_told(tmp_path: Path, files: TlsFiles) -> None:
    key = copy(files, tmp_path).key
    key.chmod(0o600)
    assert find_exposure(key) is None
    assert find_exposure(tmp_path / "none") is None


@asynchronous
async def test_a_daemon_warns_of_a_key_that_others_may_read(
    tmp_path: Path, files: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    current = copy(files, tmp_path)
    config = make_config(tmp_path, tls={"certificate": current.certificate, "key": current.key})
    for mode, is_told in ((0o600, False), (0o644, True)):
        current.key.chmod(mode)
        async with serving(config):
            assert ("has mode 0644; others may read it" in caplog.text) is is_told


def test_a_key_of_another_certificate_is_refused(files: TlsFiles, other_files: TlsFiles) -> None:
    with pytest.raises(ConfigError, match="the key is that of another certificate"):
        read_certificate(ServerFiles(files.certificate, other_files.key))


def test_files_that_are_not_there_or_not_pem_are_refused_by_name(tmp_path: Path, files: TlsFiles) -> None:
    with pytest.raises(ConfigError, match=r"tls\.certificate: .*/none cannot be read: No such file"):
        read_certificate(ServerFiles(tmp_path / "none", files.key))
    with pytest.raises(ConfigError, match=r"tls\.key: .*/none cannot be read: No such file"):
        read_certificate(ServerFiles(files.certificate, tmp_path / "none"))
    (tmp_path / "text").write_text("not PEM")
    refused = "are not a PEM certificate and its PEM key: the {} holds no {}$"
    with pytest.raises(ConfigError, match=refused.format("first", "certificate")):
        read_certificate(ServerFiles(tmp_path / "text", files.key))
    with pytest.raises(ConfigError, match=refused.format("second", "key")):
        read_certificate(ServerFiles(files.certificate, tmp_path / "text"))
    with pytest.raises(ConfigError, match="holds no certificate of an authority in PEM form"):
        read_certificate(ServerFiles(files.certificate, files.key, tmp_path / "text"))


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(tmp_path: Path, files: TlsFiles) -> None:
    encrypted = tmp_path / "encrypted.key"
    subprocess.run(
        ["openssl", "ec", "-in", files.key, "-out", encrypted, "-aes256", "-passout", "pass:secret"],
        check=True,
        capture_output=True,
    )
    with pytest.raises(ConfigError, match="has a passphrase"):
        read_certificate(ServerFiles(files.certificate, encrypted))
