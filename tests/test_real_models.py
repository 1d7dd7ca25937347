"""Several models in a real daemon: the same bundle under three names, each with a session and a thread of its own."""

import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemon_process import DaemonProcess
from hearth import Client, ModelNotFoundError, ModelState, UnavailableError
from hearthd.bundles.bundle import Bundle

pytestmark = pytest.mark.model

QUESTIONS = ("Why is the sky blue?", "Name three things that one finds in a kitchen.")
# What the bundle's weights take when they are loaded, at the least; two thirds of its size.
LEAST_BYTES = 110 * 10**6


@contextlib.contextmanager
def daemon(directory: Path, bundle: Bundle, models: str) -> Iterator[tuple[DaemonProcess, Client]]:
    """Serve the bundle as `first`, and as what `models` names."""
    (directory / "models").mkdir()
    for name in ("first", "second", "third"):
        (directory / "models" / name).symlink_to(bundle.path)
    file = directory / "hearthd.toml"
    file.write_text(
        f'[server]\nunix_socket = "{directory}/hearthd.sock"\ntcp = []\n'
        f'[model]\ndirectory = "{directory}/models"\nname = "first"\n'
        "[engine]\nslots = 2\ncontext_length = 256\nthreads = 2\n" + models
    )
    command = [sys.executable, "-m", "hearthd", "serve", "--config", str(file)]
    with (
        DaemonProcess(command, directory) as running,
        Client(f"unix://{running.socket_path}", ready_timeout=0) as client,
    ):
        running.wait_for("READY=1")
        yield running, client


def resident_bytes(running: DaemonProcess) -> int:
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def ask(client: Client, model: str, question: str) -> str:
    answer = client.chat(question, model=model, max_tokens=16, temperature=0.0)
    assert answer.model == model
    return answer.text


def states(client: Client) -> dict[str, ModelState]:
    return {model.name: model.state for model in client.models()}


def wait_for_log(running: DaemonProcess, words: str, count: int = 1) -> None:
    """Return when the daemon has logged this so often. A log cannot be waited on, only read again."""
    deadline = time.monotonic() + 60
    while running.log.count(words) < count:
        assert time.monotonic() < deadline, running.log
        assert running.process.poll() is None, running.log
        time.sleep(0.02)


def test_models_come_answer_beside_each_other_and_give_their_memory_back(
    tmp_path: Path, default_bundle: Bundle
) -> None:
    with daemon(tmp_path, default_bundle, "[models.second]\nidle_seconds = 1.0\n") as (running, client):
        assert states(client) == {"first": ModelState.LOADED, "second": ModelState.LOADABLE}
        alone = [ask(client, "first", question) for question in QUESTIONS]
        assert len(set(alone)) == 2
        one = resident_bytes(running)
        with ThreadPoolExecutor(4) as pool:
            asked = [(model, question) for model in ("first", "second") for question in QUESTIONS]
            together = list(pool.map(lambda each: ask(client, *each), asked))
            two = resident_bytes(running)
        # Both models at once: each answers as it does alone.
        assert together == alone * 2
        assert two > one + LEAST_BYTES, (one, two)
        wait_for_log(running, "second is unloaded")
        assert states(client) == {"first": ModelState.LOADED, "second": ModelState.LOADABLE}
        left = resident_bytes(running)
        # What went is what had come, but for a rest.
        assert two - left > 0.8 * (two - one), (one, two, left)
        assert ask(client, "second", QUESTIONS[0]) == alone[0]
        with pytest.raises(ModelNotFoundError, match="serves first, second"):
            ask(client, "fourth", QUESTIONS[0])
        # Again and again it holds no more than the first time.
        wait_for_log(running, "second is unloaded", 2)
        assert resident_bytes(running) < one + LEAST_BYTES / 2, (one, resident_bytes(running))


def test_a_damaged_model_is_refused_and_the_default_one_goes_on(tmp_path: Path, default_bundle: Bundle) -> None:
    with daemon(tmp_path, default_bundle, "[models.second]\n[models.broken]\n") as (running, client):
        assert states(client) == {
            "first": ModelState.LOADED,
            "second": ModelState.LOADABLE,
            "broken": ModelState.FAILED,
        }
        with pytest.raises(UnavailableError, match="broken cannot be loaded now") as caught:
            client.chat("Hello", model="broken")
        # The path is the owner's to know, from the journal.
        assert str(tmp_path) not in str(caught.value)
        assert "model 'broken' is not installed" in running.log
        assert any("cannot be loaded: broken" in warning for warning in client.status().warnings)
        assert ask(client, "first", QUESTIONS[0])


def test_told_to_stop_while_a_model_is_loaded_it_ends_in_time(tmp_path: Path, default_bundle: Bundle) -> None:
    with (
        daemon(tmp_path, default_bundle, "[models.second]\n") as (running, client),
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(lambda: client.chat("Hello", model="second"))
        wait_for_log(running, "loading second")
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(UnavailableError, match=r"shutting down|gave the call up"):
            waiting.result(60)
        assert running.process.wait(30) == 0
        assert "Traceback" not in running.log
