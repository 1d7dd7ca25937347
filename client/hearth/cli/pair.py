"""`hearth pair`: become a caller of a daemon by its code; list and forget daemons.

Called by `__main__`.
"""

import argparse
import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from hearth._errors import ConfigurationError
from hearth._paired import PairedDaemon, PairedDaemons
from hearth.cli.terminal import Screen, neutralise_line

if TYPE_CHECKING:
    from hearth._pairing import Pairing


def run(arguments: argparse.Namespace) -> int:
    """Pair, list or forget; return the exit code."""
    if sum((arguments.code is not None, arguments.list, arguments.forget is not None)) != 1:
        raise ConfigurationError("give one of CODE, --list and --forget NAME; `hearthd pair NAME`, on the board, "
                                 "prints a CODE")  # fmt: skip
    screen, daemons = Screen(), PairedDaemons(os.environ)
    if arguments.forget is not None:
        return _forget(screen, daemons, arguments.forget)
    if arguments.list:
        _list(screen, daemons.all(), as_json=arguments.json)
        return 0
    # gRPC is slow to import, and a list does without.
    from hearth._pairing import pair

    pairing = pair(arguments.code, daemons, name=arguments.name)
    if arguments.json:
        screen.write(json.dumps(_fields(pairing.daemon), ensure_ascii=not screen.encoding_is_unicode) + "\n")
    else:
        _report(screen, pairing)
    return 0


def _report(screen: Screen, pairing: "Pairing") -> None:
    daemon = pairing.daemon
    screen.write(
        f"paired with {daemon.name} at {daemon.addresses[0]}, as {neutralise_line(daemon.device)} "
        f"(role {neutralise_line(daemon.role)})\n"
    )
    if pairing.has_replaced:
        screen.write(f"{daemon.name} has another certificate than before; what was stored of it is replaced\n")
    if pairing.namesakes:
        screen.write(
            f"{', '.join(pairing.namesakes)}, stored before, has the same name of its own; if it is no more: hearth "
            f"pair --forget {pairing.namesakes[0]}\n"
        )
    screen.note('now ask it something: hearth ask "Why is the sky blue?"')


def _forget(screen: Screen, daemons: PairedDaemons, name: str) -> int:
    remedy = "hearthd token revoke NAME"
    # A file that cannot be used can be forgotten all the same.
    with suppress(ConfigurationError):
        remedy = f"hearthd token revoke {neutralise_line(daemons.read(name).device)}"
    daemons.forget(name)
    screen.write(f"forgot {name}; this ends its token, on its machine: {remedy}\n")
    return 0


def _list(screen: Screen, daemons: list[PairedDaemon], *, as_json: bool) -> None:
    if as_json:
        listed = {"daemons": [_fields(daemon) for daemon in daemons]}
        screen.write(json.dumps(listed, ensure_ascii=not screen.encoding_is_unicode) + "\n")
        return
    for daemon in daemons:
        screen.write(
            f"{daemon.name}  {', '.join(daemon.addresses)}  as {neutralise_line(daemon.device)}  "
            f"certificate {daemon.fingerprint[:16]}\n"
        )
    if not daemons:
        screen.note("paired with no daemon; `hearthd pair NAME`, on the board, prints a code for: hearth pair CODE")


def _fields(daemon: PairedDaemon) -> dict[str, object]:
    """What may be shown: all but the token."""
    return {
        "name": daemon.name,
        "addresses": list(daemon.addresses),
        "fingerprint": daemon.fingerprint,
        "device": daemon.device,
        "role": daemon.role,
    }
