"""A systemd of the test's own, as process 1 of namespaces of its own, on this machine's files: units run for real.

Needs root. The network, processes and mounts are the namespaces'; /run, /var/lib and /var/cache begin empty, what is
written to /etc goes to memory, and all of it is gone afterwards. The units are those of deploy/systemd, with a drop-in
that says where this clone is, since nothing is installed; everything else of them is in force: user, sandbox, system
calls, limits, watchdog.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Self

from places import DEFAULT_BUNDLE, ROOT

UNITS = ROOT / "deploy/systemd"
_SYSTEMD = Path("/lib/systemd/systemd")
_PATIENCE_SECONDS = 60
# What the daemon's units, and every unit by default, are ordered by; nothing of this machine's own is to be started.
_TARGETS = ("basic", "multi-user", "network-online", "shutdown", "sockets", "sysinit", "time-sync")
_START = """
set -e
mount --make-rprivate /
umount -R /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/units /run/clone /run/python /run/etc/upper /run/etc/work
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work overlay /etc
mkdir -p /etc/systemd /etc/hearth /etc/credstore
for place in /var/lib /var/cache /etc/systemd; do mount -t tmpfs -o mode=755 tmpfs $place; done
cp -a {units}/. /run/units/
mount --bind {root} /run/clone
mount --bind {python} /run/python
mount -t proc proc /proc
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# As systemd does it where it is not in a container: by shared mounts, credentials reach a service.
mount --make-rshared /
export container=other SYSTEMD_UNIT_PATH=/run/units
exec {systemd} --system --log-target=null --unit=basic.target
"""
# An interpreter's shared library is sought where it was built for, which is a directory that the unit hides.
_HEARTHD = """#!/bin/sh
export LD_LIBRARY_PATH=/run/python/lib
exec /run/python/{python} -P -c 'import sys; from hearthd.__main__ import main; sys.exit(main(sys.argv[1:]))' "$@"
"""
_DROP_IN = """[Service]
Environment=PATH=/run/units/bin:/usr/bin:/bin
Environment=PYTHONPATH=/run/clone/daemon:/run/clone/client:{packages}
Environment=HEARTHD_MODEL_DIRECTORY=/run/clone/{models} HEARTHD_ENGINE_THREADS=1 PYTHONDONTWRITEBYTECODE=1
TimeoutStartSec=120
WatchdogSec={watchdog_seconds}
StandardOutput=append:/run/hearthd.log
StandardError=append:/run/hearthd.log
"""


def why_not() -> str:
    """Return what a systemd of the test's own lacks here; "" if nothing."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in ("unshare", "nsenter", "systemctl") if shutil.which(name) is None]
    if missing or not _SYSTEMD.exists():
        return "needs systemd and util-linux"
    probe = [
        "unshare",
        "--pid",
        "--mount",
        "--cgroup",
        "--net",
        "--fork",
        "mount",
        "-t",
        "cgroup2",
        "x",
        "/sys/fs/cgroup",
    ]
    return "" if subprocess.run(probe, capture_output=True, check=False).returncode == 0 else "needs namespaces"


class SystemdMachine:
    """Runs for the length of a with block."""

    def __init__(self, directory: Path, *, watchdog_seconds: int = 3) -> None:
        units = directory / "units"
        shutil.copytree(UNITS, units)
        (units / "bin").mkdir()
        prefix = Path(sys.base_prefix)
        interpreter = (prefix / "bin" / f"python{sysconfig.get_python_version()}").relative_to(prefix)
        (units / "bin/hearthd").write_text(_HEARTHD.format(python=interpreter))
        (units / "bin/hearthd").chmod(0o755)
        for name in _TARGETS:
            (units / f"{name}.target").write_text(f"[Unit]\nDescription={name}\nDefaultDependencies=no\n")
        packages = Path(sysconfig.get_path("purelib")).relative_to(ROOT)
        text = _DROP_IN.format(
            packages=f"/run/clone/{packages}",
            models=DEFAULT_BUNDLE.parent.relative_to(ROOT),
            watchdog_seconds=watchdog_seconds,
        )
        for name in ("hearthd", "hearthd-local", "hearthd@"):
            (units / f"{name}.service.d").mkdir()
            (units / f"{name}.service.d/clone.conf").write_text(text)
        places = {"units": units, "root": ROOT, "python": prefix, "systemd": _SYSTEMD}
        self._script = _START.format(**{name: shlex.quote(str(path)) for name, path in places.items()})

    def __enter__(self) -> Self:
        namespaces = ["--pid", "--mount", "--cgroup", "--ipc", "--uts", "--net", "--fork", "--kill-child=SIGKILL"]
        self._unshare = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", self._script], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self.run("systemctl", "is-system-running", "--wait").stdout.strip() != "running":
            assert self._unshare.poll() is None, "systemd ended"
            assert time.monotonic() < deadline, "systemd did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._unshare.kill()
        self._unshare.wait()

    def command(self, *words: str) -> list[str]:
        """Return what runs a command inside, as root."""
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().split()
        if not children:  # not yet
            return ["false"]
        return ["nsenter", "-t", children[0], "-m", "-p", "-i", "-u", "-n", "-C", *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), capture_output=True, text=True, check=False, timeout=120)

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run("systemctl", *words)

    def write(self, path: str, text: str) -> None:
        done = subprocess.run(self.command("tee", path), input=text, text=True, check=False, capture_output=True)
        assert done.returncode == 0, done.stderr

    def show(self, unit: str) -> dict[str, str]:
        names = ("ActiveState", "StatusText", "NRestarts", "Result", "MainPID")
        said = self.systemctl("show", unit, *(f"--property={name}" for name in names)).stdout
        return dict(line.partition("=")[::2] for line in said.splitlines())

    def wait_until(self, unit: str, **expected: str) -> dict[str, str]:
        """Return the unit's properties once these are as expected. systemd tells nobody without a bus: it is asked."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not expected.items() <= (found := self.show(unit)).items():
            assert time.monotonic() < deadline, f"{found}; {self.log}"
        return found

    @property
    def log(self) -> str:
        return self.run("cat", "/run/hearthd.log").stdout
