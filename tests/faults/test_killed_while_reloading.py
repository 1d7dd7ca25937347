"""kill -9 while a daemon reads its configuration again: files are whole, and the next daemon serves by the new one."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from daemon_process import DaemonProcess, scripted
from hearth.v1 import model_pb2, model_pb2_grpc
from hearthd.access.tokens import create_token, list_tokens

# From the signal to READY; a kill comes at any moment before, or a little after.
LONGEST_SECONDS = 0.06
CONFIGURATION = """[server]
unix_socket = "{directory}/hearthd.sock"
tcp = ["127.0.0.1:0"]
[model]
directory = "{directory}"
name = "test-model"
[auth]
token_file = "{directory}/tokens"
[limits]
max_messages = {max_messages}
"""


def write(directory: Path, max_messages: int) -> str:
    """Put a new configuration in place, as an editor does."""
    text = CONFIGURATION.format(directory=directory, max_messages=max_messages)
    (directory / "new").write_text(text)
    (directory / "new").replace(directory / "hearthd.toml")
    return text


def max_messages(daemon: DaemonProcess) -> int:
    with daemon.channel() as channel:
        listed = model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
        return int(listed.models[0].limits.max_messages)


def test_killed_while_it_reloads_it_starts_again_with_the_new_configuration(
    tmp_path: Path, rounds: int, figure: Callable[[str], None]
) -> None:
    chance = random.Random(61)
    create_token(tmp_path / "tokens", "kitchen")
    write(tmp_path, 4)
    starts: list[float] = []
    expected, written = 4, ""
    for number in range(rounds):
        begin = time.monotonic()
        with scripted(tmp_path) as daemon:
            daemon.wait_for("READY=1")
            starts.append(time.monotonic() - begin)
            assert max_messages(daemon) == expected
            expected = 5 + number % 200
            written = write(tmp_path, expected)
            create_token(tmp_path / "tokens", f"device{number}")
            daemon.process.send_signal(signal.SIGHUP)
            # Not a wait for something: the moment of the blow.
            threading.Event().wait(chance.uniform(0, LONGEST_SECONDS))
            daemon.process.kill()
            daemon.process.wait()
        assert (tmp_path / "hearthd.toml").read_text() == written
        assert len(list_tokens(tmp_path / "tokens")) == number + 2
    figure(
        f"killed {rounds} times within {1000 * LONGEST_SECONDS:.0f} ms of SIGHUP: every file whole, every next daemon "
        f"served by the new file, ready after {sum(starts) / rounds:.1f} s on average"
    )
