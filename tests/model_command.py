"""`hearthd model` as the tests call it: its own parser and its own code, in this process."""

import argparse
from pathlib import Path

from hearthd.build import cli


def run(*arguments: str | Path) -> int:
    """Run a subcommand; returns its exit code. Errors are raised, as `hearthd.__main__` gets them."""
    parser = argparse.ArgumentParser(prog="hearthd")
    cli.add_parser(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["model", *map(str, arguments)])
    code: int = parsed.run(parsed)
    return code
