"""A Debian root with systemd as its first process and no network, in which packages are installed for real.

mmdebstrap makes the root once (HEARTH_CACHE may lie outside the clone and outlive it); systemd-nspawn boots a copy of
it in a few seconds, on this machine's own processor. Needs root. Knows nothing of Hearth. Used by test_deb_install.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Less than Raspberry Pi OS Lite has; what a package of ours needs beyond it would be missed.
PACKAGES = "systemd,systemd-sysv,dbus,python3,init-system-helpers"
BOOT_SECONDS = 120
# What a board has: no proxy, no settings of this machine.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root", "TERM": "dumb"}


@dataclass(frozen=True, slots=True)
class Machine:
    """A booted root. `root` is its file system seen from outside."""

    root: Path
    leader: int
    """Its first process, as this machine numbers it."""

    def run(self, *command: str, check: bool = True, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command as its root; return what it said, both streams in one."""
        done = subprocess.run(
            ["nsenter", "--all", "--target", str(self.leader), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**ENVIRONMENT, "DEBIAN_FRONTEND": "noninteractive"},
            timeout=seconds,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}")
        return done

    def property(self, unit: str, name: str) -> str:
        """Return a unit's property."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()


def can_boot() -> bool:
    """Whether this machine has what is needed."""
    return os.geteuid() == 0 and all(map(shutil.which, ("systemd-nspawn", "mmdebstrap", "nsenter")))


def prepare(root: Path, suite: str) -> Path:
    """Return the archive of a Debian release's root, made if it is not there yet."""
    cache = Path(os.environ.get("HEARTH_CACHE") or root / ".cache").resolve() / "deb"
    archive = cache / f"root-{suite}.tar"
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as directory:
            made = Path(directory) / archive.name
            command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", suite, str(made)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
            made.rename(archive)
    return archive


@contextmanager
def booted(archive: Path, directory: Path) -> Iterator[Machine]:
    """Boot a copy of the root below directory; it is powered off, and removed, at the end."""
    root = directory / "root"
    root.mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(root)], check=True)
    command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--boot"]
    command += ["--console=pipe", f"--directory={root}"]
    with (directory / "console").open("wb") as console:
        container = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=ENVIRONMENT)
    try:
        yield Machine(root, _wait_until_up(container))
    finally:
        container.terminate()  # nspawn passes it on as a request to power off
        try:
            container.wait(60)
        except subprocess.TimeoutExpired:
            container.kill()
            container.wait()
        shutil.rmtree(root, ignore_errors=True)


def _wait_until_up(container: "subprocess.Popen[bytes]") -> int:
    """Return the first process's number once systemd has started everything."""
    deadline = time.monotonic() + BOOT_SECONDS
    children = Path(f"/proc/{container.pid}/task/{container.pid}/children")
    while time.monotonic() < deadline and container.poll() is None:
        for leader in children.read_text(encoding="ascii").split():
            # Returns when the start-up is over, or at once while there is nobody to ask.
            asked = ["nsenter", "--all", "--target", leader, "systemctl", "is-system-running", "--wait"]
            said = subprocess.run(asked, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=60)
            if said.stdout.strip() in ("running", "degraded"):
                return int(leader)
        time.sleep(0.1)  # nspawn has no event for a child that is about to be
    raise AssertionError(f"the root did not boot within {BOOT_SECONDS} s; see the file console beside it")
