"""A network of the test's own, with multicast: a namespace with one interface, entered by the process that asks.

`python multicast.py ADDRESS... -- PROGRAM WORD...` runs a program there; the interface has the addresses.
"""

import ctypes
import functools
import os
import subprocess
import sys

_CLONE_NEWNET = 0x40000000
INTERFACE = "hearth0"


def enter(*addresses: str) -> None:
    """Leave the machine's network for one that holds nothing but loopback and an interface with these addresses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    run("link", "set", "lo", "up")
    # What is sent to a group there comes back to whoever on this machine has joined it.
    run("link", "add", INTERFACE, "type", "veth", "peer", "name", f"{INTERFACE}p")
    run("link", "set", INTERFACE, "up", "multicast", "on")
    run("link", "set", f"{INTERFACE}p", "up")
    for address in addresses:
        run("addr", "add", f"{address}/24", "dev", INTERFACE)


def run(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@functools.cache
def why_not() -> str | None:
    """Say why this machine cannot give a test such a network; None if it can."""
    tried = subprocess.run(
        [sys.executable, __file__, "10.77.0.1", "--", "true"], capture_output=True, text=True, check=False
    )
    return None if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["it failed"])[-1]


if __name__ == "__main__":
    split = sys.argv.index("--")
    enter(*sys.argv[1:split])
    os.execvp(sys.argv[split + 1], sys.argv[split + 1 :])
