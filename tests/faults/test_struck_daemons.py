"""A daemon that is killed, short of memory, or given another date: what its callers hear, and what goes on."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_daemon import FakeDaemon

import hearth
from hearthd.access.tokens import create_token
from serving import PROMPT_FORWARDS, PROOF_FORWARDS

GATED = {"is_gated": True}
YEAR_SECONDS = 365 * 86400


def test_killed_in_mid_answer_the_client_hears_so_and_asks_nobody_again(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """As the kernel does it when memory is short: no last word, no drain."""
    with (
        FakeDaemon(tmp_path, allowed=PROOF_FORWARDS + PROMPT_FORWARDS + 1, runner=GATED) as daemon,
        daemon.client(ready_timeout=30) as client,
        client.stream("hello", max_tokens=50) as stream,
    ):
        begun = next(stream).text
        daemon.process.kill()
        begin = time.monotonic()
        with pytest.raises(hearth.ConnectError, match=r"lost unix://.*the connection broke") as caught:
            stream.read()
        figure(f"told after {1000 * (time.monotonic() - begin):.0f} ms: {caught.value}".replace(str(tmp_path), ""))
        assert stream.text == begun


def test_killed_before_the_first_token_the_question_is_asked_again(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    with (
        FakeDaemon(tmp_path, allowed=PROOF_FORWARDS, runner=GATED) as daemon,
        daemon.client(ready_timeout=30) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answered = pool.submit(client.chat, "hello", temperature=0, max_tokens=8)
        with daemon.client() as other:
            while not other.status().num_running:
                assert not answered.done()
        daemon.process.kill()
        daemon.process.wait()
        begin = time.monotonic()
        # As systemd would; what the dead one left behind is replaced.
        with FakeDaemon(tmp_path) as second:
            answer = answered.result(30)
            figure(f"answered {time.monotonic() - begin:.1f} s after the kill, of which the start took most")
            with second.client() as other:
                assert other.chat("hello", temperature=0, max_tokens=8).text == answer.text


def test_out_of_memory_in_a_run_fails_that_answer_and_the_next_is_given(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    with FakeDaemon(tmp_path, fail="MemoryError") as daemon, daemon.client(max_retries=0) as client:
        with pytest.raises(hearth.InternalError, match="id"):
            client.chat("hello")
        assert client.chat("hello", max_tokens=4).usage.completion_tokens
        assert client.status().num_chats_failed == 1
    figure("1 answer failed with an id, the next was given")


def test_no_descriptor_is_left_for_a_caller_and_those_inside_are_served(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """RLIMIT_NOFILE reached: the journal of a daemon that spins on accept() is the classic end of this."""
    with FakeDaemon(tmp_path, server={"max_connections": 200}) as daemon, daemon.client(daemon.tcp) as inside:
        expected = inside.chat("hello", temperature=0, max_tokens=8).text
        limit = daemon.num_descriptors + 20
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        outside = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(100)]
        try:
            for _ in range(10):
                assert inside.chat("hello", temperature=0, max_tokens=8).text == expected
        finally:
            for connection in outside:
                connection.close()
        with daemon.client(daemon.tcp, ready_timeout=20) as newcomer:
            assert newcomer.chat("hello", temperature=0, max_tokens=8).text == expected
        assert daemon.log.stat().st_size < 50_000
    figure("10 of 10 chats of a connected client answered; a new one let in when descriptors were free again")


# The date.


def find_faketime() -> str:
    for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1"):
        return str(path)
    return ""


class Clock:
    """The date as one process sees it; its monotonic clock is left alone."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "date"
        self.jump(0)
        self.environment = {
            "LD_PRELOAD": find_faketime(),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, seconds: int) -> None:
        """Set the date so far from the right one."""
        new = self._file.with_name("date.new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._file)


@pytest.mark.skipif(not find_faketime(), reason="needs libfaketime (Debian: faketime)")
@pytest.mark.parametrize("years", [1, -1])
def test_a_date_a_year_off_in_mid_answer_ends_nothing(
    years: int, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    clock = Clock(tmp_path)
    token_file = tmp_path / "tokens"
    for_ever = create_token(token_file, "kitchen")
    for_a_day = create_token(token_file, "guest", seconds_valid=86400)
    with (
        FakeDaemon(
            tmp_path,
            allowed=PROOF_FORWARDS + PROMPT_FORWARDS + 1,
            runner=GATED,
            environment=clock.environment | {"WATCHDOG_USEC": "3000000"},
            auth={"token_file": token_file},
            # A message for each forward that is let pass.
            server={"stream_interval_ms": 0},
        ) as daemon,
        daemon.client(daemon.tcp, token=for_ever) as client,
        daemon.client(daemon.tcp, token=for_a_day) as guest,
        client.stream("hello", max_tokens=30, timeout=60) as stream,
    ):
        guest.status()
        next(stream)
        clock.jump(years * YEAR_SECONDS)
        daemon.allow(10)
        for _ in range(3):
            next(stream)
        # The watchdog counts by the monotonic clock. It is fed when the thread answers: between two steps.
        while not daemon.says("WATCHDOG=1", within_seconds=1.0):
            daemon.allow(1)
        assert 0 <= client.status().uptime_seconds < 60
        if years > 0:
            # That the date did move shows in what depends on it.
            with pytest.raises(hearth.AuthenticationError):
                guest.status()
        else:
            guest.status()
        daemon.allow(1000)
        assert stream.read().usage.completion_tokens == 30
        clock.jump(0)
        assert client.chat("hello", max_tokens=4, timeout=20).usage.completion_tokens
    figure("the answer went on to its 30th token, the watchdog was fed, the uptime right")
