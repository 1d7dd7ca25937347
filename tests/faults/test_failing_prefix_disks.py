"""A disk that is full, read-only or dead under the stored prefixes: every answer is right, and it is said once."""

from __future__ import annotations

import logging

import pytest
from ext4_disk import Disk

from prefix_daemon import SYSTEM, Daemon, asked

SAID = {"full": "nearly full", "read-only": "Read-only file system", "dead": "Input/output error"}


def strike(disk: Disk, fault: str) -> None:
    match fault:
        case "full":
            disk.fill()
        case "read-only":
            disk.remount("ro")
        case "dead":
            disk.cut_power()


@pytest.mark.parametrize("fault", SAID)
@pytest.mark.parametrize("when", ["while it runs", "before the start"])
def test_answers_are_right_whatever_the_disk_does(
    disk: Disk, fault: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = disk.path / "prefixes"
    daemon = Daemon(directory)
    daemon.store_system()
    assert daemon.store.num_saved == 1
    disk.sync()
    strike(disk, fault)
    if when == "before the start":
        daemon = Daemon(directory)
    sequences = [asked([*SYSTEM, 4, 5, 6]), *(asked([number, *SYSTEM[1:], 4, 5, 6]) for number in (7, 8, 9))]
    # Each is compared with what the model gives alone.
    daemon.run(*sequences, *(asked([number, *SYSTEM[1:], 4, 5, 6]) for number in (7, 8, 9)))
    assert daemon.store.num_saved == (1 if when == "while it runs" else 0)
    assert SAID[fault] in str(daemon.store.problem)
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1
