"""The disk of an emulated board: Debian 12 for arm64 as it comes out of its box, and an agent that runs commands.

mmdebstrap unpacks the packages, and their own scripts run under qemu's user-mode emulation. That needs root, as does
telling the kernel which emulator runs arm64 programs (binfmt_misc, which is put back as it was). Everybody else is
asked for sudo. The packages are those of a small Debian on a board (systemd, sudo, Python); nothing of Hearth is in it,
and while it is built is the last time that the board sees a network.

Knows nothing of Hearth or of emulated boards. `prepare` is called by `scenario`; as a program, run by it, this makes
one image.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
SUITE: Final = "bookworm"
# What somebody finds who has written Debian or Raspberry Pi OS Lite to an SD card and no more.
PACKAGES: Final = (
    *("systemd", "systemd-sysv", "systemd-timesyncd", "libpam-systemd", "libnss-systemd", "dbus", "udev", "kmod"),
    *("netbase", "iproute2", "procps", "sudo", "less", "man-db", "bash-completion", "ca-certificates", "openssl"),
    *("python3", "linux-image-cloud-arm64", "initramfs-tools"),
)
DISK_SIZE: Final = "4G"  # sparse
BINFMT: Final = Path("/proc/sys/fs/binfmt_misc")
EMULATOR: Final = "/usr/bin/qemu-aarch64-static"
# An ELF file of 64 bits, little-endian, executable or shared, for machine 183 (aarch64). F: the kernel opens the
# emulator now, so that it is found inside of the new root as well.
REGISTRATION: Final = (
    rb":hearth-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    rb":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:" + EMULATOR.encode() + b":F"
)
FILES: Final = {
    "etc/hostname": "raspberrypi\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 raspberrypi\n::1 localhost\n",
    "etc/fstab": "LABEL=board / ext4 errors=remount-ro 0 1\n",
    # Empty: systemd makes one at the first boot, and asks nobody about the rest ("uninitialized" would).
    "etc/machine-id": "",
    "etc/sudoers.d/pi": "pi ALL=(ALL) NOPASSWD: ALL\n",
    "etc/systemd/network/wired.network": "[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n",
    "etc/systemd/system/board-agent.service": (
        "[Unit]\nDescription=Runs what the test outside of the board asks for\n"
        "After=dev-virtio\\x2dports-hearth.board.device multi-user.target\n"
        "[Service]\nExecStart=/usr/bin/python3 /usr/local/lib/board-agent.py\nRestart=always\nRestartSec=1\n"
        "[Install]\nWantedBy=default.target\n"
    ),
}
# Debian's initramfs has every driver there is; unpacking that takes an emulated board long.
INITRAMFS: Final = {
    "etc/initramfs-tools/conf.d/board": "MODULES=list\nCOMPRESS=gzip\n",
    "etc/initramfs-tools/modules": "virtio_mmio\nvirtio_pci\nvirtio_blk\nvirtio_net\next4\ncrc32c_generic\n",
}


@dataclass(frozen=True, slots=True)
class Image:
    """What a board is started from. Nobody writes to these files: a board gets a copy of the disk."""

    disk: Path
    kernel: Path
    initrd: Path


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where images are kept: HEARTH_CACHE may lie outside the clone and outlive it."""
    return Path(environment.get("HEARTH_CACHE") or ROOT / ".cache").resolve() / "board"


def prepare(cache: Path) -> Image:
    """Return the image, made if it is not there yet or if what it is made from has changed: 4 minutes."""
    made_from = Path(__file__).read_bytes() + (HERE / "agent.py").read_bytes()
    directory = cache / f"image-{_digest(made_from)}"
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        for stale in cache.glob("image-*"):
            shutil.rmtree(stale)
        print(f"board: making a {SUITE} image, once; this takes minutes", file=sys.stderr, flush=True)
        sudo = [] if os.geteuid() == 0 else ["sudo"]
        subprocess.run([*sudo, sys.executable, str(Path(__file__).resolve()), str(directory)], check=True)
    return Image(directory / "disk.img", directory / "vmlinuz", directory / "initrd.img")


def build(directory: Path) -> None:
    """Make an image beside its final place and rename it: what exists under the final name is complete."""
    packages = directory.parent / f"packages-{_digest(repr((SUITE, PACKAGES, INITRAMFS)).encode())}.tar"
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="unfinished-") as unfinished:
        scratch, root, made = (Path(unfinished) / name for name in ("scratch", "root", "image"))
        for path in (scratch, root, made):
            path.mkdir()
        if not packages.exists():
            for stale in directory.parent.glob("packages-*.tar"):
                stale.unlink()
            with _registered_emulator():
                _install_packages(scratch).rename(packages)
        subprocess.run(["tar", "-xf", str(packages), "-C", str(root), "--numeric-owner", "--xattrs"], check=True)
        _place(root, FILES)
        shutil.copy(HERE / "agent.py", root / "usr/local/lib/board-agent.py")
        _enable(root, "board-agent.service")
        # The journal outlives a pulled plug; apt has nowhere to go.
        (root / "var/log/journal").mkdir(exist_ok=True)
        (root / "etc/apt/sources.list").unlink()
        for name in ("vmlinuz", "initrd.img"):
            shutil.copy((root / name).resolve(), made / name)
        command = ["/usr/sbin/mkfs.ext4", "-q", "-F", "-L", "board", "-d", str(root), str(made / "disk.img"), DISK_SIZE]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for path in made.iterdir():
            path.chmod(0o644)  # whoever called sudo reads them
        made.rename(directory)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@contextmanager
def _registered_emulator() -> Iterator[None]:
    """Let the kernel run arm64 programs in the block, where it does not already."""
    was_mounted = (BINFMT / "register").exists()
    if not was_mounted:
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], check=True)
    entries = (path for path in BINFMT.iterdir() if path.name not in ("register", "status"))
    was_registered = any("aarch64" in path.read_text() for path in entries)
    if not was_registered:
        (BINFMT / "register").write_bytes(REGISTRATION)
    try:
        yield
    finally:
        if not was_registered:
            (BINFMT / "hearth-aarch64").write_text("-1")
        if not was_mounted:
            subprocess.run(["umount", str(BINFMT)], check=False)


def _install_packages(scratch: Path) -> Path:
    """Return a tar archive of a root with all packages installed and configured."""
    archive = scratch / "packages.tar"
    _place(scratch, INITRAMFS)
    hooks = [
        f"--essential-hook=copy-in {scratch}/etc /",
        '--customize-hook=chroot "$1" useradd --create-home --shell /bin/bash pi',
        '--customize-hook=chroot "$1" systemctl --quiet enable systemd-networkd',
    ]
    command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=apt", "--arch=arm64", "--format=tar"]
    command += ['--aptopt=Acquire::Retries "3"', f"--include={','.join(PACKAGES)}", *hooks, SUITE, str(archive)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return archive


def _enable(root: Path, unit: str) -> None:
    wants = root / "etc/systemd/system/default.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / unit).symlink_to(f"/etc/systemd/system/{unit}")


def _place(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o440 if "sudoers" in name else 0o644)


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
