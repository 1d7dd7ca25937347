"""What several subcommands of `hearthd model` share: progress, the store, opening what was fetched.

Knows no subcommand. Called by `cli`, `build_commands` and `verify_command`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from hearthd.build.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hearthd.build.progress import Progress, no_progress
from hearthd.build.sources.catalogue import CatalogueEntry, Source
from hearthd.bundles.store import Store
from hearthd.configuration import paths

__all__ = ["Report", "Reporting", "open_source", "open_store"]

# Called with what is being done and the share of it that is done, 0 to 1.
Report = Callable[[str, float], None]


def open_source(path: Path, entry: CatalogueEntry, source: Source) -> Checkpoint:
    """Open a fetched checkpoint, with what the catalogue knows of it."""
    checkpoint = open_checkpoint(path)
    checkpoint.source = source.reference
    checkpoint.license = entry.license
    checkpoint.generation = checkpoint.generation or entry.sampling
    return checkpoint


def open_store(arguments: argparse.Namespace) -> Store:
    """Return the store that the arguments name, without what an interrupted build left there."""
    store = Store(arguments.models or paths.model_directory())
    store.sweep()
    return store


class Reporting:
    """Progress on standard error for the length of a block, none when --quiet is given."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._progress = None if arguments.quiet else Progress(sys.stderr)

    def __enter__(self) -> Report:
        return self._progress or no_progress

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if self._progress is not None:
            self._progress.close()
