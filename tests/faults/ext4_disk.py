"""A small ext4 disk in a file, whose power can be cut: real kernel, real journal, no FUSE, no device mapper.

The cut is the file system's own: EXT4_IOC_SHUTDOWN without a flush of the log, which xfstests uses to the same end.
From then on every call on the disk fails with EIO, as on a disk that has died; mounted again, it has what was written
through before, and of the rest whatever had happened to be written. `noauto_da_alloc` takes away ext4's kindness to
programs that rename without fsync, and `commit=300` that nothing is written through by the mere passing of time.

Needs root, a loop device and ext4. Called by `fell` and the tests of full, read-only and dying disks.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

_OPTIONS = "loop,noauto_da_alloc,commit=300"
# _IOR('X', 125, __u32) of linux/ext4.h; 2 is EXT4_GOING_FLAGS_NOLOGFLUSH.
_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2


def missing() -> str:
    """Why there can be no such disk here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root, to mount a disk"
    if not Path("/dev/loop-control").exists():
        return "needs loop devices"
    absent = [name for name in ("mkfs.ext4", "mount", "umount") if not shutil.which(name, path=_path())]
    return f"needs {', '.join(absent)}" if absent else ""


class Disk:
    """A mounted disk of its own; unmounted and removed at the end of its `with` block."""

    def __init__(self, directory: Path, *, megabytes: int = 32) -> None:
        self._image = directory / "disk.img"
        self.path = directory / "disk"
        """Where it is mounted."""
        self._megabytes = megabytes

    def __enter__(self) -> Disk:
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(self._megabytes * 2**20)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", str(self._image))
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        # Lazily: a test that failed may still have a file open there.
        subprocess.run(["umount", "-l", str(self.path)], check=False, capture_output=True, env=_environment())
        self._image.unlink()

    def mount(self) -> None:
        """Mount it, which replays the journal after a cut."""
        _run("mount", "-o", _OPTIONS, str(self._image), str(self.path))

    def unmount(self) -> None:
        _run("umount", str(self.path))

    def remount(self, option: str) -> None:
        """Give `ro` or `rw`."""
        _run("mount", "-o", f"remount,{option}", str(self.path))

    def sync(self) -> None:
        """Write everything through, as the passing of time would."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
                raise OSError(ctypes.get_errno(), "syncfs")
        finally:
            os.close(descriptor)

    def cut_power(self) -> None:
        """Lose what was not written through. Every call on the disk fails with EIO until it is mounted anew."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(descriptor)

    def fill(self) -> Path:
        """Leave not one free byte; return the file that takes them all."""
        ballast = self.path / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:  # ENOSPC, for this size
                    continue
        return ballast


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, env=_environment())


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": _path()}


def _path() -> str:
    # A person's PATH often has no sbin.
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
