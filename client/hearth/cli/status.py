"""`hearth status`: what the daemon is doing now, once, or again and again with `--watch`.

Called by `__main__`. What a status looks like is in `status_lines`, how it is watched in `status_watch`.
"""

import argparse
import json
from dataclasses import asdict

from hearth.cli.connection import open_client
from hearth.cli.status_lines import describe
from hearth.cli.status_watch import watch
from hearth.cli.terminal import Screen


def run(arguments: argparse.Namespace) -> int:
    """Print the status, return the exit code: 0 if the daemon answered, whatever its state."""
    screen = Screen()
    with open_client(arguments, screen) as client:
        if arguments.watch:
            return watch(client, screen, interval=arguments.interval, as_json=arguments.json)
        status = client.status()
        address = client.address
    if arguments.json:
        fields = {"address": address, **asdict(status)}
        screen.write(json.dumps(fields, ensure_ascii=not screen.encoding_is_unicode) + "\n")
    else:
        screen.write("".join(f"{line}\n" for line in describe(address, status)))
    return 0
