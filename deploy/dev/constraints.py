"""Write constraints*.txt: the exact version of everything that the ranges in pyproject.toml resolve to today.

Asks pip to resolve as if nothing were installed, and installs nothing. Names and versions only: no address, no hash, so
that any index serves. Knows no package by name but the build backends, which pip resolves apart. Run by
`make constraints`, with the development environment's Python.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# pip itself (dependency groups need a newer one than Debian's), and what builds hearth-chat and systemd-python.
INSTALLERS = ("pip", "hatchling", "editables", "setuptools")
# File -> what is installed under it. Optimum's exporter wants an older transformers than the one that answers are
# compared with, so the two have environments of their own.
FILES = {
    "constraints.txt": ("-e", ".[daemon]", "--group", "test", "--group", "reference"),
    "constraints-export.txt": ("-e", ".[daemon,export]", "torch==2.13.0"),
}
HEADER = """\
# Exact versions of all that {installs}. Written by `make constraints`: never edit.
# The ranges that a user of the package gets stand in pyproject.toml.
"""
INSTALLS = {
    "constraints.txt": "`make demo` and `make test` install",
    "constraints-export.txt": "`make setup-export` installs",
}


def resolve(wanted: tuple[str, ...]) -> dict[str, str]:
    """Return the version of each distribution by its normalised name, without hearth-chat itself."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", report.name, *wanted, *INSTALLERS]
        subprocess.run(command, cwd=ROOT, check=True)
        resolved = json.load(report)["install"]
    versions: dict[str, str] = {}
    for item in resolved:
        # A local version (2.13.0+cpu) exists on one index only; a constraint without it admits it too.
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        versions[name] = item["metadata"]["version"].partition("+")[0]
    del versions["hearth-chat"]
    return versions


def main() -> None:
    """Write the file that is named, or both."""
    for name in sys.argv[1:] or FILES:
        lines = [f"{name}=={version}\n" for name, version in sorted(resolve(FILES[name]).items())]
        (ROOT / name).write_text(HEADER.format(installs=INSTALLS[name]) + "".join(lines), encoding="utf-8")
        print(f"{name}: {len(lines)} distributions")


if __name__ == "__main__":
    main()
