"""The watchdog with a thread that really stands still: hearthd itself, the real model, no hook and no fake.

`freeze_thread` stops the inference thread alone, in the middle of a run of ONNX Runtime; gRPC and the event loop go on,
health and status among them. A test of what systemd then does is in tests/board, and below where one can be started.
"""

import contextlib
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from daemon_process import DaemonProcess, real, scripted
from hearth.v1 import chat_pb2_grpc, status_pb2, status_pb2_grpc
from hearthd.bundles.bundle import Bundle
from places import DEFAULT_BUNDLE
from serving import chat_request

pytestmark = [pytest.mark.slow, pytest.mark.model]

FREEZE = Path(__file__).with_name("freeze_thread.py")
WATCHDOG_SECONDS = 1.2
# `feed_watchdog` looks three times in a watchdog's time; what was on its way may still come.
INTERVAL_SECONDS = WATCHDOG_SECONDS / 3
LONG = "Tell me a very long story about a lighthouse."


@contextlib.contextmanager
def frozen(daemon: DaemonProcess) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, str(FREEZE), str(daemon.process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as freezing:
        assert freezing.stdout
        assert freezing.stdin
        assert freezing.stdout.readline().startswith("frozen ")
        yield freezing
        freezing.stdin.close()


@contextlib.contextmanager
def watched(directory: Path) -> Iterator[DaemonProcess]:
    environment = {"WATCHDOG_USEC": str(int(WATCHDOG_SECONDS * 1e6)), "HEARTHD_ENGINE_THREADS": "1"}
    with real(directory, DEFAULT_BUNDLE.parent, **environment) as daemon:
        daemon.wait_for("READY=1")
        yield daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, default_bundle: Bundle) -> Iterator[DaemonProcess]:
    """Return one that every test leaves as it was."""
    with watched(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


def life_signs(daemon: DaemonProcess, seconds: float) -> int:
    """Count how often the watchdog is fed in the next seconds."""
    deadline, count = time.monotonic() + seconds, 0
    while (left := deadline - time.monotonic()) > 0:
        count += daemon.hear(left) == "WATCHDOG=1"
    return count


def hear_the_last(daemon: DaemonProcess) -> None:
    """Take what was on its way when the thread was frozen, and what one last look may have sent."""
    life_signs(daemon, 2 * INTERVAL_SECONDS)


def is_serving(channel: grpc.Channel) -> bool:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextlib.contextmanager
def answering(channel: grpc.Channel, num_tokens: int = 1500) -> Iterator[list[object]]:
    """Let the model write; in the block it does."""
    call = chat_pb2_grpc.ChatServiceStub(channel).Chat(chat_request(LONG, max_tokens=num_tokens, temperature=0.0))
    received: list[object] = [next(call)]
    ended = threading.Event()

    def read() -> None:
        with contextlib.suppress(grpc.RpcError):
            received.extend(call)
        ended.set()

    threading.Thread(target=read).start()
    try:
        yield received
    finally:
        call.cancel()
        assert ended.wait(30)


def test_a_frozen_decode_thread_starves_the_watchdog_and_a_thawed_one_feeds_it(daemon: DaemonProcess) -> None:
    with daemon.channel() as channel, answering(channel) as received:
        assert life_signs(daemon, 2 * WATCHDOG_SECONDS) >= 3
        with frozen(daemon):
            hear_the_last(daemon)
            num_received = len(received)
            # Whoever asks the rest of the daemon is told that all is well; that is why it is not asked.
            assert is_serving(channel)
            assert life_signs(daemon, 2 * WATCHDOG_SECONDS) == 0
            assert len(received) == num_received
        assert life_signs(daemon, 2 * WATCHDOG_SECONDS) >= 3
        assert len(received) > num_received


def test_an_idle_thread_that_is_frozen_starves_it_too(daemon: DaemonProcess) -> None:
    daemon.wait_for("WATCHDOG=1")
    with frozen(daemon):
        hear_the_last(daemon)
        assert life_signs(daemon, 2 * WATCHDOG_SECONDS) == 0
    daemon.wait_for("WATCHDOG=1")


def test_a_whole_process_that_is_frozen_starves_it_too(daemon: DaemonProcess) -> None:
    daemon.wait_for("WATCHDOG=1")
    daemon.process.send_signal(signal.SIGSTOP)
    hear_the_last(daemon)
    assert life_signs(daemon, 2 * WATCHDOG_SECONDS) == 0
    daemon.process.send_signal(signal.SIGCONT)
    daemon.wait_for("WATCHDOG=1")


def test_a_daemon_that_only_works_hard_is_never_taken_for_a_frozen_one(daemon: DaemonProcess) -> None:
    """A long prompt, and answers beside it: no gap comes near to the watchdog's time."""
    with daemon.channel() as channel, contextlib.ExitStack() as busy:
        for number in range(2):
            busy.enter_context(answering(channel, 1500 - number))
        prompt = chat_request("word " * 900, max_tokens=16)
        answer = threading.Thread(target=lambda: [*chat_pb2_grpc.ChatServiceStub(channel).Chat(prompt, timeout=120)])
        answer.start()
        num_before = len(daemon.messages)
        while answer.is_alive():
            life_signs(daemon, 0.2)
        life_signs(daemon, WATCHDOG_SECONDS)
        fed = [at for at, message in daemon.messages[num_before:] if message == "WATCHDOG=1"]
        assert len(fed) > 5
        assert max(after - before for before, after in itertools.pairwise(fed)) < WATCHDOG_SECONDS


def test_the_inference_thread_is_known_by_name(daemon: DaemonProcess) -> None:
    tasks = Path(f"/proc/{daemon.process.pid}/task").iterdir()
    assert [(task / "comm").read_text().strip() for task in tasks].count("inference") == 1


# With daemons of their own. The shared one is not listened to any more, and comes to wait for that: no test after these
# may need it.


def test_systemds_signal_ends_a_frozen_daemon_at_once_and_says_where_it_stood(
    tmp_path: Path, default_bundle: Bundle
) -> None:
    with watched(tmp_path) as daemon, daemon.channel() as channel, answering(channel):
        with frozen(daemon):
            started = time.monotonic()
            daemon.process.send_signal(signal.SIGABRT)
            assert daemon.process.wait(10) == -signal.SIGABRT
            assert time.monotonic() - started < 2
        assert "Fatal Python error: Aborted" in daemon.log
        # Each thread's place, the frozen one's among them, in the model's run or beside it; of what was said, nothing.
        assert "inference_thread.py" in daemon.log
        assert "lighthouse" not in daemon.log


def test_no_life_sign_is_sent_while_a_broken_loop_hangs(tmp_path: Path) -> None:
    """The other half: the thread is well, and the loop that would serve its tokens is not."""
    with scripted(tmp_path, WATCHDOG_USEC=str(int(WATCHDOG_SECONDS * 1e6))) as daemon:
        daemon.wait_for("WATCHDOG=1")
        main_thread = str(daemon.process.pid)
        name = Path(f"/proc/{main_thread}/task/{main_thread}/comm").read_text().strip()
        command = [sys.executable, str(FREEZE), main_thread, name]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as freezing:
            assert freezing.stdout
            assert freezing.stdout.readline() == f"frozen {main_thread}\n"
            hear_the_last(daemon)
            assert life_signs(daemon, 2 * WATCHDOG_SECONDS) == 0
            freezing.communicate()
        with daemon.channel() as channel:
            status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest(), timeout=30)
