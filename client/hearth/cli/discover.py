"""`hearth discover`: the daemons that announce themselves on the local network.

Called by `__main__`.
"""

import argparse
import json
import os

from hearth._discovery import ANNOUNCING, FoundDaemon, discover
from hearth._paired import PairedDaemons
from hearth.cli.terminal import Screen, neutralise_line


def run(arguments: argparse.Namespace) -> int:
    """Ask the network, print what answers, return the exit code: 0 if the network could be asked."""
    screen = Screen()
    paired = {daemon.fingerprint: daemon.name for daemon in PairedDaemons(os.environ).all()}
    found = discover(arguments.seconds, interfaces=arguments.interface or ())
    if arguments.json:
        listed = {"daemons": [_fields(daemon, paired) for daemon in found]}
        screen.write(json.dumps(listed, ensure_ascii=not screen.encoding_is_unicode) + "\n")
        return 0
    for daemon in found:
        name = paired.get(daemon.fingerprint) if daemon.fingerprint else None
        screen.write(
            f"{neutralise_line(daemon.name)}  {', '.join(daemon.addresses)}  certificate "
            f"{daemon.fingerprint[:16] or 'unknown'}  {f'paired as {name}' if name else 'not paired'}\n"
        )
    if not found:
        screen.note(
            f"no daemon announced itself within {arguments.seconds:g} s; {ANNOUNCING}, and is restarted after that; "
            "many guest networks keep their machines apart; without announcing: hearth pair CODE, or --address"
        )
    return 0


def _fields(daemon: FoundDaemon, paired: dict[str, str]) -> dict[str, object]:
    return {
        "name": daemon.name,
        "addresses": list(daemon.addresses),
        "fingerprint": daemon.fingerprint,
        "paired_as": paired.get(daemon.fingerprint) if daemon.fingerprint else None,
    }
