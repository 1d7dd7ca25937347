"""Runs tests/interop, the client in JavaScript, against a daemon: `install` once, then `call`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests/interop"
INSTALLED = ROOT / ".cache/interop"


def missing() -> str:
    """Why it cannot run here; empty if it can."""
    absent = [name for name in ("node", "npm") if shutil.which(name) is None]
    return f"not on this machine: {', '.join(absent)}" if absent else ""


def install() -> None:
    """Fetch the packages that package.json names into .cache, unless that very file was installed before."""
    wanted = (SOURCE / "package.json").read_bytes()
    # Written last: an installation that was interrupted is done again.
    stamp = INSTALLED / "installed.json"
    if stamp.exists() and stamp.read_bytes() == wanted:
        return
    INSTALLED.mkdir(parents=True, exist_ok=True)
    (INSTALLED / "package.json").write_bytes(wanted)
    npm = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    done = subprocess.run(npm, cwd=INSTALLED, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    stamp.write_bytes(wanted)


def call(
    address: str, *, ca: Path | None = None, token_file: Path | None = None, question: str = "Say hello."
) -> dict[str, Any]:
    """Chat, ask health and reflection. Returns what the client printed."""
    command = ["node", str(SOURCE / "client.cjs"), "--address", address, "--protos", str(ROOT / "protos")]
    command += ["--question", question]
    command += ["--ca", str(ca)] if ca else []
    command += ["--token-file", str(token_file)] if token_file else []
    environment = os.environ | {"NODE_PATH": str(INSTALLED / "node_modules")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed
