"""The real model in a process that gets no more memory: what fails is an answer, or a start that is tried again."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hearth
from daemon_process import DaemonProcess, real
from hearth import Client
from hearthd.bundles.bundle import Bundle

pytestmark = pytest.mark.model

LONG = "word " * 1400
EXIT_FAULT = 70


def address_space(pid: int) -> int:
    """Bytes that a process has mapped, which is what RLIMIT_AS counts."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


@pytest.fixture
def daemon(tmp_path: Path, default_bundle: Bundle) -> Iterator[DaemonProcess]:
    # Large chunks of a prompt: one must not fit into what is free within the memory that the process has.
    options = {"HEARTHD_ENGINE_THREADS": "1", "HEARTHD_ENGINE_SOLO_PREFILL_CHUNK": "512"}
    with real(tmp_path, default_bundle.path.parent, **options) as daemon:
        daemon.wait_for("READY=1")
        yield daemon


def test_at_its_memory_limit_an_answer_fails_and_the_daemon_goes_on(
    daemon: DaemonProcess, figure: Callable[[str], None]
) -> None:
    with Client(f"unix://{daemon.socket_path}", max_retries=0) as client:
        expected = client.chat("Hello.", temperature=0, max_tokens=4).text
        limit = address_space(daemon.process.pid)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        # Where exactly memory ends is not the same each time: in the run, or in what the call itself needs.
        for _ in range(3):
            with pytest.raises(hearth.HearthError, match=r"incident|not a message"):
                client.chat(LONG, max_tokens=2)
        assert daemon.process.poll() is None
        resource.prlimit(daemon.process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert client.chat(LONG, max_tokens=2).usage.completion_tokens == 2
        assert client.chat("Hello.", temperature=0, max_tokens=4).text == expected
    figure("3 long prompts failed; when the limit was lifted they were answered, and a short one as before")


@pytest.mark.parametrize("short_by_mb", [200, 250])
def test_a_start_without_enough_memory_is_one_that_systemd_tries_again(
    short_by_mb: int,
    daemon: DaemonProcess,
    tmp_path: Path,
    default_bundle: Bundle,
    figure: Callable[[str], None],
) -> None:
    """78, the code of a broken configuration, would leave the daemon down until somebody comes."""
    limit = address_space(daemon.process.pid) - short_by_mb * 2**20
    done = subprocess.run(
        [sys.executable, "-m", "hearthd", "serve"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={key: value for key, value in os.environ.items() if not key.startswith(("HEARTHD_", "NOTIFY"))}
        | {
            "RUNTIME_DIRECTORY": str(tmp_path / "second"),
            "STATE_DIRECTORY": str(tmp_path / "state"),
            "CONFIGURATION_DIRECTORY": str(tmp_path / "configuration"),
            "HEARTHD_MODEL_DIRECTORY": str(default_bundle.path.parent),
            "HEARTHD_SERVER_TCP": "",
            "HEARTHD_ENGINE_THREADS": "1",
        },
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    # Or a signal's number, where a library gives up by abort().
    assert done.returncode == EXIT_FAULT or done.returncode < 0, done.stderr
    assert "Traceback" not in done.stderr
    figure(f"exit code {done.returncode}: {done.stderr.splitlines()[-1].partition('  ')[2][:120]}")
