"""What `--from-optimum` and `--reference` name, opened: an export, a checkpoint to be exported first, a hub repository.

Knows where exports come from, nothing of their graphs. Called by `cli`.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hearthd.build.checkpoints.onnx_checkpoint import OnnxCheckpoint, is_exported
from hearthd.build.sources.fetch import fetch
from hearthd.build.sources.hub_repository import is_repository, pinned
from hearthd.build.sources.optimum_export import export_checkpoint
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["opened_export"]


@contextmanager
def opened_export(given: str, cache: Path, report: Callable[[str, float], None]) -> Iterator[OnnxCheckpoint]:
    """Open an exported directory; what is not exported yet is, into the cache for the length of the block.

    given: a directory, a GGUF file, or a hub repository as "owner/name" or "owner/name@revision". Raises BuildError.
    """
    path, source, license_ = Path(given), "", ""
    if not path.exists():
        if not is_repository(given):
            raise BuildError(
                f"{given}: no such file or directory, and no repository on the hub, which is OWNER/NAME or "
                "OWNER/NAME@REVISION; give an exported directory, a checkpoint, or such an ID"
            )
        pin = pinned(given)
        path, source = fetch(pin, cache, report), pin.reference
    with tempfile.TemporaryDirectory(prefix=".export-", dir=_made(cache)) as temporary:
        if not (path.is_dir() and is_exported(path)):
            report("exporting with optimum", 0.0)
            source = f"{source or path.resolve().name}, exported by optimum"
            license_ = export_checkpoint(path, Path(temporary) / "export")
            path = Path(temporary) / "export"
            report("exporting with optimum", 1.0)
        with OnnxCheckpoint(path) as checkpoint:
            checkpoint.source = source or checkpoint.source
            checkpoint.license = license_ or checkpoint.license
            yield checkpoint


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory
