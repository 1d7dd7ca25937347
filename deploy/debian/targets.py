"""What the packages are built for: processors, and the Debian release that each Python comes with.

A package holds extension modules and bytecode of one minor version of Python, the release's own, so there is one for
each release. Knows nothing of how a package is made. Used by `lock`, `build` and the modules that they call.
"""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ARCHITECTURES", "ROOT", "SUITES", "TARGETS", "Suite", "Target"]

ROOT = Path(__file__).resolve().parents[2]
# Debian's name of a processor -> the wheels'.
ARCHITECTURES = {"arm64": "aarch64", "amd64": "x86_64"}


@dataclass(frozen=True, slots=True)
class Suite:
    """A Debian release; Raspberry Pi OS goes by the same names."""

    name: str
    version: str
    """Stands in the packages' version, so that an upgrade of the release is one of the package."""
    glibc: tuple[int, int]


SUITES = {"3.11": Suite("bookworm", "deb12", (2, 36)), "3.13": Suite("trixie", "deb13", (2, 41))}


@dataclass(frozen=True, slots=True)
class Target:
    """A processor and a Python."""

    architecture: str
    python: str

    @property
    def suite(self) -> Suite:
        """The release whose Python this is."""
        return SUITES[self.python]

    @property
    def next_python(self) -> str:
        """The first minor version that what is built for this one does not run on."""
        major, minor = self.python.split(".")
        return f"{major}.{int(minor) + 1}"

    def pip_options(self) -> list[str]:
        """Return what makes pip take wheels for this target, whatever machine it runs on."""
        processor = ARCHITECTURES[self.architecture]
        options = ["--only-binary", ":all:", "--python-version", self.python, "--implementation", "cp", "--no-compile"]
        # Newest first; pip takes a wheel of any that is named, and knows no order among C libraries by itself.
        for minor in range(self.suite.glibc[1], 16, -1):
            options += ["--platform", f"manylinux_2_{minor}_{processor}"]
        return [*options, "--platform", f"manylinux2014_{processor}"]


TARGETS = tuple(Target(architecture, python) for python in SUITES for architecture in ARCHITECTURES)
