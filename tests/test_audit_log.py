"""The audit log's file: whole lines, bounded, private, and never a reason for a call to fail."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hearthd.audit import audit_log
from hearthd.audit.audit_log import AuditLog
from hearthd.errors import ConfigError


@contextmanager
def open_log(path: Path, **options: Any) -> Iterator[AuditLog]:
    log = AuditLog(path, **{"max_bytes": 10_000, "num_old_files": 2} | options)
    try:
        yield log
    finally:
        log.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_stand_in_order_in_a_file_of_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with open_log(path) as log:
        for number in range(5):
            log.write({"number": number})
    assert [line["number"] for line in lines(path)] == [0, 1, 2, 3, 4]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with open_log(path) as log:
        log.write({"number": 5})
    assert lines(path)[-1] == {"number": 5}


def test_size_is_bounded_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with open_log(path, max_bytes=1000) as log:
        for number in range(400):
            log.write({"number": number})
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(file.stat().st_size <= 1000 for file in files)
    numbers = [line["number"] for file in (files[2], files[1], files[0]) for line in lines(file)]
    assert numbers == list(range(numbers[0], 400))
    with open_log(path, max_bytes=1000, num_old_files=0) as log:
        for number in range(100):
            log.write({"number": number})
    assert path.stat().st_size <= 1000


def test_half_a_line_that_a_power_cut_left_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"number": 0}\n{"num')
    path.chmod(0o644)
    with open_log(path) as log:
        log.write({"number": 1})
    assert path.read_text().splitlines() == ['{"number": 0}', '{"num', '{"number":1}']
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with open_log(path) as log:
        path.rename(tmp_path / "rotated")
        log.write({"number": 1})
    assert lines(path) == [{"number": 1}]


class FullDisk:
    """os.fdatasync, and whether the disk has room. A real full disk fails here, or in write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = True
        self.has_failed = threading.Event()
        self.has_worked = threading.Event()
        monkeypatch.setattr(audit_log.os, "fdatasync", self)  # type: ignore[attr-defined]
        monkeypatch.setattr(audit_log, "_SYNC_SECONDS", 0.01)

    def __call__(self, descriptor: int) -> None:
        if self.is_full:
            self.has_failed.set()
            raise OSError(28, "No space left on device")
        self.has_worked.set()


def test_full_disk_costs_lines_that_are_counted_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, disk = tmp_path / "audit.jsonl", FullDisk(monkeypatch)
    with open_log(path) as log:
        log.write({"number": 0})
        assert disk.has_failed.wait(10)
        for number in range(1, 8):
            log.write({"number": number})
        disk.is_full = False
        log.write({"number": 8})
        assert disk.has_worked.wait(10)
    found = lines(path)
    lost = sum(line.get("lost", 0) for line in found)
    numbers = [line["number"] for line in found if "number" in line]
    assert numbers == list(range(lost, 9))
    assert lost >= 1
    assert [record.getMessage() for record in caplog.records] == [
        f"audit file {path} cannot be written, calls go on: No space left on device",
        f"audit file {path} is written again",
    ]


def test_disk_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, is_hanging = threading.Event(), threading.Event()

    def hang(descriptor: int) -> None:
        is_hanging.set()
        release.wait(30)

    monkeypatch.setattr(audit_log.os, "fdatasync", hang)  # type: ignore[attr-defined]
    monkeypatch.setattr(audit_log, "_CLOSE_SECONDS", 0.05)
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=10_000, num_old_files=0)
    try:
        log.write({"number": 0})
        assert is_hanging.wait(10)
        for number in range(5000):
            log.write({"number": number})
        log.close()
    finally:
        release.set()


@pytest.mark.parametrize("kind", ["directory", "missing", "link", "fifo"])
def test_file_that_cannot_be_one_is_refused_at_the_start(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "audit.jsonl"
    match kind:
        case "directory":
            path.mkdir()
        case "missing":
            path = tmp_path / "no/audit.jsonl"
        case "link":
            path.symlink_to("/dev/null")
        case "fifo":
            os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"^audit file .*audit\.jsonl cannot be written: "):
        AuditLog(path, max_bytes=10_000, num_old_files=0)
