"""What machine this is, as a reader of figures needs it. Called by `../compare.py` and `install.py`."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

# Of the instructions that a processor has, those that decide how fast int8 is.
_TELLING = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets that the kernel names."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def describe() -> dict[str, Any]:
    """Return the processor, its cores, the flags that matter here, memory, kernel and Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in _TELLING if flag in cpu_flags()],
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }
