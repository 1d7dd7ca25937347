"""Both programs where something is wrong around them: what they write goes nowhere, options that nobody means."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hearth_program as program
import scripted_daemon as peer
from hearth._discovery import can_discover


@pytest.fixture(scope="module")
def daemon() -> Iterator[peer.ScriptedDaemon]:
    with peer.ScriptedDaemon() as daemon:
        yield daemon


def run_on_full_disk(command: list[str], **changes: str) -> tuple[int, str]:
    """Run a program whose output is a file on a disk that takes nothing."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            env=program.environment(**changes),
            timeout=60,
            check=False,
        )
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize(
    "words",
    [("ask", "?"), ("status",), ("status", "--watch"), ("models",), ("--help",), ("ask", "--help"), ("--version",)],
)
def test_output_that_cannot_be_written_is_one_line(daemon: peer.ScriptedDaemon, words: tuple[str, ...]) -> None:
    found = run_on_full_disk(program.command(*words), HEARTH_ADDRESS=daemon.address)
    assert found == (1, "hearth: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize(
    "words", [("model", "list"), ("--help",), ("model", "--help"), ("--version",), ("check-config",)]
)
def test_output_of_the_daemons_program_that_cannot_be_written_is_one_line(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "hearthd", *words]
    daemons_code = str(Path(__file__).resolve().parent.parent / "daemon")
    found = run_on_full_disk(
        command,
        PYTHONPATH=os.pathsep.join((daemons_code, str(program.CLIENT))),
        HEARTHD_MODEL_DIRECTORY=str(tmp_path),
    )
    assert found == (1, "hearthd: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seconds", "1e300"), b"argument --seconds: 1e300 is over an hour, 3600 seconds\n"),
        (("--seconds", "nan"), b"argument --seconds: nan is not a number of seconds over 0\n"),
        (
            ("--seconds", "0.1", "--interface", "eth0"),
            b"hearth: interface 'eth0' is no address as this machine has them",
        ),
    ],
)
def test_what_cannot_be_listened_to_is_wrong_usage(words: tuple[str, ...], said: bytes) -> None:
    if "--interface" in words and not can_discover():
        pytest.skip("the extra is not installed")
    done = program.run("discover", *words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert said in done.stderr.splitlines(keepends=True)[-1]


def test_a_silent_peer_is_told_from_a_slow_answer_with_what_helps() -> None:
    """The attempt to connect ends before the time of a small call does."""
    from hearth._channel import channel_options
    from hearth._settings import read_settings
    from hearth._translate import translate
    from test_client_errors import CODE, Failure

    settings = read_settings("127.0.0.1:1", {}, {})
    options = dict(channel_options(settings))
    assert int(options["grpc.min_reconnect_backoff_ms"]) < settings.call_timeout * 1000
    said = (
        "failed to connect to all addresses; last error: connection attempt timed out before receiving SETTINGS frame"
    )
    assert str(translate(Failure(CODE.UNAVAILABLE, said, []), "pi:1")) == (
        "cannot reach pi:1: it takes connections and stays silent; if it is hearthd, restart it: sudo systemctl "
        "restart hearthd"
    )
