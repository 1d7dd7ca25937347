"""A Python of the target's minor version that runs on this machine: it writes the package's bytecode.

This machine's own, if it has one; else the target release's, which mmdebstrap fetches for this machine's processor,
under Debian's signature. That one runs from its directory: nothing is installed, root is not needed.

Called by `build`, which keeps what this fetches.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from targets import Target

__all__ = ["find_interpreter"]


def find_interpreter(target: Target, cache: Path) -> list[str]:
    """Return the command that runs it."""
    for candidate in (sys.executable, f"python{target.python}"):
        found = shutil.which(candidate)
        if found and _minor_version([found]) == target.python:
            return [found]
    return _fetch(target, cache)


def _fetch(target: Target, cache: Path) -> list[str]:
    processor = subprocess.run(
        ["dpkg", "--print-architecture"], check=True, capture_output=True, text=True
    ).stdout.strip()
    kept = cache / f"python-{target.suite.name}-{processor}"
    if not kept.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as directory:
            archive = Path(directory) / "root.tar"
            packages = f"python{target.python}-minimal,libpython{target.python}-stdlib"
            command = ["mmdebstrap", "--quiet", "--variant=extract", f"--include={packages}", "--format=tar"]
            subprocess.run([*command, target.suite.name, str(archive)], check=True, stdin=subprocess.DEVNULL)
            made = Path(directory) / "made"
            made.mkdir()
            subprocess.run(["tar", "-xf", str(archive), "-C", str(made), "--no-same-owner", "./usr"], check=True)
            made.rename(kept)
    # By its own loader, with its own libraries: this machine's C library may be older than it wants.
    (loader,) = kept.glob("usr/lib/*-linux-gnu/ld-linux-*.so.*")
    interpreter = [str(loader), "--library-path", str(loader.parent), str(kept / f"usr/bin/python{target.python}")]
    if (version := _minor_version(interpreter)) != target.python:
        sys.exit(f"deb: what is in {kept} is Python {version or 'that does not run'}, not {target.python}; remove it")
    return interpreter


def _minor_version(interpreter: list[str]) -> str:
    """Return its version; nothing if it does not run, as the stand-ins of version managers do not."""
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run(
        [*interpreter, "-I", "-c", program], capture_output=True, text=True, check=False
    ).stdout.strip()
