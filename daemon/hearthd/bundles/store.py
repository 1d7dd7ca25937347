"""The directory of installed models: each one there whole, or not at all, whenever the power goes.

    <models>/<name>/          a bundle
    <models>/.incoming-*      one that is being written
    <models>/.replaced-<name> the old one, between two renames, where directories cannot be exchanged in one
    <models>/.removed-*       one that is being deleted
    <models>/.hearthd.lock    held by whoever changes anything

Whatever was left behind is swept at the next change or start. Knows bundles, and nothing of how one is built.
Called by `build.cli`, and by `__main__` before serving and to check a configuration.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from hearthd.bundles.bundle import Bundle
from hearthd.bundles.directory_lock import exclusive
from hearthd.bundles.manifest import is_model_name
from hearthd.errors import BuildError, BundleError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_INCOMING: Final = ".incoming-"
_REPLACED: Final = ".replaced-"
_REMOVED: Final = ".removed-"
_AT_FDCWD: Final = -100  # fcntl.h
_RENAME_EXCHANGE: Final = 2  # linux/fs.h


class Store:
    """A directory of models. Reading needs no lock; two writers cannot meet."""

    def __init__(self, directory: Path) -> None:
        """`directory` is made when the first model is installed."""
        self.directory = directory

    def names(self) -> list[str]:
        """Return the names of the installed models, sorted. Raises BundleError when the directory cannot be read."""
        try:
            if not self.directory.is_dir():
                return []
            return sorted(path.name for path in self.directory.iterdir() if is_model_name(path.name) and path.is_dir())
        except OSError as error:
            raise BundleError(
                f"the models in {self.directory} cannot be read: {error.strerror}; run this as the user whose they are"
            ) from None

    def path(self, name: str) -> Path:
        """Return a model's directory. Raises ModelNotFoundError when it is not installed."""
        if name not in self.names():
            installed = ", ".join(self.names()) or "none"
            raise ModelNotFoundError(
                f"model {ascii(name)[:80]} is not installed in {self.directory}; these are: {installed}; "
                "see `hearthd model add`"
            )
        return self.directory / name

    def open(self, name: str, *, verify: bool = True) -> Bundle:
        """Open a model. Raises ModelNotFoundError when it is not installed, BundleError when it is damaged."""
        return Bundle.open(self.path(name), verify=verify)

    @contextmanager
    def installing(self, name: str) -> Iterator[Path]:
        """Give an empty directory to write a bundle to; install what is in it when the block ends without an error.

        Beside the directory there may be temporary files, on the same file system; they are removed with it.
        Until then the model of that name stays as it is, and it stays for good when the block raises.
        Raises BundleError when what was written is no whole bundle, BuildError when another process is at work here.
        """
        if not is_model_name(name):
            raise BuildError(f"model name {ascii(name)[:80]} is not allowed; up to 64 of a-z, 0-9, '.', '_', '-' are")
        with exclusive(self.directory):
            self._sweep()
            temporary = self._temporary(_INCOMING)
            # One level down, so that what a build puts beside its result is swept with it.
            incoming = temporary / name
            incoming.mkdir(mode=0o755)
            try:
                yield incoming
                bundle = Bundle.open(incoming)
                if bundle.manifest.name != name:
                    raise BuildError(f"the bundle calls itself {bundle.manifest.name!r}, not {name!r}; build it again")
                _sync_tree(incoming)
                self._put_in_place(incoming, name)
            finally:
                # The old bundle after an exchange, or what was written of the new one before an error.
                shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove a model. Raises ModelNotFoundError when it is not installed."""
        with exclusive(self.directory):
            self._sweep()
            doomed = self._temporary(_REMOVED)
            # One rename: a half-deleted model is never seen under its name.
            self.path(name).rename(doomed / name)
            _sync_directory(self.directory)
            shutil.rmtree(doomed)

    def sweep(self) -> None:
        """Finish or undo what a killed process left behind; do nothing while another one is at work."""
        if not self.directory.is_dir() or not os.access(self.directory, os.W_OK):
            return
        try:
            with exclusive(self.directory):
                self._sweep()
        except BuildError:
            return

    def _put_in_place(self, incoming: Path, name: str) -> None:
        target = self.directory / name
        if not target.is_dir():
            incoming.rename(target)
        elif not _exchange(incoming, target):
            # Old file systems and kernels: between these two lines there is no model; `sweep` puts the old one back.
            target.rename(self.directory / f"{_REPLACED}{name}")
            incoming.rename(target)
            _sync_directory(self.directory)
            shutil.rmtree(self.directory / f"{_REPLACED}{name}")
        _sync_directory(self.directory)

    def _sweep(self) -> None:
        for path in sorted(self.directory.iterdir()):
            if path.name.startswith(_REPLACED) and not (self.directory / path.name.removeprefix(_REPLACED)).exists():
                path.rename(self.directory / path.name.removeprefix(_REPLACED))
                _sync_directory(self.directory)
            elif path.name.startswith((_INCOMING, _REMOVED, _REPLACED)):
                shutil.rmtree(path)

    def _temporary(self, prefix: str) -> Path:
        path = self.directory / f"{prefix}{secrets.token_hex(8)}"
        path.mkdir(mode=0o755)
        return path


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step that no crash can cut in two; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), os.fspath(other))


def _sync_tree(directory: Path) -> None:
    """Write a bundle's files through to the disk, then the directory that names them."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
