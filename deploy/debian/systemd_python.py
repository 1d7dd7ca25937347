"""systemd-python for the target: Debian's own build, since the index has no wheels of it.

A board without internet has the two .deb files and nothing else, and Raspberry Pi OS does not come with
python3-systemd. So its files are in the package: 200 KB, fetched by mmdebstrap, which checks Debian's signatures. They
need libsystemd, which is on every system that systemd runs.

Called by `build`, which keeps what this returns.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from targets import Target

__all__ = ["fetch"]

PACKAGE = "python3-systemd"
INSTALLED = Path("usr/lib/python3/dist-packages")


def fetch(target: Target, cache: Path) -> Path:
    """Return a directory with the package `systemd`, its metadata and its licence; fetched once."""
    kept = cache / f"systemd-{target.suite.name}-{target.architecture}"
    if kept.is_dir():
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as directory:
        unfinished = Path(directory)
        archive = unfinished / "root.tar"
        # `extract` runs no script of a package, so no emulation is needed; the mirror is mmdebstrap's own choice.
        command = ["mmdebstrap", "--quiet", "--variant=extract", f"--arch={target.architecture}", "--format=tar"]
        command += [f"--include={PACKAGE}", target.suite.name, str(archive)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        wanted = [f"./{INSTALLED}", f"./usr/share/doc/{PACKAGE}/copyright"]
        subprocess.run(["tar", "-xf", str(archive), "-C", str(unfinished), "--no-same-owner", *wanted], check=True)
        made = unfinished / "made"
        made.mkdir()
        shutil.copytree(unfinished / INSTALLED / "systemd", made / "systemd", ignore=shutil.ignore_patterns("test"))
        # One name with the version, as importlib.metadata wants it.
        (metadata,) = (unfinished / INSTALLED).glob("systemd_python-*.egg-info")
        shutil.copytree(metadata, made / metadata.name)
        shutil.copy(unfinished / f"usr/share/doc/{PACKAGE}/copyright", made / metadata.name / "copyright")
        made.rename(kept)
    return kept
