"""`hearthd model build` and `hearthd model add`: from a checkpoint, given or fetched, to an installed bundle.

Knows no arguments but those parsed by `cli`, which calls it; `builder` does the work.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hearthd.build import presentation
from hearthd.build.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hearthd.build.command_parts import Reporting, open_source, open_store
from hearthd.build.sources.catalogue import Catalogue
from hearthd.build.sources.fetch import fetch
from hearthd.bundles.bundle import Manifest
from hearthd.bundles.manifest import is_model_name
from hearthd.bundles.store import Store
from hearthd.configuration import paths
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from hearthd.build.report.build_report import BuildReport

__all__ = ["name_after", "run_add", "run_build"]


def run_build(arguments: argparse.Namespace) -> int:
    """Build from a checkpoint on this machine, or from an export."""
    # Not resolved before: the name of a hub repository is no path, and may be a directory's.
    name = arguments.name or name_after(arguments.checkpoint or Path(arguments.from_optimum.partition("@")[0]))
    store = Store(arguments.output) if arguments.output else open_store(arguments)
    build_report = _build_report(arguments, store, name)
    with _given(arguments) as checkpoint:
        manifest = _install(arguments, store, checkpoint, name, build_report)
    _write_built(arguments, store, manifest, build_report)
    return 0


def run_add(arguments: argparse.Namespace) -> int:
    """Fetch what the catalogue names, and build it."""
    entry = Catalogue.shipped().entry(arguments.name)
    source = entry.source(arguments.source)
    store = open_store(arguments)
    build_report = _build_report(arguments, store, entry.name)
    with Reporting(arguments) as report:
        path = fetch(source, paths.cache_directory(), report)
    with open_source(path, entry, source) as checkpoint:
        manifest = _install(arguments, store, checkpoint, entry.name, build_report)
    _write_built(arguments, store, manifest, build_report)
    return 0


@contextmanager
def _given(arguments: argparse.Namespace) -> Iterator[Checkpoint]:
    """Open what a build was told to build from."""
    if arguments.checkpoint:
        with open_checkpoint(arguments.checkpoint) as checkpoint:
            yield checkpoint
        return
    from hearthd.build.sources.optimum_source import opened_export

    with ExitStack() as opened:
        with Reporting(arguments) as report:
            export = opened.enter_context(opened_export(arguments.from_optimum, paths.cache_directory(), report))
        yield export


def _build_report(arguments: argparse.Namespace, store: Store, name: str) -> BuildReport | None:
    """Return the report that is asked for, before any work: where it cannot be written, none is done."""
    if not arguments.report:
        return None
    from hearthd.build.report.build_report import BuildReport

    return BuildReport(arguments.report, model_directory=store.directory / name)


def _install(
    arguments: argparse.Namespace, store: Store, checkpoint: Checkpoint, name: str, build_report: BuildReport | None
) -> Manifest:
    # Here and not above: onnx and the inference engine, which `list` and `show` need not load.
    from hearthd.build.builder import build_bundle

    with Reporting(arguments) as report, store.installing(name) as directory:
        observe = partial(build_report.observe, progress=report) if build_report else None
        return build_bundle(checkpoint, directory, name=name, force=arguments.force, report=report, observe=observe)


def _write_built(
    arguments: argparse.Namespace, store: Store, manifest: Manifest, build_report: BuildReport | None
) -> None:
    """Say what was built. Raises BuildError when the report that was asked for could not be made."""
    path = store.directory / manifest.name
    written = build_report.path if build_report and not build_report.error else None
    presentation.write_built(manifest, path, written, as_json=arguments.json)
    if build_report and build_report.error:
        raise BuildError(f"the model is installed in {path}, but its report was not written: {build_report.error}")


def name_after(path: Path) -> str:
    """Return a model name made of a checkpoint's file or directory name."""
    stem = path.stem if path.suffix.lower() == ".gguf" else path.resolve().name
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:64]
    if not is_model_name(name):
        raise BuildError(f"no model name can be made of {path.name!r}; give one with --name")
    return name
