"""kill -9 and a power cut at any step of what is written: the old state is found, or the new one, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ext4_disk
import pytest
from durable_work import WORKS

FELL = Path(__file__).with_name("fell.py")


def fell(work: str, way: str, count: int, directory: Path) -> dict[str, Any]:
    command = [sys.executable, str(FELL), work, way, str(count), "23", str(directory)]
    if way != "kill":
        if reason := ext4_disk.missing():
            pytest.skip(reason)
        # In a mount namespace of its own: whatever happens to the program, no mount is left.
        command = ["unshare", "--mount", *command]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + 2 * count,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("way", ["kill", "power"])
@pytest.mark.parametrize("work", WORKS)
def test_felled_at_any_step_the_old_or_the_new_state_is_found(
    work: str, way: str, tmp_path: Path, rounds: int, figure: Callable[[str], None]
) -> None:
    report = fell(work, way, rounds, tmp_path)
    figure(f"{report['felled']} times at any of {report['steps']} steps: {report['outcomes']}")
    assert report["wrong"] == []
    assert sum(report["outcomes"].values()) == rounds


@pytest.mark.parametrize("unsynced", ["files", "directories"])
@pytest.mark.parametrize("work", ["install-model", "create-token"])
def test_a_cut_takes_what_was_not_written_through(work: str, unsynced: str, tmp_path: Path) -> None:
    """The control: leave out one kind of fsync, and the same cuts do lose or damage something."""
    assert fell(work, f"power-unsynced-{unsynced}", 11, tmp_path)["wrong"]
