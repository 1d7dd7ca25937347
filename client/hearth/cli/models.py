"""`hearth models`: the models that the daemon serves.

Called by `__main__`.
"""

import argparse
import json
from dataclasses import asdict

from hearth._values import ModelInfo
from hearth.cli.connection import open_client
from hearth.cli.terminal import Screen, neutralise_line

_HEADINGS = ("NAME", "STATE", "ARCHITECTURE", "PARAMETERS", "WEIGHTS", "CONTEXT", "SIZE", "MEMORY", "LICENCE")


def run(arguments: argparse.Namespace) -> int:
    """Print the models, the default one first, and return the exit code."""
    screen = Screen()
    with open_client(arguments, screen) as client:
        models = client.models()
    if arguments.json:
        fields = {"models": [asdict(model) for model in models]}
        screen.write(json.dumps(fields, ensure_ascii=not screen.encoding_is_unicode) + "\n")
        return 0
    rows = [_HEADINGS, *map(_row, models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        screen.write("  ".join(map(str.ljust, row, widths)).rstrip() + "\n")
    return 0


def _amount(number: int, unit: str) -> str:
    # A daemon knows nothing but the name of a model that it cannot read.
    return f"{number / 1e6:.0f} {unit}" if number else "-"


def _row(model: ModelInfo) -> tuple[str, ...]:
    return tuple(
        neutralise_line(cell)
        for cell in (
            model.name,
            model.state.value,
            model.architecture or "-",
            _amount(model.num_parameters, "M"),
            model.quantization or "-",
            str(model.context_length or "-"),
            _amount(model.size_bytes, "MB"),
            _amount(model.memory_bytes, "MB"),
            model.license or "-",
        )
    )
