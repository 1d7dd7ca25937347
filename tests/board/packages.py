"""What is on the stick: the packages of this clone, and one of the same content that calls itself newer.

Called by `scenario`.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from image import ROOT

__all__ = ["NEWER", "add_newer", "build_packages"]

NEWER: Final = "+newer"
"""The later version ends with this."""
_BUILD: Final = ROOT / "deploy/debian/build.py"


def build_packages(output: Path) -> Path:
    """Build the arm64 packages of this clone, and return the directory that holds them and nothing else."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, str(_BUILD), "--arch", "arm64", "--output", str(output)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return output


def add_newer(packages: Path) -> None:
    """Put the daemon's package into `newer` beside it, with a later version, not compressed."""
    (package,) = packages.glob("hearth_*.deb")
    newer = packages / "newer"
    shutil.rmtree(newer, ignore_errors=True)
    newer.mkdir()
    with tempfile.TemporaryDirectory(prefix="hearth-newer-", dir=packages.parent) as scratch:
        root = Path(scratch) / "root"
        subprocess.run(["dpkg-deb", "--raw-extract", str(package), str(root)], check=True)
        control = root / "DEBIAN/control"
        text, count = re.subn(r"(?m)^Version: (.*)$", rf"Version: \1{NEWER}", control.read_text(encoding="utf-8"))
        assert count == 1
        control.write_text(text, encoding="utf-8")
        command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(newer)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
