"""The real daemon with the real model, held to the system calls and the memory that hearthd.service allows it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import confined
from daemon_process import DaemonProcess, real
from hearthd.access.tokens import list_tokens
from hearthd.bundles.bundle import Bundle
from paired_board import Board, Device, free_port
from places import DEFAULT_BUNDLE

pytestmark = [pytest.mark.model, pytest.mark.skipif(bool(confined.why_not()), reason=confined.why_not())]

CONFINED = [sys.executable, str(Path(confined.__file__))]
# Each line does what the sandbox forbids, and says how that ended.
FORBIDDEN = """
import ctypes, mmap, os, socket
def tell(what, attempt):
    try:
        attempt()
    except OSError as error:
        print(what, error.strerror)
    else:
        print(what, "allowed")
libc = ctypes.CDLL(None, use_errno=True)
writable = mmap.mmap(-1, mmap.PAGESIZE)
def make_executable():
    address = ctypes.addressof(ctypes.c_char.from_buffer(writable))
    if libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
tell("affinity", lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)))
tell("code", lambda: mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_WRITE | mmap.PROT_EXEC))
tell("turned", make_executable)
tell("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
tell("internet", socket.socket)
"""


def attempt(*before: str) -> dict[str, str]:
    done = subprocess.run([*before, sys.executable, "-c", FORBIDDEN], capture_output=True, text=True, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_what_the_unit_forbids_fails_and_would_be_possible_without() -> None:
    assert set(attempt().values()) == {"allowed"}
    assert attempt(*CONFINED) == {
        "affinity": "Operation not permitted",
        "code": "Operation not permitted",
        "turned": "Operation not permitted",
        "netlink": "Address family not supported by protocol",
        "internet": "allowed",
    }


def test_the_filter_is_the_units_own() -> None:
    allowed = confined.allowed_calls()
    assert {"read", "mmap", "futex", "execve", "accept4"} <= allowed
    assert not {"chown", "setuid", "sched_setaffinity", "mbind", "ptrace", "bpf", "mount"} & allowed


@pytest.fixture
def board(tmp_path: Path) -> Board:
    board = Board(tmp_path / "board", free_port())
    board.directory.mkdir()
    board.write_usual()
    board.prepare()
    return board


@pytest.fixture
def daemon(board: Board, default_bundle: Bundle) -> Iterator[DaemonProcess]:
    places = {"RUNTIME_DIRECTORY": str(board.directory / "runtime"), "HEARTHD_ENGINE_THREADS": "1"}
    places["HEARTHD_SERVER_TCP"] = f"127.0.0.1:{board.port}"
    with real(board.directory, DEFAULT_BUNDLE.parent, *CONFINED, **places) as daemon:
        daemon.wait_for("READY=1")
        yield daemon


def test_a_confined_daemon_pairs_answers_reloads_and_ends(board: Board, daemon: DaemonProcess, tmp_path: Path) -> None:
    # It is the process that was started itself: confined, it became the daemon.
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines())
    assert (status["Seccomp"], status["NoNewPrivs"], int(status["CapEff"], 16)) == ("2", "1", 0)
    assert b"hearthd" in Path(f"/proc/{daemon.process.pid}/cmdline").read_bytes()

    (tmp_path / "home").mkdir()
    device = Device(tmp_path / "home")
    paired = device.hearth("pair", board.code("phone"))
    assert paired.returncode == 0, paired.stderr + daemon.log
    assert [token.name for token in list_tokens(board.state / "tokens")] == ["phone"]
    ask = ("ask", "--temperature", "0", "What is the capital of France, and what is it known for?")
    asked = device.hearth(*ask)
    assert "Paris" in asked.stdout, asked.stderr + daemon.log

    board.file.write_text(board.file.read_text() + "[limits]\nmax_messages = 5\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("READY=1")
    assert "configuration read again; changed: limits.max_messages" in daemon.log
    assert device.hearth(*ask).stdout == asked.stdout
    assert "warning" not in device.hearth("status").stdout

    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(timeout=30) == os.EX_OK
    assert "Operation not permitted" not in daemon.log
