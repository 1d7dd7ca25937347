"""The daemon that runs while `hearthd pair` does: whether devices would find this certificate there, and its restart.

Looks by a handshake, as a device does, and sends nothing; knows no code and no record. Called by `pairing.cli`.
"""

import hashlib
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hearthd.configuration.paths import UNIT
from hearthd.errors import ConfigError
from hearthd.listening.lan_addresses import lan_addresses
from hearthd.listening.listeners import Listener

__all__ = ["find_problem", "restart_service"]

# There is one where systemd is what runs the machine (sd_booted(3)).
_SYSTEMD: Final = Path("/run/systemd/system")
_PROBE_SECONDS: Final = 3.0


def restart_service() -> None:
    """Let the service read its configuration again; waits until it serves. Raises ConfigError if it does not start."""
    if not shutil.which("systemctl") or not _SYSTEMD.is_dir():
        print("hearthd: restart the daemon, so that it reads its configuration", file=sys.stderr)
        return
    enabled = subprocess.run(["systemctl", "is-enabled", "--quiet", UNIT], stdin=subprocess.DEVNULL, check=False)
    # One that is enabled may have failed for want of what is there now.
    verb = "try-restart" if enabled.returncode else "restart"
    print(f"hearthd: systemctl {verb} {UNIT}", file=sys.stderr, flush=True)
    done = subprocess.run(["systemctl", verb, UNIT], stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ConfigError(f"{UNIT} did not start again; journalctl -u {UNIT} says why")


def find_problem(listeners: Sequence[Listener], fingerprint: bytes) -> str | None:
    """Return why a device would not find this certificate where the daemon listens; None if it would."""
    tcp = sorted((each for each in listeners if not each.socket_path), key=lambda each: not each.is_exposed)
    if not tcp:
        return None
    listener = tcp[0]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(_where(listener), timeout=_PROBE_SECONDS) as connection,
            context.wrap_socket(connection) as tls,
        ):
            served = hashlib.sha256(tls.getpeercert(binary_form=True) or b"").digest()
    except OSError as error:
        return (
            f"no daemon with TLS answers at {listener.text} ({error.strerror or error}); start it, or restart it if it "
            f"runs with an older configuration: systemctl restart {UNIT}"
        )
    if served != fingerprint:
        return f"what listens at {listener.text} shows another certificate; restart it: systemctl restart {UNIT}"
    return None


def _where(listener: Listener) -> tuple[str, int]:
    host, _, port = listener.target.rpartition(":")
    # At an address of the network: one that still runs with an older configuration may be at 127.0.0.1 alone.
    everywhere = next(iter(lan_addresses()), "127.0.0.1")
    return host.strip("[]") if host != "[::]" else everywhere, int(port)
