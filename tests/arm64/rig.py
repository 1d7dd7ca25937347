"""An arm64 userland without a board: Debian's Python and the daemon's aarch64 wheels, run by qemu on a named CPU.

Nothing here needs root or binfmt_misc: mmdebstrap only unpacks (variant `extract`), the wheels are unpacked by this
machine's pip, and qemu runs the interpreter with the root as its library prefix. Files that the root has not (the
clone, the bundle) are read from this machine. Emulation proves which kernels are chosen and what they compute, never a
speed.

Knows nothing of models. Used by `compare`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
PYTHON_VERSION = "3.11"  # the suite's
QEMU = "qemu-aarch64-static"
# Newest first: pip takes a wheel of any of them, and bookworm's glibc is 2.36.
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")


@dataclass(frozen=True, slots=True)
class Board:
    """A board's processor: qemu's name for it, and the lines by which its kernel describes it."""

    name: str
    qemu_cpu: str
    part: str
    variant: str
    revision: str
    features: str

    def cpuinfo(self) -> str:
        """Return /proc/cpuinfo of the board's four cores."""
        core = (
            f"BogoMIPS\t: 108.00\nFeatures\t: {self.features}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
            f"CPU variant\t: {self.variant}\nCPU part\t: {self.part}\nCPU revision\t: {self.revision}\n\n"
        )
        return "".join(f"processor\t: {number}\n{core}" for number in range(4))


RASPBERRY_PI_4 = Board("Pi 4 (Cortex-A72)", "cortex-a72", "0xd08", "0x0", "3", "fp asimd evtstrm crc32 cpuid")
RASPBERRY_PI_5 = Board(
    "Pi 5 (Cortex-A76)",
    "cortex-a76",
    "0xd0b",
    "0x4",
    "1",
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
)


@dataclass(frozen=True, slots=True)
class Rig:
    """A prepared root and the packages beside it."""

    root: Path
    packages: Path

    def run(self, board: Board, script: Path, *arguments: str) -> str:
        """Run a Python script on the board's processor and return what it printed; its stderr is ours.

        Raises subprocess.CalledProcessError. An illegal instruction shows as return code -4.
        """
        self._describe(board)
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
            "LANG": "C.UTF-8",
            "QEMU_CPU": board.qemu_cpu,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "client", ROOT / "daemon", self.packages))),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        interpreter = self.root / f"usr/bin/python{PYTHON_VERSION}"
        command = [QEMU, "-L", str(self.root), str(interpreter), "-s", str(script), *arguments]
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    def _describe(self, board: Board) -> None:
        """Put the board's description of its processor where programs on Arm look for it.

        ONNX Runtime's cpuinfo library crashes on import if it meets this machine's x86 /proc/cpuinfo instead, and picks
        its kernels by what it reads here and in the auxiliary vector, which qemu fills.
        """
        files = {
            "proc/cpuinfo": board.cpuinfo(),
            "sys/devices/system/cpu/kernel_max": "255\n",
            "sys/devices/system/cpu/possible": "0-3\n",
            "sys/devices/system/cpu/present": "0-3\n",
        }
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="ascii")


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where the root and the wheels are kept: HEARTH_CACHE may lie outside the clone and outlive it."""
    return Path(environment.get("HEARTH_CACHE") or ROOT / ".cache").resolve() / "arm64"


def prepare(cache: Path) -> Rig:
    """Return a rig, made if it is not there yet or if what it is made from has changed."""
    cache.mkdir(parents=True, exist_ok=True)
    root = cache / f"root-{SUITE}"
    if not root.is_dir():
        _install(root, _make_root)
    constraints = ROOT / "constraints.txt"
    made_from = constraints.read_bytes() + "\n".join(_requirements()).encode() + Path(__file__).read_bytes()
    packages = cache / f"packages-{hashlib.sha256(made_from).hexdigest()[:16]}"
    if not packages.is_dir():
        for stale in cache.glob("packages-*"):
            shutil.rmtree(stale)
        _install(packages, _unpack_wheels)
    return Rig(root, packages)


def _install(target: Path, make: Callable[[Path], None]) -> None:
    """Make a directory beside its final place and rename it: what exists under the final name is complete."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unfinished-") as unfinished:
        made = Path(unfinished) / target.name
        make(made)
        made.rename(target)


def _make_root(target: Path) -> None:
    print(f"arm64: unpacking a {SUITE} root", file=sys.stderr, flush=True)
    # Python and its libraries; libstdc++ is what the wheels link to. The mirror is mmdebstrap's own choice.
    packages = f"python{PYTHON_VERSION},libstdc++6"
    # Without root, `chrootless` is the one mode that needs no subordinate ids; no package's script runs in either.
    mode = "root" if os.geteuid() == 0 else "chrootless"
    archive = target.with_suffix(".tar")
    command = ["mmdebstrap", "--quiet", f"--mode={mode}", "--variant=extract", "--arch=arm64", "--format=tar"]
    command += [f"--include={packages}", SUITE, str(archive)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    target.mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(target), "--no-same-owner", "--exclude=./dev"], check=True)


def _requirements() -> list[str]:
    """Return what the daemon needs on a board, without systemd-python: it has no wheels, and Debian packages it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    everything: list[str] = project["dependencies"] + project["optional-dependencies"]["daemon"]
    return [line for line in everything if not line.startswith("systemd-python")]


def _unpack_wheels(target: Path) -> None:
    print("arm64: unpacking the daemon's aarch64 wheels", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    command += ["--target", str(target), "--no-compile", "--only-binary", ":all:"]
    command += ["--python-version", PYTHON_VERSION, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    command += ["-c", str(ROOT / "constraints.txt"), *_requirements()]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
