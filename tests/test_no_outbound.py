"""A daemon that serves connects to nobody: as the kernel saw it, and where there is no network at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from hearth import Client, Message
from hearthd.access.tokens import create_token
from hearthd.bundles.bundle import Bundle
from tls_files import make_tls_files

pytestmark = pytest.mark.model

# Local services of this machine, to which no word of a chat goes: the journal, systemd itself, and glibc's name cache.
LOCAL = re.compile(r'sun_path=@?"(/run/systemd/|/var/run/nscd/|/run/dbus/)')
# What the test looks for, done by a program that does it.
TELLTALE = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect(("127.0.0.1", 9))
sock.sendto(b"", ("127.0.0.1", 9))
"""
# Enters a network of its own, in which there is nothing but loopback, then becomes the daemon.
ALONE = """
import ctypes, fcntl, os, socket, struct, sys
CLONE_NEWNET, CLONE_NEWUSER, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x10000000, 0x8914, 1
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(CLONE_NEWNET) and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
    sys.exit("kernel: " + os.strerror(ctypes.get_errno()))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@contextlib.contextmanager
def daemon(directory: Path, bundle: Bundle, *python: str) -> Iterator[subprocess.Popen[bytes]]:
    """The real daemon with the real model, as open as it can be; policy, audit log and metrics included."""
    tls = make_tls_files(directory)
    create_token(directory / "tokens", "phone")
    (directory / "policy.toml").write_text(
        '[[system]]\nprompt = "Be kind."\n[[blocked]]\nname = "r"\non = "output"\nphrases = ["zebra"]\n'
    )
    config = directory / "hearthd.toml"
    config.write_text(
        textwrap.dedent(
            f"""
            [server]
            unix_socket = "{directory}/hearthd.sock"
            tcp = ["0.0.0.0:0"]
            [tls]
            certificate = "{tls.certificate}"
            key = "{tls.key}"
            [auth]
            token_file = "{directory}/tokens"
            usage_file = ""
            [policy]
            file = "{directory}/policy.toml"
            [audit]
            file = "{directory}/audit.jsonl"
            [metrics]
            address = "localhost:0"
            [model]
            directory = "{bundle.path.parent}"
            [engine]
            threads = 1
            """
        )
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [*python, "-m", "hearthd", "serve", "--config", str(config)],
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield process
    finally:
        # strace ignores what would end it, as long as the daemon runs.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in [int(children[0])] if python[0] == "strace" and children else [process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
                break


def use(directory: Path) -> None:
    """Do what callers do: chat, count, ask for status and models, fail."""
    with Client(f"unix://{directory}/hearthd.sock", ready_timeout=90, timeout=90) as client:
        answer = client.chat([Message("user", "Name a colour. See https://example.com and 192.0.2.1.")], max_tokens=8)
        assert answer.text
        client.models()
        client.status()
        client.count_tokens("one two three")


def to_others(trace: Path) -> list[str]:
    """The calls that name somebody else's address."""
    calls = trace.read_text(encoding="utf-8", errors="replace").splitlines()
    named = [call for call in calls if re.search(r"\b(connect|sendto|sendmsg|sendmmsg)\(.*sa_family=", call)]
    return [call for call in named if not LOCAL.search(call)]


def log_of(directory: Path) -> str:
    return (directory / "log").read_text(encoding="utf-8", errors="replace")


def test_kernel_sees_no_connection_and_no_datagram_go_out(tmp_path: Path, default_bundle: Bundle) -> None:
    assert shutil.which("strace"), "strace is missing; `make test` installs it"
    trace = tmp_path / "trace"
    tracing = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=%network", "-e", "signal=none", "-o", str(trace)]
    probe = subprocess.run([*tracing, sys.executable, "-c", TELLTALE], capture_output=True, text=True, check=False)
    if not trace.exists() or not to_others(trace):
        pytest.skip(f"the kernel forbids tracing here: {probe.stderr.strip()}")
    assert len(to_others(trace)) == 2
    with daemon(tmp_path, default_bundle, *tracing, sys.executable):
        use(tmp_path)
    calls = trace.read_text(encoding="utf-8", errors="replace").splitlines()
    # What was observed is a daemon that listened and answered.
    assert any("listen(" in call for call in calls), log_of(tmp_path)
    assert any(re.search(r"\baccept4?\(", call) for call in calls)
    assert to_others(trace) == []
    assert [call for call in calls if re.search(r"\bsocket\(AF_(PACKET|VSOCK|BLUETOOTH)", call)] == []


def test_all_of_it_works_where_there_is_no_network(tmp_path: Path, default_bundle: Bundle) -> None:
    with daemon(tmp_path, default_bundle, sys.executable, "-c", ALONE) as process:
        try:
            use(tmp_path)
        except Exception:
            if process.poll() is not None and "kernel:" in log_of(tmp_path):
                pytest.skip(f"the kernel forbids a network of one's own here: {log_of(tmp_path).strip()}")
            raise
        proc = Path(f"/proc/{process.pid}")
        devices = re.findall(r"^ *(\w+):", (proc / "net/dev").read_text(), re.MULTILINE)
        assert devices == ["lo"]
        for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
            sockets = (proc / "net" / table).read_text().splitlines()[1:]
            # 0A: listening (include/net/tcp_states.h).
            assert [line for line in sockets if line.split()[3] != "0A"] == []
        # Nothing was sent, not even to itself; nobody asked for a name.
        (sent,) = re.findall(r"^ *lo:(?: *\d+){8} *\d+ *(\d+)", (proc / "net/dev").read_text(), re.MULTILINE)
        assert sent == "0"
