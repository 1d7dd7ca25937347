"""TLS: a certificate that fits, that is followed when it changes, and that stays when the new one is broken."""

import asyncio
import subprocess
from pathlib import Path

import grpc
import pytest

from hearth.v1 import status_pb2, status_pb2_grpc
from hearthd.errors import ConfigError
from hearthd.tls import TlsFiles as ServerFiles
from hearthd.tls import find_exposure, read_certificate
from hearthd.tokens import create_token
from serving import answer, asynchronous, chat_request, make_config, serving, tcp_target
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
    with pytest.raises(ConfigError, match="KEY_VALUES_MISMATCH"):
        read_certificate(ServerFiles(files.certificate, other_files.key))


def test_files_that_are_not_there_or_not_pem_are_refused_by_name(tmp_path: Path, files: TlsFiles) -> None:
    with pytest.raises(ConfigError, match=r"tls\.certificate: .*/none cannot be read: No such file"):
        read_certificate(ServerFiles(tmp_path / "none", files.key))
    with pytest.raises(ConfigError, match=r"tls\.key: .*/none cannot be read: No such file"):
        read_certificate(ServerFiles(files.certificate, tmp_path / "none"))
    (tmp_path / "text").write_text("not PEM")
    with pytest.raises(ConfigError, match="are not a PEM certificate and its PEM key"):
        read_certificate(ServerFiles(tmp_path / "text", files.key))


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(tmp_path: Path, files: TlsFiles) -> None:
    encrypted = tmp_path / "encrypted.key"
    subprocess.run(
        ["openssl", "ec", "-in", files.key, "-out", encrypted, "-aes256", "-passout", "pass:secret"],
        check=True,
        capture_output=True,
    )
    with pytest.raises(ConfigError, match="has a passphrase"):
        read_certificate(ServerFiles(files.certificate, encrypted))
