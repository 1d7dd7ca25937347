"""The systemd units: what systemd itself says of them, and that they fit what the daemon does."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from hearthd import __main__ as cli
from hearthd.access.tokens import create_token
from hearthd.configuration import paths
from hearthd.configuration.config import ServerConfig
from hearthd.errors import ConfigError
from hearthd.server import CLOSE_SECONDS, Server
from serving import answer, asynchronous, chat_request, make_config, make_model, make_runner, serving
from tls_files import TlsFiles, make_tls_files

UNITS = Path(__file__).parent.parent / "deploy/systemd"
LAN, LOCAL, INSTANCE = "hearthd.service", "hearthd-local.service", "hearthd@.service"
DAEMONS = (LAN, LOCAL, INSTANCE, "user/hearthd.service")
SYSTEM = (LAN, LOCAL, INSTANCE, "hearthd-proxy.service", "hearthd-proxy.socket")
USER = "sysusers.d/hearth.conf"
# What `systemd-analyze security` may say at most, in tenths.
EXPOSURE = {LAN: 11, LOCAL: 3, INSTANCE: 11, "hearthd-proxy.service": 3}


def analyze(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    assert program, "systemd-analyze is missing: deploy/dev/setup.sh dev installs the package systemd"
    # A sandbox may have no /run/user; systemd wants to know where it would be.
    return subprocess.run([program, *words], capture_output=True, text=True, check=False, env=environment or None)


def read(unit: str) -> dict[str, list[tuple[str, str]]]:
    """Return each section's lines, in their order; a key may come again."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in (UNITS / unit).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            sections[line.strip("[]")] = lines = []
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            lines.append((key, value))
    return sections


def service(unit: str) -> dict[str, str]:
    return dict(read(unit)["Service"])


def test_each_unit_is_tested_here() -> None:
    files = {str(path.relative_to(UNITS)) for path in UNITS.rglob("*") if path.is_file()}
    assert files == {*SYSTEM, *DAEMONS, USER}


@pytest.mark.parametrize("unit", SYSTEM)
def test_systemd_finds_nothing_to_say(unit: str) -> None:
    done = analyze("verify", "--man=no", str(UNITS / unit))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_finds_nothing_to_say_of_a_users_unit(tmp_path: Path) -> None:
    done = analyze("--user", "verify", "--man=no", str(UNITS / "user/hearthd.service"), XDG_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_would_say_something(tmp_path: Path) -> None:
    """The tests above can fail: a misspelt key is told."""
    wrong = tmp_path / LAN
    wrong.write_text((UNITS / LAN).read_text().replace("ProtectSystem=", "ProtectSistem="))
    assert "ProtectSistem" in analyze("verify", "--man=no", str(wrong)).stderr


def security(unit: Path, threshold: int) -> subprocess.CompletedProcess[str]:
    return analyze("security", "--offline=true", f"--threshold={threshold}", "--no-pager", str(unit))


@pytest.mark.parametrize("unit", EXPOSURE)
def test_the_sandbox_is_as_closed_as_is_promised(unit: str) -> None:
    done = security(UNITS / unit, EXPOSURE[unit])
    assert done.returncode == 0, done.stdout[-200:]


@pytest.mark.parametrize("unit", [LAN, LOCAL])
def test_one_line_less_and_the_sandbox_is_not_closed(unit: str, tmp_path: Path) -> None:
    """The test above can fail: each promise is that of the whole list."""
    text = (UNITS / unit).read_text()
    (tmp_path / unit).write_text(text.replace("\nPrivateUsers=yes\n", "\n").replace("\nCapabilityBoundingSet=\n", "\n"))
    assert security(tmp_path / unit, EXPOSURE[unit]).returncode != 0


@pytest.mark.parametrize("unit", [*SYSTEM, "user/hearthd.service"])
def test_each_line_has_its_reason(unit: str) -> None:
    """A paragraph of settings is explained by the comments in it, or is systemd's own everyday vocabulary."""
    everyday = {"Description", "Documentation", "Type", "NotifyAccess", "ExecStart", "WantedBy", "ListenStream"}
    everyday |= {"Requires", "After", "Restart", "RestartSec"}
    text = (UNITS / unit).read_text(encoding="utf-8")
    bare = [
        paragraph
        for paragraph in text.split("\n\n")
        if "#" not in paragraph
        for line in paragraph.splitlines()
        if not line.startswith("[") and line.partition("=")[0] not in everyday
    ]
    assert bare == []


@pytest.mark.parametrize("unit", [LOCAL, INSTANCE])
def test_the_units_differ_only_where_they_are_meant_to(unit: str) -> None:
    """Whoever hardens one must harden the others: copies drift apart."""
    meant = {
        LOCAL: {"RestrictAddressFamilies", "PrivateNetwork", "IPAddressDeny", "Environment"},
        INSTANCE: {"ExecStart", "ExecReload", "Environment", "LoadCredential", "BindReadOnlyPaths"}
        | {"StateDirectory", "CacheDirectory", "RuntimeDirectory"},
    }[unit]
    different = set(read(unit)["Service"]) ^ set(read(LAN)["Service"])
    assert {key for key, _ in different} == meant


@pytest.mark.parametrize("unit", [LAN, LOCAL, INSTANCE])
def test_what_is_the_daemons_is_its_own(unit: str) -> None:
    """Of state and cache it has one directory each, which nobody else may look into."""
    found = service(unit)
    name = "hearth-%i" if unit == INSTANCE else "hearth"
    assert {found[f"{kind}Directory"] for kind in ("State", "Cache", "Runtime")} == {name}
    assert found["StateDirectoryMode"] == found["CacheDirectoryMode"] == "0700"
    # Where the daemon itself looks then.
    environment = {"STATE_DIRECTORY": "/var/lib/hearth", "CACHE_DIRECTORY": "/var/cache/hearth"}
    assert paths.prefix_directory(environment) == Path("/var/cache/hearth/prefixes")


@pytest.mark.parametrize("unit", [LAN, LOCAL, INSTANCE, "hearthd-proxy.service"])
def test_the_user_is_the_one_that_people_can_join(unit: str) -> None:
    (line,) = [line for line in (UNITS / USER).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert line.split()[:3] == ["u", service(unit)["User"], "-"]
    assert service(unit)["DynamicUser"] == "yes"
    assert "Group" not in service(unit)  # the user's own


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="needs systemd-sysusers")
def test_systemd_makes_the_user_and_its_group(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", str(UNITS / USER)], check=True)
    user = (tmp_path / "etc/passwd").read_text(encoding="utf-8").strip().split(":")
    (group,) = (tmp_path / "etc/group").read_text(encoding="utf-8").split()
    assert (user[0], group.split(":")[0]) == ("hearth", "hearth")
    assert user[3] == group.split(":")[2]
    assert user[-1].endswith("/nologin")


def test_the_local_unit_has_no_network_and_does_not_try_to_use_one() -> None:
    lines = read(LOCAL)["Service"]
    assert ("PrivateNetwork", "yes") in lines
    assert ("RestrictAddressFamilies", "AF_UNIX") in lines
    assert ("Environment", "HEARTHD_SERVER_TCP=") in lines
    assert "network" not in str(read(LOCAL)["Unit"]).replace("(this machine only)", "")


@pytest.mark.parametrize("unit", DAEMONS)
def test_a_hard_exit_comes_before_systemds(unit: str) -> None:
    assert int(service(unit)["TimeoutStopSec"]) > ServerConfig().drain_grace_seconds + 2 * CLOSE_SECONDS


@pytest.mark.parametrize("unit", DAEMONS)
def test_what_cannot_get_better_is_not_started_again_and_all_else_always_is(unit: str) -> None:
    never = service(unit)["RestartPreventExitStatus"].split()
    assert set(never) == {str(cli.EXIT_USAGE), str(cli.EXIT_CONFIG), "127"}
    assert str(cli.EXIT_FAULT) not in never
    assert ("StartLimitIntervalSec", "0") in read(unit)["Unit"]


@pytest.mark.parametrize("unit", DAEMONS)
def test_a_frozen_daemon_is_back_in_time(unit: str) -> None:
    """WatchdogSec + 5 s: what ends it and what waits before the next start must fit."""
    found = service(unit)
    assert int(found["TimeoutAbortSec"]) + int(found["RestartSec"]) <= 5
    assert found["Restart"] == "on-failure"  # to which a watchdog's end belongs


@pytest.mark.parametrize("unit", DAEMONS)
def test_the_words_of_the_unit_are_commands_of_hearthd(unit: str) -> None:
    commands = [value for key, value in read(unit)["Service"] if key in ("ExecStart", "ExecReload")]
    assert commands[1] == "/bin/kill -HUP $MAINPID"
    for command in (commands[0], commands[2]):
        env, program, *words = command.split()
        assert (env, program) == ("/usr/bin/env", "hearthd")
        done = subprocess.run([sys.executable, "-m", program, *words, "--help"], capture_output=True, check=False)
        assert done.returncode == 0


@pytest.mark.parametrize("unit", [LAN, LOCAL, INSTANCE])
def test_time_is_waited_for(unit: str) -> None:
    lines = dict(read(unit)["Unit"])
    assert "time-sync.target" in lines["After"]
    assert "time-sync.target" in lines["Wants"]


def test_the_proxy_passes_on_to_the_daemon_without_a_network() -> None:
    proxy = read("hearthd-proxy.service")
    assert [value for key, value in proxy["Unit"] if key == "Requires"] == ["hearthd-proxy.socket", LOCAL]
    assert ("PrivateNetwork", "yes") in proxy["Service"]
    *_, target = service("hearthd-proxy.service")["ExecStart"].split()
    named = re.search(r'tls_socket = "(.+)"', (UNITS / "hearthd-proxy.socket").read_text())
    assert named
    assert target == named[1]
    # The same user, or the socket would not let it in.
    assert service("hearthd-proxy.service")["User"] == service(LOCAL)["User"]


# The proxy, on real sockets: systemd's own program between a network address and the daemon's TLS socket.


def find_proxy() -> str:
    return next((path for path in ("/lib/systemd/systemd-socket-proxyd",) if Path(path).exists()), "")


@pytest.mark.skipif(not find_proxy(), reason="needs systemd-socket-proxyd")
@asynchronous
async def test_by_way_of_the_proxy_callers_need_tls_and_a_token(tmp_path: Path) -> None:
    files = make_tls_files(tmp_path)
    secret = create_token(tmp_path / "tokens", "phone")
    config = make_config(
        tmp_path,
        server={"tcp": (), "tls_socket": tmp_path / "tls.sock"},
        tls={"certificate": files.certificate, "key": files.key},
        auth={"token_file": tmp_path / "tokens"},
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        async with serving(config) as server:
            assert server.addresses == [f"unix://{tmp_path}/hearthd.sock", f"unix://{tmp_path}/tls.sock"]
            proxy = start_proxy(listening, tmp_path / "tls.sock")
            try:
                await ask_by_proxy(port, files, secret)
            finally:
                proxy.terminate()
                proxy.wait()


def start_proxy(listening: socket.socket, target: Path) -> "subprocess.Popen[bytes]":
    """Start it as systemd does: the socket is descriptor 3, and LISTEN_PID names the process."""
    program = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_FDS'] = '1';"
        "os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.argv[2], sys.argv[2:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(listening.fileno()), find_proxy(), str(target)],
        pass_fds=[listening.fileno()],
    )


async def ask_by_proxy(port: int, files: TlsFiles, secret: str) -> None:
    tls = grpc.ssl_channel_credentials(files.certificate.read_bytes())
    target, token = f"localhost:{port}", [("authorization", f"Bearer {secret}")]
    async with grpc.aio.secure_channel(target, tls) as channel:
        text, _ = await answer(channel, chat_request(), metadata=token, wait_for_ready=True)
        assert text
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(channel, chat_request())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    async with grpc.aio.insecure_channel(target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(channel, chat_request(), metadata=token)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_without_tls_or_tokens_a_daemon_behind_a_proxy_refuses_to_start(tmp_path: Path) -> None:
    config = make_config(tmp_path, server={"tcp": (), "tls_socket": tmp_path / "tls.sock"})
    with pytest.raises(ConfigError, match=r"server.tls_socket has unix://.*, which other machines can reach, without"):
        Server(config, lambda _: make_model(make_runner()))
