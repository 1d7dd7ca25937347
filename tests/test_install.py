"""The thin client as `pip install .` gives it: in an empty environment, with gRPC and protobuf and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hearth_program as program
import scripted_daemon as peer

pytestmark = pytest.mark.network
ROOT = Path(__file__).resolve().parent.parent

# What the environment holds, and what gRPC and protobuf need, by their own metadata.
_LIST = """
import importlib.metadata as metadata, json, re
def name(text): return re.match(r"[A-Za-z0-9._-]+", text)[0].lower().replace("_", "-")
needs, left = set(), ["grpcio", "protobuf"]
while left:
    if (one := left.pop()) not in needs:
        needs.add(one)
        left += [name(need) for need in metadata.requires(one) or () if "extra ==" not in need]
found = sorted(name(one.name) for one in metadata.distributions())
print(json.dumps({"needs": sorted(needs), "found": found}))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the client alone; returns its bin directory."""
    environment = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=120)
    install = [str(environment / "bin/pip"), "install", "--quiet", "--no-input", str(ROOT)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return environment / "bin"


def run(bare: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in program.environment().items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(bare / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=60,
        cwd=bare,
        check=False,
    )


def test_only_grpc_and_protobuf_come_with_the_client(bare: Path) -> None:
    listed = json.loads(run(bare, "python", "-c", _LIST).stdout)
    assert set(listed["found"]) - {"pip", "setuptools"} == {"hearth-chat", *listed["needs"]}


def test_the_program_answers_from_there(bare: Path) -> None:
    helped = run(bare, "hearth", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "hearth" in helped.stdout
    assert run(bare, "hearth", "--version").stdout.split()[1][0].isdigit()
    with peer.ScriptedDaemon() as daemon:
        asked = run(bare, "hearth", "ask", "--address", daemon.address, "Who is there?")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "Hello, world\n", "")


def test_discovering_needs_the_extra_and_says_so(bare: Path) -> None:
    asked = run(bare, "hearth", "discover")
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "pip install 'hearth-chat[discover]'" in asked.stderr


def test_types_come_along(bare: Path) -> None:
    where = "import hearth, pathlib; print((pathlib.Path(hearth.__file__).parent / 'py.typed').exists())"
    assert run(bare, "python", "-c", where).stdout == "True\n"
