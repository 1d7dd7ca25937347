"""`hearth status`: what the daemon is doing now.

Called by `__main__`.
"""

import argparse
import json
from dataclasses import asdict
from datetime import timedelta

from hearth._values import DaemonStatus
from hearth.cli.connection import open_client
from hearth.cli.terminal import Screen, neutralise_line


def run(arguments: argparse.Namespace) -> int:
    """Print the status, return the exit code: 0 if the daemon answered, whatever its state."""
    screen = Screen()
    with open_client(arguments, screen) as client:
        status = client.status()
        address = client.address
    if arguments.json:
        fields = {"address": address, **asdict(status)}
        screen.write(json.dumps(fields, ensure_ascii=not screen.encoding_is_unicode) + "\n")
    else:
        screen.write("".join(f"{line}\n" for line in _lines(address, status)))
    return 0


def _lines(address: str, status: DaemonStatus) -> list[str]:
    uptime = timedelta(seconds=int(status.uptime_seconds))
    chats = (
        f"{status.num_running} of {status.max_running} running, {status.num_queued} of {status.max_queued} waiting; "
        f"{status.num_chats_finished} finished, {status.num_chats_cancelled} cancelled, "
        f"{status.num_chats_refused} refused, {status.num_chats_failed} failed"
    )
    tokens = (
        f"{status.num_prompt_tokens} read, of which {status.num_cached_prompt_tokens} from the cache; "
        f"{status.num_completion_tokens} written"
    )
    rows = {
        "daemon": f"hearthd {status.version} at {address}",
        "state": status.state,
        "model": status.model or "none yet",
        "up": str(uptime),
        "memory": f"{status.resident_bytes / (1 << 20):.0f} MiB",
        "chats": chats,
        "tokens": tokens,
    }
    return [
        f"{name:<8}{neutralise_line(value)}"
        for name, value in [*rows.items(), *(("warning", warning) for warning in status.warnings)]
    ]
