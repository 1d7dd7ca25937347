"""Man pages and shell completions, made from the programs' own parsers and the documented configuration.

Nothing of this is committed, so none of it can go stale: what `--help` says, the pages say and the shells complete.
argparse-manpage and shtab do the writing. Knows the parsers, and nothing of packages. Called by `build`.
"""

import argparse
import gzip
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import shtab
from argparse_manpage.manpage import Manpage
from closing_text import closing_sections
from configuration_page import configuration_page
from targets import ROOT

from hearth.cli.arguments import make_parser as make_client_parser
from hearthd.__main__ import _parser as make_daemon_parser

__all__ = ["PARSERS", "completion", "manual_page", "parser", "write_documents"]

# Program -> section of the manual.
PARSERS = {"hearth": 1, "hearthd": 8}
# Shell -> where its completions of packages are.
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/{}",
    "zsh": "usr/share/zsh/vendor-completions/_{}",
    "fish": "usr/share/fish/vendor_completions.d/{}.fish",
}
SEE_ALSO = {
    "hearth": [".BR hearthd (8)"],
    "hearthd": [".BR hearth (1),", ".BR hearthd.toml (5),", ".BR systemd.service (5)"],
}
# What a value is called in a parser -> what a shell offers for it.
_FILES = {"FILE": shtab.FILE, "FILE.html": shtab.FILE, "PATH": shtab.FILE, "CHECKPOINT": shtab.FILE}
_DIRECTORIES = {"DIRECTORY": shtab.DIRECTORY, "DIR_OR_ID": shtab.DIRECTORY}


def parser(program: str) -> argparse.ArgumentParser:
    """Return a program's parser, with every subcommand."""
    # Without words it is whole; for a command line it leaves out what that does not need.
    return make_client_parser() if program == "hearth" else make_daemon_parser([])


def parsers(start: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and those of its subcommands."""
    yield start
    for action in start._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


def actions(start: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the actions of a parser and of its subcommands."""
    for each in parsers(start):
        yield from each._actions


def manual_page(program: str, version: str, epoch: int) -> str:
    """Return a program's man page."""
    start = parser(program)
    if not start.description:
        raise ValueError(f"{program} does not say what it is")
    closing = [closing_sections(each.epilog or "", "" if each is start else each.prog) for each in parsers(start)]
    start.epilog = None
    data = {
        "project_name": "Hearth",
        "version": version,
        "manual_section": str(PARSERS[program]),
        "manual_title": "Hearth",
        "description": f"{start.description[0].lower()}{start.description[1:]}".rstrip("."),
        "date": datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%d"),
        "prog": program,
        "long_description": start.description,
        "format": "pretty",
    }
    # argparse wraps for the terminal that it runs in; one commit gives one page.
    with patch.dict(os.environ, {"COLUMNS": "80"}):
        page = str(Manpage(start, format="pretty", _data=data))
    return page + "".join(closing) + ".SH SEE ALSO\n" + "\n".join(SEE_ALSO[program]) + "\n"


def completion(program: str, shell: str) -> str:
    """Return a program's completions for one shell."""
    start = parser(program)
    for action in actions(start):
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        if offered := _FILES.get(metavar) or _DIRECTORIES.get(metavar):
            action.complete = offered  # type: ignore[attr-defined]
    written: str = shtab.complete(start, shell=shell)
    return written


def write_documents(root: Path, version: str, epoch: int) -> None:
    """Write all of them below root, where Debian's programs look."""
    pages = {f"man{section}/{name}.{section}": manual_page(name, version, epoch) for name, section in PARSERS.items()}
    text = (ROOT / "deploy/hearthd.toml").read_text(encoding="utf-8")
    pages["man5/hearthd.toml.5"] = configuration_page(text, version, epoch)
    for name, page in pages.items():
        path = root / "usr/share/man" / f"{name}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(page.encode(), mtime=0))
    for program in PARSERS:
        for shell, place in COMPLETIONS.items():
            path = root / place.format(program)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(completion(program, shell), encoding="utf-8")
