"""What Hearth writes that must outlive anything: each change as it is made, and how to see what became of it.

Each `Work` brings a directory into its old state, changes it, and looks. It knows nothing of how it will be felled;
`fell` does that.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from pathlib import Path

from bundles import write_bundle
from hearthd import durable_file
from hearthd.access import tokens
from hearthd.access.tokens import create_token, list_tokens, revoke_token
from hearthd.bundles import store
from hearthd.bundles.bundle import Bundle
from hearthd.bundles.store import Store
from hearthd.errors import ModelNotFoundError
from hearthd.kv import disk_writes, file_uses, prefix_directory, prefix_file, prefix_store
from hearthd.kv.prefix_store import StoredPrefix
from prefix_daemon import SYSTEM, chunks_of, open_store

__all__ = ["WORKS", "Work"]


class Work(ABC):
    """One durable change in a directory."""

    steps_in: tuple[object, ...]
    """The modules whose every bytecode is a step at which the change may end."""
    before = "old"
    """What `look` returns before the change; afterwards it is `new`."""

    @abstractmethod
    def prepare(self, root: Path) -> None:
        """Bring an empty directory into the old state."""

    @abstractmethod
    def change(self, root: Path) -> None:
        """Make the change, as the program makes it."""

    @abstractmethod
    def look(self, root: Path) -> str:
        """Return what the program finds: `old`, `new`, or what else. Raises what the program raises for damage."""


class _ModelWork(Work):
    steps_in = (store,)

    def prepare(self, root: Path) -> None:
        for name, seed in (("old", 1), ("new", 2)):
            write_bundle(root / name, seed=seed)
        if self.before == "old":
            self._install(root, "old")

    def look(self, root: Path) -> str:
        models = Store(root / "models")
        models.sweep()
        left = [path.name for path in root.glob("models/*") if path.name not in (".hearthd.lock", "tiny")]
        if left:
            return f"left behind: {left}"
        try:
            found = models.open("tiny").manifest.to_json()
        except ModelNotFoundError:
            return "none"
        return {Bundle.open(root / name).manifest.to_json(): name for name in ("old", "new")}[found]

    def _install(self, root: Path, name: str) -> None:
        with Store(root / "models").installing("tiny") as directory:
            for path in sorted((root / name).iterdir()):
                shutil.copyfile(path, directory / path.name)


class InstallModel(_ModelWork):
    before = "none"

    def change(self, root: Path) -> None:
        self._install(root, "new")


class ReplaceModel(_ModelWork):
    def change(self, root: Path) -> None:
        self._install(root, "new")


class RemoveModel(_ModelWork):
    def change(self, root: Path) -> None:
        Store(root / "models").remove("tiny")

    def look(self, root: Path) -> str:
        return {"none": "new"}.get(found := super().look(root), found)


class _TokenWork(Work):
    steps_in = (tokens, durable_file)
    old = ("anna", "ben")
    new: tuple[str, ...]

    def prepare(self, root: Path) -> None:
        for name in self.old:
            create_token(root / "tokens", name)

    def look(self, root: Path) -> str:
        found = tuple(token.name for token in list_tokens(root / "tokens"))
        mode = (root / "tokens").stat().st_mode & 0o777
        return {self.old: "old", self.new: "new"}.get(found, str(found)) if mode == 0o600 else f"mode {mode:o}"


class CreateToken(_TokenWork):
    new = ("anna", "ben", "cleo")

    def change(self, root: Path) -> None:
        create_token(root / "tokens", "cleo")


class RevokeToken(_TokenWork):
    new = ("ben",)

    def change(self, root: Path) -> None:
        revoke_token(root / "tokens", "anna")


class StorePrefix(Work):
    steps_in = (prefix_store, prefix_directory, disk_writes, file_uses, prefix_file, durable_file)
    before = "none"

    def prepare(self, root: Path) -> None:
        (root / "prefixes").mkdir(mode=0o700)

    def change(self, root: Path) -> None:
        store = open_store(root / "prefixes")
        store.write(StoredPrefix(len(SYSTEM), store.key("a", SYSTEM)), chunks_of(len(SYSTEM)))

    def look(self, root: Path) -> str:
        store = open_store(root / "prefixes")
        found = store.find(SYSTEM, [("a", len(SYSTEM))], 1)
        left = [path.name for path in (root / "prefixes").iterdir()]
        if found is None:
            return "none" if not left else f"left behind: {left}"
        return "new" if list(store.read(found)) == chunks_of(len(SYSTEM)) and len(left) == 1 else "another"


WORKS: dict[str, type[Work]] = {
    "install-model": InstallModel,
    "replace-model": ReplaceModel,
    "remove-model": RemoveModel,
    "create-token": CreateToken,
    "revoke-token": RevokeToken,
    "store-prefix": StorePrefix,
}
