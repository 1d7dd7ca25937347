"""A model directory: its manifest, and the proof that its files are the ones that were built.

    manifest.json          what this module writes and reads; carries the hash of every other file and its own
    model.onnx model.data  graph and external weights
    tokenizer.json chat_template.jinja generation.json
    preset.npy             keys and values of the tokens that every chat starts with, where the build made them

Everything in the directory is input: sizes and names are bounded, links are refused, nothing is loaded before its hash
was checked. The hashes find damage, not malice: who can rewrite the manifest can rewrite them all.

Knows no ONNX Runtime, no tokenizer and no state directory. Called by `__main__`, `tokenizer`, `runner` and `build`.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from hearthd.bundles.external_locations import external_locations
from hearthd.bundles.manifest import (
    GENERATION_KEYS,
    GENERATION_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    PRESET_NAME,
    SCHEMA_VERSION,
    TEMPLATE_NAME,
    TOKENIZER_NAME,
    FileEntry,
    Manifest,
    is_finite_number,
    shown,
)
from hearthd.errors import BundleError

__all__ = ["MANIFEST_NAME", "SCHEMA_VERSION", "Bundle", "FileEntry", "Manifest", "file_entry"]

_MAX_MANIFEST_BYTES: Final = 4 * 2**20
_MAX_TEXT_BYTES: Final = 64 * 2**20
_MAX_GRAPH_BYTES: Final = 256 * 2**20
_HASH_CHUNK_BYTES: Final = 2**20


class Bundle:
    """A model directory whose files are those that its manifest lists."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `open`, which proves what this takes for granted."""
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path, *, verify: bool = True, progress: Callable[[int, int], None] | None = None) -> Self:
        """Open a model directory; with `verify`, hash every file.

        progress: called with (bytes hashed, bytes in all).
        Raises BundleError when a file is missing, extra, linked, of another size or of another hash.
        """
        if not path.is_dir():
            raise BundleError(f"{path} is not a model directory; see `hearthd model list` and `hearthd model add`")
        try:
            manifest = Manifest.from_json(_read_text(path / MANIFEST_NAME, _MAX_MANIFEST_BYTES))
            _check_directory(path, manifest)
            if verify:
                _check_hashes(path, manifest, progress)
            _check_external_data(path / MODEL_NAME, manifest)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error}") from error
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error
        return cls(path, manifest)

    @property
    def model_path(self) -> Path:
        """The graph; its external weights stand beside it."""
        return self.path / MODEL_NAME

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, the manifest left out."""
        return self.manifest.size_bytes

    def preset(self) -> NDArray[np.int8] | None:
        """Return the KV of the manifest's preset_tokens, int8 (layers, 2, kv_heads, tokens, head_dim); None without.

        Raises BundleError when its shape is not what the manifest says.
        """
        manifest = self.manifest
        if not manifest.preset_tokens:
            return None
        shape = (manifest.num_layers, 2, manifest.num_kv_heads, len(manifest.preset_tokens), manifest.head_dim)
        try:
            # Mapped first: NumPy would otherwise allocate whatever a damaged header says.
            preset = np.array(np.load(self.path / PRESET_NAME, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise BundleError(f"{self.path / PRESET_NAME} cannot be read: {error}; build the model again") from error
        if preset.shape != shape or preset.dtype != np.int8:
            raise BundleError(
                f"{self.path / PRESET_NAME} is {preset.dtype} {preset.shape}; int8 {shape} is needed: build the model "
                "again"
            )
        return preset

    def tokenizer_json(self) -> str:
        """Return the text of a `tokenizers` file."""
        return _read_text(self.path / TOKENIZER_NAME, _MAX_TEXT_BYTES)

    def chat_template(self) -> str:
        """Return the Jinja source of the chat template."""
        return _read_text(self.path / TEMPLATE_NAME, _MAX_TEXT_BYTES)

    def generation(self) -> dict[str, float]:
        """Return the sampling defaults that the checkpoint came with, empty when it had none."""
        try:
            content = json.loads(_read_text(self.path / GENERATION_NAME, _MAX_TEXT_BYTES))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{self.path / GENERATION_NAME} is not JSON: {str(error)[:100]}") from error
        if not isinstance(content, dict) or not content.keys() <= set(GENERATION_KEYS):
            raise BundleError(f"{self.path / GENERATION_NAME} may only have {', '.join(GENERATION_KEYS)}")
        if not all(is_finite_number(value) for value in content.values()):
            raise BundleError(f"{self.path / GENERATION_NAME} has a value that is no finite number")
        return content


def file_entry(path: Path) -> FileEntry:
    """Return a file's entry for the manifest, read in chunks."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(size=os.fstat(file.fileno()).st_size, sha256=digest)


def _check_directory(path: Path, manifest: Manifest) -> None:
    found: dict[str, os.stat_result] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name != MANIFEST_NAME and entry.name not in manifest.files:
                raise BundleError(
                    f"has {shown(entry.name)}, which the manifest does not list; remove it or build again"
                )
            found[entry.name] = entry.stat(follow_symlinks=False)
    for name, status in found.items():
        _check_plain(name, status)
    for name, expected in manifest.files.items():
        if name not in found:
            raise BundleError(f"{name} is missing; build or copy the model again")
        if found[name].st_size != expected.size:
            raise BundleError(
                f"{name} has {found[name].st_size} bytes, the manifest says {expected.size}; build or copy it again"
            )


def _check_plain(name: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{name} is not a plain file (a link, a directory?); copy the file itself")
    if status.st_nlink != 1:
        raise BundleError(f"{name} is hard-linked {status.st_nlink} times, so it can change from elsewhere; copy it")


def _check_hashes(path: Path, manifest: Manifest, progress: Callable[[int, int], None] | None) -> None:
    total = manifest.size_bytes
    done = 0
    buffer = memoryview(bytearray(_HASH_CHUNK_BYTES))
    for name, expected in manifest.files.items():
        digest = hashlib.sha256()
        descriptor = os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            _check_plain(name, os.fstat(file.fileno()))
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
                done += size
                if progress is not None:
                    progress(done, total)
        if digest.hexdigest() != expected.sha256:
            raise BundleError(f"{name} is damaged (its sha256 is another than the manifest's); build or copy it again")


def _check_external_data(model_path: Path, manifest: Manifest) -> None:
    """Hold the files that the graph reads weights from against the manifest, before anything opens them."""
    if manifest.files[MODEL_NAME].size > _MAX_GRAPH_BYTES:
        raise BundleError(f"{MODEL_NAME} is larger than {_MAX_GRAPH_BYTES} bytes; weights belong beside it")
    for location in sorted(external_locations(model_path.read_bytes())):
        if location not in manifest.files:
            raise BundleError(f"{MODEL_NAME} reads weights from {shown(location)}, which the manifest does not list")


def _read_text(path: Path, limit: int) -> str:
    try:
        # O_NONBLOCK: a named pipe in the place of the file must not hold the start up.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            _check_plain(path.name, os.fstat(file.fileno()))
            data = file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{path.name} cannot be read: {error.strerror}; build or copy the model again") from error
    if len(data) > limit:
        raise BundleError(f"{path.name} is larger than {limit} bytes; build or copy the model again")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path.name} is not UTF-8; build or copy the model again") from error
