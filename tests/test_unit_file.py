"""The systemd unit: what systemd itself says of it, and that it fits what the daemon does."""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hearthd import __main__ as cli
from hearthd.config import ServerConfig
from hearthd.server import CLOSE_SECONDS

UNIT = Path(__file__).parent.parent / "deploy/systemd/hearthd.service"

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def service() -> dict[str, str]:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return dict(parser["Service"])


def test_systemd_finds_nothing_to_say() -> None:
    done = analyze("verify", "--man=no", str(UNIT))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_would_say_something(tmp_path: Path) -> None:
    """The test above can fail: a misspelt key is told."""
    wrong = tmp_path / UNIT.name
    wrong.write_text(UNIT.read_text().replace("ProtectSystem=", "ProtectSistem="))
    assert "ProtectSistem" in analyze("verify", "--man=no", str(wrong)).stderr


def test_the_sandbox_is_closed_but_for_the_network() -> None:
    done = analyze("security", "--offline=true", "--threshold=11", "--no-pager", str(UNIT))
    assert done.returncode == 0, done.stdout[-200:]


def test_a_hard_exit_comes_before_systemds(service: dict[str, str]) -> None:
    assert int(service["TimeoutStopSec"]) > ServerConfig().drain_grace_seconds + 2 * CLOSE_SECONDS


def test_what_cannot_get_better_is_not_started_again(service: dict[str, str]) -> None:
    assert set(service["RestartPreventExitStatus"].split()) == {str(cli.EXIT_USAGE), str(cli.EXIT_CONFIG), "127"}
    assert str(cli.EXIT_FAULT) not in service["RestartPreventExitStatus"]


def test_the_words_of_the_unit_are_a_command_of_hearthd(service: dict[str, str]) -> None:
    *_, program, command = service["ExecStart"].split()
    assert program == "hearthd"
    done = subprocess.run([sys.executable, "-m", program, command, "--help"], capture_output=True, check=False)
    assert done.returncode == 0
