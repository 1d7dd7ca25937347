"""What the figures belong to: the machine, and the memory that a process of it has.

Reads /proc and the device tree, runs nothing. Called by `bench`, and by `build.report`.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine", "ResidentSet", "available_bytes"]

# Shared anonymous memory has these names in a process's map.
_SHARED_ANONYMOUS = ("/dev/zero", "/memfd:", "/SYSV")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as its system knows it. cpus: that this process may use."""

    name: str
    architecture: str
    cpus: int
    memory_mb: int

    @classmethod
    def here(cls) -> Machine:
        """Describe this machine."""
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(_name(), platform.machine(), len(os.sched_getaffinity(0)), round(pages / 1e6))

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture}, {self.cpus} CPUs, {self.memory_mb:,} MB)"


def _name() -> str:
    # A board's own name says more than its processor's.
    board = Path("/proc/device-tree/model")
    if board.is_file():
        return board.read_bytes().rstrip(b"\0").decode(errors="replace")
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))), "unknown"
    )


def available_bytes() -> int:
    """Return what the kernel believes that programs can still have without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


@dataclass(frozen=True, slots=True)
class ResidentSet:
    """Bytes of a process that are in memory. own: anonymous and KV; files: mapped, so the kernel may drop them.

    weights: the share of files that is model weights.
    """

    total: int
    own: int
    files: int
    weights: int

    @classmethod
    def of_this_process(cls, weights_directory: Path) -> ResidentSet:
        """Read the kernel's accounts of this process, exact ones, by mapping."""
        total = own = weights = 0
        name = ""
        for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
            words = line.split()
            if not words[0].endswith(":"):
                name = line.split(maxsplit=5)[5] if len(words) > 5 else ""
            elif words[0] == "Rss:":
                size = int(words[1]) * 1024
                total += size
                if name.startswith(_SHARED_ANONYMOUS):
                    own += size
                elif name.startswith(f"{weights_directory}/"):
                    weights += size
            elif words[0] == "Anonymous:":
                own += int(words[1]) * 1024
        return cls(total, own, total - own, weights)
