"""The units under a real systemd, with the real model: start, reload, watchdog, stop, credentials, proxy."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hearthd.access.tokens import create_token
from hearthd.bundles.bundle import Bundle
from systemd_machine import SystemdMachine, why_not
from tls_files import make_tls_files

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.skipif(bool(why_not()), reason=why_not())]

WATCHDOG_SECONDS = 3
HEARTH = "import sys; from hearth.__main__ import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, default_bundle: Bundle) -> Iterator[SystemdMachine]:
    with SystemdMachine(tmp_path_factory.mktemp("machine"), watchdog_seconds=WATCHDOG_SECONDS) as machine:
        yield machine


@contextlib.contextmanager
def started(machine: SystemdMachine, unit: str, configuration: str = "") -> Iterator[None]:
    """Run a unit, as somebody who has written its configuration would."""
    machine.write("/etc/hearth/hearthd.toml", configuration)
    done = machine.systemctl("start", unit)
    assert done.returncode == 0, done.stderr + machine.log
    yield
    stopped = machine.systemctl("stop", unit)
    assert stopped.returncode == 0
    assert machine.show(unit)["Result"] == "success"


def ask(machine: SystemdMachine, *options: str, who: str = "") -> "subprocess.CompletedProcess[str]":
    """Ask from inside, with the client of this clone; as root, or as `who` says to setpriv."""
    packages = "$(ls -d /run/clone/.venv/lib/python*/site-packages)"
    program = f"setpriv {who} /run/python/bin/python3" if who else "/run/python/bin/python3"
    python = f"HOME=/nonexistent LD_LIBRARY_PATH=/run/python/lib PYTHONPATH=/run/clone/client:{packages} exec {program}"
    words = " ".join(("ask", *options, "Hello"))
    return machine.run("sh", "-c", f"{python} -P -c '{HEARTH}' {words}")


def test_systemctl_reload_tells_what_came_of_it(machine: SystemdMachine) -> None:
    with started(machine, "hearthd"):
        serving = machine.show("hearthd")["StatusText"]
        assert serving.startswith("serving smollm2-135m on unix:///run/hearth/hearthd.sock")

        machine.write("/etc/hearth/hearthd.toml", "[limits]\nmax_messages = 5\n")
        assert machine.systemctl("reload", "hearthd").returncode == 0
        assert machine.wait_until("hearthd", StatusText=serving)
        assert "configuration read again; changed: limits.max_messages" in machine.log

        machine.write("/etc/hearth/hearthd.toml", "[limits]\nmax_messages = 0\n")
        assert machine.systemctl("reload", "hearthd").returncode != 0
        found = machine.show("hearthd")
        assert found["ActiveState"] == "active"
        assert "the new configuration cannot be used, the old one stays" in found["StatusText"]
        assert "limits.max_messages is 0" in found["StatusText"]

        machine.write("/etc/hearth/hearthd.toml", "[engine]\nslots = 2\n")
        assert machine.systemctl("reload", "hearthd").returncode == 0
        machine.wait_until("hearthd", StatusText=f"{serving}; needs a restart: engine.slots")
        assert machine.show("hearthd")["NRestarts"] == "0"


def test_a_frozen_decode_thread_is_started_again_in_time(machine: SystemdMachine) -> None:
    with started(machine, "hearthd"):
        pid = machine.show("hearthd")["MainPID"]
        command = machine.command("/usr/bin/env", "LD_LIBRARY_PATH=/run/python/lib", "/run/python/bin/python3")
        command += ["/run/clone/tests/freeze_thread.py", pid]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as freezing:
            assert freezing.stdout
            assert freezing.stdout.readline().startswith("frozen ")
            began = time.monotonic()
            machine.wait_until("hearthd", NRestarts="1")
            assert time.monotonic() - began < WATCHDOG_SECONDS + 5
            assert freezing.stdout.readline().startswith("gone ")
        found = machine.wait_until("hearthd", ActiveState="active")
        assert found["MainPID"] != pid
        assert "Fatal Python error: Aborted" in machine.log
        answer = ask(machine)
        assert (answer.returncode, bool(answer.stdout.strip())) == (0, True), answer.stderr


def test_the_sandbox_is_in_force(machine: SystemdMachine) -> None:
    with started(machine, "hearthd"):
        pid = machine.show("hearthd")["MainPID"]
        status = dict(line.split(":\t", 1) for line in machine.run("cat", f"/proc/{pid}/status").stdout.splitlines())
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert int(status["CapBnd"], 16) == 0
        assert "0" not in status["Uid"].split()
        # The clone is in there, and so is a home's directory; of the machine nothing can be written.
        looked = machine.run("nsenter", "-t", pid, "-m", "sh", "-c", "ls /root /home; touch /etc/x")
        assert looked.stdout.replace("/root:", "").replace("/home:", "").split() == []
        assert "Read-only file system" in looked.stderr


def test_people_of_the_group_ask_without_a_token_and_others_do_not(machine: SystemdMachine) -> None:
    # It ran with a user of its own before, as on a board that has an older package.
    with started(machine, "hearthd-local"):
        machine.write("/var/lib/hearth/tokens", "")
    made = machine.run("systemd-sysusers", "/run/units/sysusers.d/hearth.conf")
    assert made.returncode == 0, made.stderr
    user, group = machine.run("sh", "-c", "id -u hearth; getent group hearth | cut -d: -f3").stdout.split()
    with started(machine, "hearthd-local"):
        assert machine.run("stat", "-c", "%u %g %a", "/run/hearth/hearthd.sock").stdout.split() == [user, group, "660"]
        for place in ("/var/lib/private/hearth", "/var/lib/private/hearth/tokens", "/var/cache/private/hearth"):
            assert machine.run("stat", "-c", "%u", place).stdout.strip() == user, place
        someone = "--reuid=65530 --regid=65530 --clear-groups"
        socket = ("--address", "unix:///run/hearth/hearthd.sock", "--wait", "1")
        member = ask(machine, *socket, who=someone.replace("--clear-groups", f"--groups={group}"))
        assert (member.returncode, bool(member.stdout.strip())) == (0, True), member.stderr
        stranger = ask(machine, *socket, who=someone)
        assert (stranger.returncode, stranger.stdout) == (1, ""), stranger.stderr


def test_the_local_unit_has_no_network_and_answers(machine: SystemdMachine) -> None:
    with started(machine, "hearthd-local"):
        assert machine.show("hearthd-local")["StatusText"] == (
            "serving smollm2-135m on unix:///run/hearth/hearthd.sock"
        )
        pid = machine.show("hearthd-local")["MainPID"]
        devices = machine.run("nsenter", "-t", pid, "-n", "cat", "/proc/net/dev").stdout.splitlines()[2:]
        assert [line.split(":")[0].strip() for line in devices] == ["lo"]
        answer = ask(machine)
        assert (answer.returncode, bool(answer.stdout.strip())) == (0, True), answer.stderr


def test_secrets_come_as_credentials_and_the_network_by_the_proxy(machine: SystemdMachine, tmp_path: Path) -> None:
    files = make_tls_files(tmp_path)
    secret = create_token(tmp_path / "tokens", "phone")
    for source, name in ((files.certificate, "server.crt"), (files.key, "server.key"), (tmp_path / "tokens", "tokens")):
        machine.write(f"/etc/credstore/hearth.{name}", source.read_text())
    machine.run("chmod", "-R", "go=", "/etc/credstore")
    machine.write("/run/ca.crt", files.certificate.read_text())
    machine.write("/run/token", secret)
    machine.run("chmod", "600", "/run/token")
    configuration = (
        '[server]\ntls_socket = "/run/hearth/tls.sock"\n[tls]\ndirectory = "$CREDENTIALS_DIRECTORY"\n'
        '[auth]\ntoken_file = "$CREDENTIALS_DIRECTORY/tokens"\n'
    )
    with started(machine, "hearthd-local", configuration), started(machine, "hearthd-proxy.socket", configuration):
        machine.run("ip", "link", "set", "lo", "up")
        by_proxy = ["--address", "localhost:50051", "--ca", "/run/ca.crt"]
        answer = ask(machine, *by_proxy, "--token-file", "/run/token")
        assert (answer.returncode, bool(answer.stdout.strip())) == (0, True), answer.stderr + machine.log
        assert ask(machine, *by_proxy).returncode != 0
        machine.systemctl("stop", "hearthd-proxy.service")


def test_a_second_instance_serves_beside_the_first(machine: SystemdMachine) -> None:
    machine.write("/etc/hearth/kitchen.toml", '[server]\ntcp = ["127.0.0.1:50061"]\n')
    with started(machine, "hearthd"), started(machine, "hearthd@kitchen"):
        assert machine.show("hearthd@kitchen")["StatusText"] == (
            "serving smollm2-135m on unix:///run/hearth-kitchen/hearthd.sock, 127.0.0.1:50061"
        )
        answer = ask(machine, "--address", "unix:///run/hearth-kitchen/hearthd.sock")
        assert (answer.returncode, bool(answer.stdout.strip())) == (0, True), answer.stderr
        assert machine.show("hearthd")["ActiveState"] == "active"


def test_a_second_instance_sees_the_models_of_the_first_and_nothing_else(machine: SystemdMachine) -> None:
    machine.write("/etc/hearth/kitchen.toml", '[server]\ntcp = ["127.0.0.1:50061"]\n')
    with started(machine, "hearthd"):
        machine.run("mkdir", "/var/lib/hearth/models")
        for name in ("tokens", "models/one"):
            machine.write(f"/var/lib/hearth/{name}", "of the first")
        with started(machine, "hearthd@kitchen"):
            pid = machine.show("hearthd@kitchen")["MainPID"]
            within = ("nsenter", "-t", pid, "-m", "sh", "-c")
            assert machine.run(*within, "cd /var/lib/hearth; ls -A . models").stdout.split() == [
                ".:", "models", "models:", "one"
            ]  # fmt: skip
            assert "Read-only file system" in machine.run(*within, "touch /var/lib/hearth/models/two").stderr
            assert machine.run(*within, "touch /var/lib/hearth-kitchen/x /var/cache/hearth-kitchen/x").returncode == 0
