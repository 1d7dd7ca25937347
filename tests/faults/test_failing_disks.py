"""A disk that is full, read-only or dead under a daemon's files: who could call still can, and what fails is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from ext4_disk import Disk

from bundles import write_bundle
from hearthd.access.tokens import create_token, list_tokens, revoke_token
from hearthd.audit import audit_log
from hearthd.bundles.store import Store
from hearthd.errors import ConfigError
from serving import answer, asynchronous, chat_request, make_config, serving, tcp_target, warnings_of
from tls_files import TlsFiles, make_tls_files

WARNED = {
    "full": "auth.usage_file: its disk is full",
    "read-only": "auth.usage_file: its disk is mounted read-only",
    "dead": "auth.token_file cannot be read (Input/output error), the 1 tokens read before stay valid",
}
SAID = {"full": "No space left on device", "read-only": "Read-only file system", "dead": "Input/output error"}


@pytest.fixture(params=SAID)
def fault(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def strike(disk: Disk, fault: str) -> None:
    match fault:
        case "full":
            disk.fill()
        case "read-only":
            disk.remount("ro")
        case "dead":
            disk.cut_power()


def repair(disk: Disk, fault: str) -> None:
    match fault:
        case "full":
            (disk.path / "ballast").unlink()
        case "read-only":
            disk.remount("rw")
        case "dead":
            disk.unmount()
            disk.mount()


async def ask(target: str, files: TlsFiles, token: str) -> str:
    """Ask over a new connection: certificate and token are both looked at."""
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(AUTHORITY[files.ca]), grpc.access_token_call_credentials(token)
    )
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.secure_channel(target, credentials, options) as channel:
        text, _ = await answer(channel, chat_request())
    return text


AUTHORITY: dict[Path, bytes] = {}


@asynchronous
async def test_a_disk_that_fails_under_tokens_and_certificates_ends_no_service(
    disk: Disk, fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, figure: Callable[[str], None]
) -> None:
    files = make_tls_files(disk.path)
    AUTHORITY[files.ca] = files.ca.read_bytes()
    token_file = disk.path / "tokens"
    token = create_token(token_file, "kitchen")
    disk.sync()
    config = make_config(
        tmp_path,
        tls={"certificate": files.certificate, "key": files.key},
        auth={"token_file": token_file, "usage_file": disk.path / "usage.json"},
    )
    async with serving(config) as server:
        target = tcp_target(server)
        expected = await ask(target, files, token)
        assert await warnings_of(server) == []
        # Not read again before the fault: the daemon has to look, and finds what the fault left of it.
        create_token(token_file, "guest")
        strike(disk, fault)
        for change in (create_token, revoke_token):
            with pytest.raises(ConfigError, match=SAID[fault]):
                change(token_file, "late" if change is create_token else "kitchen")
        answers = [await ask(target, files, token) for _ in range(10)]
        assert answers == [expected] * 10
        if fault == "dead":
            assert caplog.text.count("cannot be read") == 1
            assert "the 1 tokens read before stay valid: Input/output error" in caplog.text
        assert WARNED[fault] in "\n".join(await warnings_of(server))
        repair(disk, fault)
        late = create_token(token_file, "late")
        assert await ask(target, files, late) == expected
        assert await warnings_of(server) == []
        revoke_token(token_file, "kitchen")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(target, files, token)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert [each.name for each in list_tokens(token_file)] == ["guest", "late"]
    figure("10 of 10 chats over new TLS connections answered; tokens changed again after the repair")


@asynchronous
async def test_an_audit_log_on_a_full_disk_is_a_warning_until_there_is_room_again(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "_SYNC_SECONDS", 0.01)
    async with serving(make_config(tmp_path, audit={"file": disk.path / "audit.jsonl"})) as server:

        async def warn() -> set[str]:
            return {line.partition(",")[0] for line in await warnings_of(server)}

        assert await warn() == set()
        ballast = disk.fill()
        # Each question is a line of the log. What is on the disk already may take a few more.
        while "audit.file cannot be written (No space left on device)" not in (warned := await warn()):
            pass
        assert any(line.startswith("audit.file: its disk is full") for line in warned)
        ballast.unlink()
        while await warn():
            pass
    assert '"lost":' in (disk.path / "audit.jsonl").read_text()


@asynchronous
async def test_while_a_disk_fails_a_wrong_token_is_still_wrong(disk: Disk, tmp_path: Path) -> None:
    files = make_tls_files(tmp_path)
    AUTHORITY[files.ca] = files.ca.read_bytes()
    create_token(disk.path / "tokens", "kitchen")
    disk.sync()
    config = make_config(
        tmp_path, tls={"certificate": files.certificate, "key": files.key}, auth={"token_file": disk.path / "tokens"}
    )
    async with serving(config) as server:
        disk.cut_power()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(tcp_target(server), files, "hearth_wrong")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_disk_that_fails_under_an_installation_leaves_the_old_model(disk: Disk, fault: str, tmp_path: Path) -> None:
    for name, seed in (("old", 1), ("new", 2)):
        write_bundle(tmp_path / name, seed=seed)
    store = Store(disk.path / "models")

    def install(name: str) -> None:
        with store.installing("tiny") as directory:
            for path in sorted((tmp_path / name).iterdir()):
                shutil.copyfile(path, directory / path.name)

    install("old")
    old = store.open("tiny").manifest.to_json()
    disk.sync()
    strike(disk, fault)
    with pytest.raises(Exception, match=SAID[fault]):
        install("new")
    if fault != "dead":
        assert store.open("tiny").manifest.to_json() == old
    repair(disk, fault)
    assert store.open("tiny").manifest.to_json() == old
    install("new")
    assert store.open("tiny").manifest.to_json() != old
    assert sorted(path.name for path in store.directory.iterdir()) == [".hearthd.lock", "tiny"]
