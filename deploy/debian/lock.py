"""Write requirements.lock: the exact wheels, by sha256, that the Debian packages are made of.

Asks pip to resolve the [daemon] extra under constraints.txt once for each target (processor and Python) and merges the
answers: one line a distribution, with the hash of every wheel that some target takes. Names, versions and hashes only,
so that any index serves. Settings of this machine's pip are left out: a wheel built here has a hash of its own.

Needs a package index. Run by `make deb-lock`, with the development environment's Python; `build` reads what it writes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from targets import ROOT, TARGETS, Target

LOCK = Path(__file__).resolve().parent / "requirements.lock"
HEADER = """\
# The wheels of the Debian packages, for {targets}.
# Written by `make deb-lock` from pyproject.toml and constraints.txt: never edit.
"""


def requirements() -> list[str]:
    """Return what the daemon needs, without systemd-python: it has no wheels, `systemd_python` brings Debian's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    everything: list[str] = project["dependencies"] + project["optional-dependencies"]["daemon"]
    return [line for line in everything if not line.startswith("systemd-python")]


def resolve(target: Target) -> dict[str, tuple[str, str]]:
    """Return version and sha256 of each distribution's wheel, by its normalised name."""
    environment = {name: value for name, value in os.environ.items() if name not in _LOCAL_SETTINGS}
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", report.name, "--target", "/nonexistent", *target.pip_options()]
        command += ["-c", str(ROOT / "constraints.txt"), *requirements()]
        subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL, env={**environment, "PIP_CONFIG_FILE": os.devnull}
        )
        resolved: list[dict[str, Any]] = json.load(report)["install"]
    return {
        re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): (
            item["metadata"]["version"],
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in resolved
    }


# Other places to take wheels from, which need not hold what the index holds.
_LOCAL_SETTINGS = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "PIP_NO_INDEX")


def merge(resolved: list[dict[str, tuple[str, str]]]) -> str:
    """Return the lock file's lines. Raises ValueError when two targets take different versions."""
    lines: list[str] = []
    for name in sorted({name for wheels in resolved for name in wheels}):
        found = [wheels[name] for wheels in resolved if name in wheels]
        versions = {version for version, _ in found}
        if len(versions) != 1:
            raise ValueError(f"{name} has versions {', '.join(sorted(versions))}; pin it in constraints.txt")
        hashes = sorted({sha256 for _, sha256 in found})
        lines.append(f"{name}=={versions.pop()} \\\n" + " \\\n".join(f"    --hash=sha256:{each}" for each in hashes))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the lock file."""
    names = ", ".join(f"{target.architecture} with Python {target.python}" for target in TARGETS)
    text = HEADER.format(targets=names) + merge([resolve(target) for target in TARGETS])
    LOCK.write_text(text, encoding="utf-8")
    print(f"{LOCK.name}: {text.count('==')} distributions, {text.count('--hash')} wheels")


if __name__ == "__main__":
    main()
