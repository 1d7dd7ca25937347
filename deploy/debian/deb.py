"""One .deb from a directory that becomes `/` and a directory of maintainer scripts; the same bytes every time.

Order, owners and times are fixed, so that who builds the same commit twice gets the same package. Knows nothing of what
is in a package. Called by `build`.
"""

import gzip
import hashlib
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

__all__ = ["Package", "add_changelog", "write_deb"]

SCRIPTS = ("preinst", "postinst", "prerm", "postrm")
MAINTAINER = "The Hearth authors <hearth@localhost.localdomain>"


@dataclass(frozen=True, slots=True)
class Package:
    """What stands in its control file."""

    name: str
    version: str
    architecture: str
    section: str
    summary: str
    description: str
    relations: dict[str, str]
    """Depends and its like."""

    @property
    def file_name(self) -> str:
        """What it is called when it stands alone."""
        return f"{self.name}_{self.version}_{self.architecture}.deb"

    def control(self, installed_size: int) -> str:
        """Return the control file."""
        fields = {
            "Package": self.name,
            "Version": self.version,
            "Architecture": self.architecture,
            "Maintainer": MAINTAINER,
            "Installed-Size": str(installed_size),
            **self.relations,
            "Section": self.section,
            "Priority": "optional",
            "Description": "\n".join(
                [self.summary, *(f" {line or '.'}" for line in self.description.strip().split("\n"))]
            ),
        }
        return "".join(f"{name}: {value}\n" for name, value in fields.items())


def add_changelog(package: Package, root: Path, epoch: int) -> None:
    """Write the changelog that Debian wants below root; what changed stands in the project's own."""
    text = (
        f"{package.name} ({package.version}) stable; urgency=medium\n\n"
        "  * See CHANGELOG.md beside this file, or the project's.\n\n"
        f" -- {MAINTAINER}  {formatdate(epoch)}\n"
    )
    directory = root / "usr/share/doc" / package.name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "changelog.gz").write_bytes(gzip.compress(text.encode(), mtime=epoch))


def write_deb(
    package: Package, root: Path, control: Path, output: Path, epoch: int, compression: Iterable[str]
) -> Path:
    """Write root as a package into output and return its path. `control` has the scripts; root gets a DEBIAN."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    # dpkg counts a file in whole KiB and everything else as one.
    others = sum(1 for path in root.rglob("*") if path.is_symlink() or path.is_dir())
    size = sum(-(-path.stat().st_size // 1024) for path in files) + others
    sums = [f"{_md5(path)}  {path.relative_to(root)}\n" for path in files if path.relative_to(root).parts[0] != "etc"]
    conffiles = [f"/{path.relative_to(root)}\n" for path in files if path.relative_to(root).parts[0] == "etc"]
    for path in root.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or _is_program(path, root) else 0o644)

    debian = root / "DEBIAN"
    debian.mkdir()
    texts = {"control": package.control(size), "md5sums": "".join(sums), "conffiles": "".join(conffiles)}
    for name in (*SCRIPTS, "triggers"):
        if (control / name).is_file():
            texts[name] = (control / name).read_text(encoding="utf-8")
    for name, text in texts.items():
        if text:
            (debian / name).write_text(text, encoding="utf-8")
            (debian / name).chmod(0o755 if name in SCRIPTS else 0o644)
    for path in [root, *root.rglob("*")]:
        os.utime(path, (epoch, epoch), follow_symlinks=False)
    # Whatever this machine's umask: dpkg takes no others.
    for path in (root, debian):
        path.chmod(0o755)

    output.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: whoever waits for the file may take it.
    unfinished, finished = output / f".{package.file_name}", output / package.file_name
    command = ["dpkg-deb", "--root-owner-group", *compression, "--build", str(root), str(unfinished)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    unfinished.rename(finished)
    return finished


def _is_program(path: Path, root: Path) -> bool:
    """Whether it is for somebody to run; extension modules are not, whatever their wheels say."""
    return path.relative_to(root).parent in (Path("opt/hearth/bin"), Path("usr/bin"))


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
