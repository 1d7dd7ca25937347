"""`hearthd model verify`: a bundle's files by hash, then its answers against float32.

Knows no arguments but those parsed by `cli`, which calls it; `builder.measure_quality` judges.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hearthd.build import presentation
from hearthd.build.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hearthd.build.command_parts import Report, Reporting, open_source, open_store
from hearthd.build.sources.catalogue import Catalogue
from hearthd.build.sources.fetch import fetch
from hearthd.bundles.bundle import Bundle, Manifest
from hearthd.configuration import paths
from hearthd.errors import BuildError

__all__ = ["run_verify"]


def run_verify(arguments: argparse.Namespace) -> int:
    """Check and judge; 1 if the model is not faithful."""
    store = open_store(arguments)
    path = store.path(arguments.name)
    with Reporting(arguments) as report:
        bundle = Bundle.open(path, progress=lambda done, total: report("checking files", done / max(total, 1)))
        result: dict[str, Any] = {"name": arguments.name, "files": len(bundle.manifest.files), "files_unharmed": True}
        if not arguments.files_only:
            result |= _judge(arguments, bundle, report)
    if arguments.json:
        presentation.write_json(result)
    else:
        presentation.write_facts(presentation.quality_facts(result))
    return 0 if result.get("faithful", True) else 1


def _judge(arguments: argparse.Namespace, bundle: Bundle, report: Report) -> dict[str, Any]:
    """Measure a model against the float32 graph of the checkpoint that its manifest names."""
    from hearthd.build.builder import measure_quality
    from hearthd.build.quantization import corpus
    from hearthd.build.quantization.quality import EVALUATION_TOKENS, MAX_KL

    documents = corpus.from_file(arguments.text) if arguments.text else corpus.load("evaluation")
    with _reference_of(arguments, bundle.manifest, report) as (checkpoint, graph):
        paths.cache_directory().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".verify-", dir=paths.cache_directory()) as scratch:
            figures = measure_quality(
                bundle,
                checkpoint,
                documents,
                max_tokens=arguments.tokens or EVALUATION_TOKENS,
                scratch=Path(scratch),
                report=report,
                exported_graph=graph,
            )
    text = arguments.text.name if arguments.text else "hearthd evaluation set"
    return asdict(figures) | {"text": text, "kl_limit": MAX_KL, "faithful": figures.kl_mean <= MAX_KL}


@contextmanager
def _reference_of(
    arguments: argparse.Namespace, manifest: Manifest, report: Report
) -> Iterator[tuple[Checkpoint, Path | None]]:
    """Open what a bundle is judged against: a checkpoint, and its exported graph if that is to be the judge."""
    if not arguments.reference:
        with _source_of(arguments, manifest, report) as checkpoint:
            yield checkpoint, None
        return
    from hearthd.build.sources.optimum_source import opened_export

    with opened_export(arguments.reference, paths.cache_directory(), report) as export:
        yield export, export.graph


def _source_of(arguments: argparse.Namespace, manifest: Manifest, report: Report) -> Checkpoint:
    if arguments.checkpoint:
        return open_checkpoint(arguments.checkpoint)
    found = Catalogue.shipped().by_reference(manifest.source)
    if found is None:
        raise BuildError(
            f"{manifest.name!r} was built from {manifest.source!r}, which is not in the catalogue; "
            "name it with --checkpoint, or an export of it with --reference, or check the files alone with --files-only"
        )
    entry, source = found
    return open_source(fetch(source, paths.cache_directory(), report), entry, source)
