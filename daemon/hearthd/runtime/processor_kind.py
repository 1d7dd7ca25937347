"""Which processor this is, as far as the last bits of a result depend on it. Called by `model`."""

import platform
from pathlib import Path

__all__ = ["processor_kind"]


def processor_kind() -> str:
    """Return what ONNX Runtime chooses its kernels by: architecture, processor and its features."""
    names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part", "CPU variant")
    found = [platform.machine()]
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names and f"{name.strip()}:{value}" not in found:
            found.append(f"{name.strip()}:{value}")
    return "\n".join(found)
