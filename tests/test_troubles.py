"""What `hearth status` warns of: each trouble in one line with what helps, and nothing of it when it is over."""

import asyncio
import logging
import queue
from dataclasses import replace
from pathlib import Path

import pytest

from hearthd.access.daily_usage import DailyUsage
from hearthd.access.tokens import TokenFile, create_token
from hearthd.audit import audit_log
from hearthd.audit.audit_log import AuditLog
from hearthd.configuration.config import Config
from hearthd.errors import ConfigError
from hearthd.life.reload import Reload
from hearthd.listening.tls import CertificateSource
from hearthd.listening.tls import TlsFiles as ServerFiles
from hearthd.watching.troubles import Troubles, find_disk_trouble
from serving import asynchronous, make_config, serving, warnings_of
from tls_files import make_tls_files


@asynchronous
async def test_a_token_file_that_is_gone_is_told_until_it_is_back(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    create_token(tokens, "kitchen")
    async with serving(make_config(tmp_path, auth={"token_file": tokens})) as server:
        assert await warnings_of(server) == []
        tokens.rename(tmp_path / "elsewhere")
        for _ in range(2):
            (warned,) = await warnings_of(server)
            assert warned == (
                "auth.token_file cannot be read (No such file or directory), no token is valid; put it right, "
                "`hearthd doctor` helps"
            )
        (tmp_path / "elsewhere").rename(tokens)
        assert await warnings_of(server) == []


def test_a_line_that_is_no_token_is_told_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    create_token(path, "kitchen")
    tokens, good = TokenFile(path), path.read_text()
    path.write_text(f"{good}nonsense\n")
    assert tokens.find_problem() == (
        "auth.token_file: line 3 let nobody in; take them out, and create those tokens anew"
    )
    path.write_text(good)
    assert tokens.find_problem() is None


def test_certificates_that_cannot_be_read_are_told_until_they_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = make_tls_files(tmp_path)
    source = CertificateSource(ServerFiles(files.certificate, files.key))
    files.key.rename(tmp_path / "elsewhere")
    for _ in range(3):
        assert source.find_problem() == (
            "tls.key cannot be read (No such file or directory), the last good TLS certificate stays; put it right, "
            "`hearthd doctor` helps"
        )
    (tmp_path / "elsewhere").rename(files.key)
    assert source.find_problem() is None
    # A disk that fails while the files are read, and has the very same files when it is well again.
    files.key.touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", _fail)
        for _ in range(3):
            assert "tls.certificate cannot be read (Input/output error)" in (source.find_problem() or "")
    assert source.find_problem() is None
    assert caplog.text.count("is not used") == 2


def _fail(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


def test_usage_that_cannot_be_written_is_told_until_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    daily = DailyUsage(tmp_path / "state/usage.json")
    daily.add("token:phone", 1)
    assert daily.find_problem() is None
    asyncio.run(daily.save())
    assert (daily.find_problem() or "").startswith("auth.usage_file cannot be written (")
    (tmp_path / "state").unlink()
    asyncio.run(daily.save())
    assert daily.find_problem() is None


@asynchronous
async def test_an_audit_log_that_loses_lines_is_told_until_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "_SYNC_SECONDS", 0.01)
    path = tmp_path / "audit.jsonl"
    async with serving(make_config(tmp_path, audit={"file": path})) as server:
        assert await warnings_of(server) == []
        path.unlink()
        path.mkdir()
        # Each question is a line, which is lost.
        while not (warned := await warnings_of(server)):
            pass
        assert warned[0].startswith("audit.file cannot be written (Is a directory), calls go on and ")
        assert "lines are lost so far" in warned[0]
        path.rmdir()
        while await warnings_of(server):
            pass


class Told(logging.Handler):
    """Waits for what the journal is told."""

    def __init__(self) -> None:
        super().__init__()
        self._records: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._records.put(record.getMessage())

    def next(self) -> str:
        return self._records.get(timeout=10)


def test_an_audit_log_is_tried_again_without_new_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "_SYNC_SECONDS", 0.01)
    monkeypatch.setattr(audit_log, "_RETRY_SECONDS", 0.01)
    told = Told()
    monkeypatch.setattr(logging.getLogger("hearthd.audit.audit_log"), "handlers", [told])
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=10_000, num_old_files=0)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(audit_log.os, "fdatasync", _fail)  # type: ignore[attr-defined]
            log.write({"number": 0})
            assert "cannot be written" in told.next()
            found = log.find_problem() or ""
            assert found.startswith("audit.file cannot be written (Input/output error), calls go on and 1 lines are")
        assert "is written again" in told.next()
        assert log.find_problem() is None
    finally:
        log.close()
    assert (tmp_path / "audit.jsonl").read_text() == '{"lost":1}\n'


@asynchronous
async def test_a_new_configuration_that_is_refused_is_told_until_one_is_taken(tmp_path: Path) -> None:
    old = make_config(tmp_path)
    new: list[Config | ConfigError] = [ConfigError("log.level is 'loud'"), replace(old)]

    def load() -> Config:
        if isinstance(found := new.pop(0), ConfigError):
            raise found
        return found

    reload = Reload(old, load, ())
    assert reload.find_problem() is None
    await reload.run()
    assert "`hearthd check-config` says why" in (reload.find_problem() or "")
    await reload.run()
    assert reload.find_problem() is None


def test_only_disks_that_the_daemon_writes_to_are_looked_at(tmp_path: Path) -> None:
    assert Troubles([lambda: None, lambda: "a line"], {"audit.file": None}).find() == ["a line"]
    assert Troubles([], {"audit.file": tmp_path / "not/yet/there"}).find() == []
    # /proc is a file system without blocks, as a full one is; /sys may be read-only or not.
    assert "audit.file: its disk is full (0 KiB left)" in (find_disk_trouble("audit.file", Path("/proc/x")) or "")
