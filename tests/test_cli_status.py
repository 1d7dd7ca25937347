"""`hearth status`: what a status looks like, and how it is watched on a terminal, in a pipe, across restarts."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import hearth_program as program
import scripted_daemon as peer
from hearth import BoardFlag, BoardStatus, ChatCounts, DaemonState, DaemonStatus, ModelLoad, RecentAnswers
from hearth.cli.status_lines import Rates, describe, describe_in_a_line, rates_between
from hearth.v1 import status_pb2

INTERVAL = ("--watch", "--interval", "0.05")


def status_of(**changes: Any) -> DaemonStatus:
    values: dict[str, Any] = {
        "state": DaemonState.SERVING,
        "version": "1.2.3",
        "model": "tiny",
        "uptime_seconds": 60.0,
        "num_running": 1,
        "max_running": 4,
        "num_queued": 2,
        "max_queued": 16,
        "resident_bytes": 300 << 20,
        "num_chats_finished": 4,
        "num_chats_cancelled": 5,
        "num_chats_refused": 6,
        "num_chats_failed": 7,
        "num_prompt_tokens": 800,
        "num_cached_prompt_tokens": 200,
        "num_completion_tokens": 90,
    }
    return DaemonStatus(**(values | changes))


def rows(status: DaemonStatus, rates: Rates | None = None) -> dict[str, str]:
    return {line[:8].strip(): line[8:] for line in describe("here", status, rates)}


# What it looks like.


def test_speed_is_what_came_between_two_looks() -> None:
    before = status_of()
    after = status_of(
        uptime_seconds=62.0, num_prompt_tokens=1000, num_cached_prompt_tokens=350, num_completion_tokens=190
    )
    assert rates_between(before, after) == Rates(written=50.0, read=25.0, cached_share=0.75)
    quiet = rates_between(before, status_of(uptime_seconds=61.0))
    assert quiet == Rates(written=0.0, read=0.0, cached_share=None)


@pytest.mark.parametrize("changes", [{"uptime_seconds": 1.0}, {"uptime_seconds": 61.0, "num_completion_tokens": 3}])
def test_there_is_no_speed_across_a_restart(changes: dict[str, Any]) -> None:
    assert rates_between(status_of(), status_of(**changes)) is None


def test_a_row_is_there_when_it_says_something() -> None:
    assert rows(status_of()).keys() == {"daemon", "state", "model", "up", "memory", "chats", "tokens"}
    busy = status_of(
        interactive=ChatCounts(num_running=1),
        background=ChatCounts(num_paused=2, num_queued=3),
        kv_bytes=12 << 20,
        max_kv_bytes=64 << 20,
        recent=RecentAnswers(3, 0.25, 12.3, 61.25),
        board=BoardStatus(81.4, (BoardFlag.THROTTLED,), (BoardFlag.THROTTLED, BoardFlag.UNDER_VOLTAGE), 2),
        models=(ModelLoad("tiny", True, 1, 0, 1), ModelLoad("big", False, 0, 0, 0)),
        num_drafted_tokens=100,
        num_accepted_tokens=40,
        num_refused_calls={"quota": 1, "queue_full": 6},
        warnings=("the disk is full",),
    )
    found = rows(busy, Rates(61.24, 310.0, 0.7))
    assert found["memory"] == "300 MiB, of which KV 12 of 64 MiB"
    assert found[""] == "interactive 1 running; background 2 paused 3 waiting"
    assert found["tokens"] == "800 read, of which 200 from the cache; 90 written; 100 guessed ahead, 40% rightly"
    assert found["speed"] == "61.2 tokens/s written, 310 read, 70% of prompts cached"
    assert found["recent"] == "first token after 0.25 s, at worst 12 s; 61.2 tokens/s an answer; 3 answers"
    assert found["models"] == "tiny (1 running), big (not loaded)"
    assert found["refused"] == "6 queue full, 1 quota"
    assert found["board"] == "81 degrees Celsius; throttled; earlier under voltage; level 2: fewer threads"
    assert found["warning"] == "the disk is full"
    line = describe_in_a_line(busy, Rates(61.24, 310.0, 0.7))
    assert line.startswith("serving, 1 running, 2 paused, 2 waiting, 61.2 tokens/s written, 310 read, 70% of prompts")
    assert line.endswith("level 2: fewer threads, 1 warning")


def test_what_a_daemon_says_does_not_act_on_the_terminal() -> None:
    status = status_of(version="\x1b[31m", warnings=("\x1b]0;title\x07\n",))
    assert "\x1b" not in "".join(describe("here", status)) + describe_in_a_line(status, None)


# Watching.


@contextmanager
def daemon_at(directory: Path) -> Iterator[peer.ScriptedDaemon]:
    with peer.ScriptedDaemon(address=f"unix:{directory}/hearthd.sock") as daemon:
        yield daemon


def address_of(directory: Path) -> str:
    return f"unix://{directory}/hearthd.sock"


def counting(daemon: peer.ScriptedDaemon, uptime_ms: int = 1000) -> Callable[[grpc.ServicerContext], None]:
    """Let a daemon live a second, and write 50 tokens, between two looks."""
    looks = 0

    def count(_: grpc.ServicerContext) -> None:
        nonlocal looks
        looks += 1
        changed = status_pb2.GetStatusResponse()
        changed.CopyFrom(peer.STATUS)
        changed.uptime_ms = uptime_ms + 1000 * looks
        changed.completion_tokens_count = 50 * looks
        daemon.status = changed

    return count


def test_on_a_terminal_it_stands_in_one_place_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    with (
        daemon_at(tmp_path) as daemon,
        program.Terminal("status", *INTERVAL, "--address", address_of(tmp_path), TERM="xterm") as terminal,
    ):
        daemon.small_call = counting(daemon)
        terminal.expect("state   serving")
        terminal.expect("speed   50.0 tokens/s written")
        # Back to where the last one began: eight lines higher.
        terminal.expect("\x1b[8A\rdaemon  hearthd 1.2.3")
        terminal.type("\x03")
        assert terminal.wait() == 130
    assert "Traceback" not in terminal.shown
    # Below the last screen, and what the terminal made of Ctrl-C, the shell has a line of its own.
    assert terminal.shown.endswith("\n\x1b[J^C\n")


def test_a_terminal_of_another_size_is_drawn_anew_at_once(tmp_path: Path) -> None:
    # The next look is an hour away.
    words = ("status", "--watch", "--interval", "3600", "--address", address_of(tmp_path))
    with daemon_at(tmp_path), program.Terminal(*words, TERM="xterm") as terminal:
        terminal.resize(lines=24, columns=80)
        terminal.expect("tokens  800 read")
        terminal.resize(lines=4, columns=20)
        terminal.expect("\x1b[H\x1b[2J")
        terminal.expect("\rdaemon  hearthd 1.2.\x1b[K\n\rstate   serving\x1b[K\n\rmodel   tiny\x1b[K\n\x1b[J")
        terminal.type("\x03")
        assert terminal.wait() == 130


def test_ctrl_c_does_not_wait_for_a_daemon_that_hangs(tmp_path: Path) -> None:
    hangs, may_go_on = threading.Event(), threading.Event()

    def hang(_: grpc.ServicerContext) -> None:
        hangs.set()
        may_go_on.wait(60)

    with (
        daemon_at(tmp_path) as daemon,
        program.Terminal(
            "status", *INTERVAL, "--timeout", "inf", "--address", address_of(tmp_path), TERM="xterm"
        ) as terminal,
    ):
        try:
            terminal.expect("tokens  800 read")
            daemon.small_call = hang
            assert hangs.wait(20)
            # No second one, and no time-out: `wait` gives up before the call would.
            terminal.type("\x03")
            assert terminal.wait() == 130
        finally:
            may_go_on.set()
    assert "Traceback" not in terminal.shown


def test_a_pipe_that_nobody_reads_any_more_ends_it(tmp_path: Path) -> None:
    with daemon_at(tmp_path), piped("--address", address_of(tmp_path)) as process:
        assert process.stdout
        assert b"serving" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr
        assert process.stderr.read() == b""
        # For `communicate`.
        process.stdout = None


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path: Path) -> None:
    with (
        daemon_at(tmp_path),
        program.Terminal("status", *INTERVAL, "--address", address_of(tmp_path)) as terminal,
    ):
        terminal.expect("serving, 1 running, 0 paused, 3 waiting")
        terminal.expect("serving, 1 running")
        terminal.type("\x03")
        assert terminal.wait() == 130
    assert "\x1b" not in terminal.shown


@contextmanager
def piped(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        program.command("status", *INTERVAL, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=program.environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_in_a_pipe_it_is_a_line_at_a_time(tmp_path: Path) -> None:
    with daemon_at(tmp_path) as daemon, piped("--address", address_of(tmp_path)) as process:
        daemon.small_call = counting(daemon)
        assert process.stdout
        lines = [process.stdout.readline().decode() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert all("serving, 1 running" in line for line in lines)
    assert "50.0 tokens/s written" in lines[-1]


def test_as_json_it_is_an_object_at_a_time(tmp_path: Path) -> None:
    with daemon_at(tmp_path) as daemon, piped("--json", "--address", address_of(tmp_path)) as process:
        daemon.small_call = counting(daemon)
        assert process.stdout
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert first["rates"] is None
    assert second["rates"] == {"written": 50.0, "read": 0.0, "cached_share": None}
    assert second["board"] == {
        "temperature_celsius": None,
        "flags": None,
        "flags_since_start": [],
        "thermal_level": 0,
    }


def test_a_daemon_that_goes_away_is_waited_for(tmp_path: Path) -> None:
    with daemon_at(tmp_path) as daemon, piped("--address", address_of(tmp_path)) as process:
        assert process.stdout
        daemon.small_call = counting(daemon, uptime_ms=1_000_000)
        line = process.stdout.readline()
        assert b"serving" in line
        daemon.stop()
        while b"serving" in line:
            line = process.stdout.readline()
        assert b"waiting for it" in line
        with daemon_at(tmp_path) as daemon:
            daemon.small_call = counting(daemon)
            # Said once, however long it took.
            assert b"the daemon was restarted" in process.stdout.readline()
            assert b"serving" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_a_daemon_that_was_never_there_is_an_error(tmp_path: Path) -> None:
    done = program.run("status", "--watch", "--address", address_of(tmp_path))
    assert done.returncode == 1
    assert done.stderr.decode().startswith("hearth: ")
    assert done.stdout == b""


def test_what_will_not_pass_ends_it(tmp_path: Path) -> None:
    with peer.ScriptedDaemon(address=f"unix:{tmp_path}/hearthd.sock") as daemon:
        looks = 0

        def refuse_later(context: grpc.ServicerContext) -> None:
            nonlocal looks
            looks += 1
            if looks > 2:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")

        daemon.small_call = refuse_later
        done = program.run("status", *INTERVAL, "--address", address_of(tmp_path))
    assert done.returncode == 1
    assert done.stderr == b"hearth: no\n"
