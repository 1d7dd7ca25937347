"""Which instructions the processor has for int8, and with them which kernels ONNX Runtime takes. Called by `cli`.

What ONNX Runtime 1.31 chooses by: on x86-64 MLAS looks for AMX, then VNNI (with 512 bits, then 256), then AVX2; on Arm
for i8mm, then the dot product. It reads them from the kernel, as this does.
"""

from collections.abc import Iterable
from typing import Final

from hearthd.doctor.finding import Finding, good, problem, warning
from hearthd.doctor.system import System

__all__ = ["check_processor"]

_X86: Final = (
    ("amx_int8", "AMX tiles"),
    ("avx512_vnni", "VNNI with 512 bits"),
    ("avx_vnni", "VNNI with 256 bits"),
)
_ARM: Final = (("i8mm", "8-bit matrix products (i8mm)"), ("asimddp", "8-bit dot products (asimddp)"))


def check_processor(system: System) -> Iterable[Finding]:
    """Say which int8 kernels will run."""
    flags = _flags(system.read("/proc/cpuinfo") or "")
    if not flags:
        yield warning(
            "processor",
            "/proc/cpuinfo cannot be read, and ONNX Runtime chooses its kernels by it",
            "in a sandbox, do not set ProcSubset=pid",
        )
        return
    known, plain = (_ARM, "asimd") if "asimd" in flags else (_X86, "avx2")
    found = [name for flag, name in known if flag in flags]
    if found:
        yield good("processor", f"ONNX Runtime multiplies int8 with {found[0]}")
    elif plain in flags:
        yield warning(
            "processor",
            f"no instruction for 8-bit products: ONNX Runtime takes plain {plain.upper()} kernels, which are slower",
            "nothing can be set; processors since Cortex-A55 and A76 (Raspberry Pi 5), or with VNNI, have them",
        )
    else:
        yield problem(
            "processor",
            "this processor has none of AVX2, VNNI, NEON; ONNX Runtime may not run on it",
            "use a 64-bit Arm board, or an x86-64 processor with AVX2",
        )


def _flags(cpuinfo: str) -> set[str]:
    """Return what every core has: a big and a little one may differ, and a thread may run on either."""
    cores = [
        set(value.split())
        for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())
        if key.strip() in ("flags", "Features")
    ]
    return set.intersection(*cores) if cores else set()
