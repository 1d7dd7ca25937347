"""Becomes another command that may make only the system calls that hearthd.service may make. Needs no systemd, no root.

    PYTHONPATH=tests python tests/confined.py .venv/bin/python -m pytest tests/test_server.py

In force are, as the unit says them: SystemCallFilter (read from the unit, its sets as systemd-analyze lists them),
SystemCallErrorNumber, SystemCallArchitectures=native, MemoryDenyWriteExecute (by systemd's own filter, and by the
kernel's PR_SET_MDWE where it has that), RestrictAddressFamilies, NoNewPrivileges. Root becomes somebody without any
right of root's, in a user namespace where the files of root are its own: the service is not root either. What the
unit does to mounts is not here: tests/test_real_systemd.py and `make board` run the whole unit.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

UNIT = Path(__file__).parent.parent / "deploy/systemd/hearthd.service"
_NOBODY = 65534
_CLONE_NEWUSER = 0x10000000
# linux/prctl.h, since 6.3: the bit says that nothing becomes executable that was or is writable.
_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
# seccomp.h of libseccomp 2.
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EQUAL, _MASKED_EQUAL = 4, 7
_SHM_EXEC = 0o100000
_FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
# linux/socket.h: AF_MCTP is the last one now; a few more do no harm.
_NUM_FAMILIES = 64


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def _is(argument: int, value: int) -> _Comparison:
    return _Comparison(argument, _EQUAL, value, 0)


def _has(argument: int, bits: int) -> _Comparison:
    return _Comparison(argument, _MASKED_EQUAL, bits, bits)


def why_not() -> str:
    """Return what is missing here to confine a command; "" if nothing."""
    try:
        ctypes.CDLL("libseccomp.so.2")
        subprocess.run(["systemd-analyze", "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "needs libseccomp and systemd-analyze"
    return ""


def unit_lines(key: str) -> list[str]:
    """Return the values of a key of the unit, in their order."""
    lines = (line.partition("=") for line in UNIT.read_text(encoding="utf-8").splitlines())
    return [value for name, _, value in lines if name == key]


def allowed_calls() -> set[str]:
    """Return the names of the system calls that the unit's filter leaves."""
    sets: dict[str, list[str]] = {}
    listed = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter"], capture_output=True, text=True, check=True
    )
    for line in listed.stdout.splitlines():
        if line.startswith("@"):
            sets[line.strip()] = members = []
        elif line.startswith("    ") and not line.strip().startswith("#"):
            members.append(line.strip())

    def expand(names: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for name in names:
            found |= expand(sets[name]) if name.startswith("@") else {name}
        return found

    # systemd.exec(5): the first list allows, those with ~ take away; without @default no program starts.
    allowed = expand(["@default"])
    for line in unit_lines("SystemCallFilter"):
        if line.startswith("~"):
            allowed -= expand(line[1:].split())
        else:
            allowed |= expand(line.split())
    return allowed


class _Filter:
    """One filter of libseccomp: what is not named gets `default`."""

    def __init__(self, default: int) -> None:
        self._library = library = ctypes.CDLL("libseccomp.so.2")
        library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))

    def add(self, action: int, call: str, *comparisons: _Comparison) -> None:
        number = self._library.seccomp_syscall_resolve_name(call.encode())
        if number < 0:  # another architecture's
            return
        array = (_Comparison * len(comparisons))(*comparisons)
        _check(
            -self._library.seccomp_rule_add_array(
                self._context, ctypes.c_uint32(action), ctypes.c_int(number), ctypes.c_uint(len(comparisons)), array
            ),
            call,
        )

    def load(self) -> None:
        """Put it into force, for good; NoNewPrivileges comes with it."""
        _check(-self._library.seccomp_load(self._context), "seccomp_load")


def _check(error: int, what: str) -> None:
    if error:
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _become_nobody() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "no user namespace, and a filter for a service that is not root fits no root")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_NOBODY} 0 1")
    Path("/proc/self/gid_map").write_text(f"{_NOBODY} 0 1")


def _deny_writable_code() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) and ctypes.get_errno() != errno.EINVAL:
        raise OSError(ctypes.get_errno(), "PR_SET_MDWE")


def _deny_by_argument() -> None:
    """What systemd makes of MemoryDenyWriteExecute and RestrictAddressFamilies (systemd.exec(5))."""
    rules = _Filter(_ALLOW)
    denied = _ERRNO | errno.EPERM
    rules.add(denied, "mmap", _has(2, mmap.PROT_WRITE | mmap.PROT_EXEC))
    for call in ("mprotect", "pkey_mprotect"):
        rules.add(denied, call, _has(2, mmap.PROT_EXEC))
    rules.add(denied, "shmat", _has(2, _SHM_EXEC))
    families = {_FAMILIES[name] for line in unit_lines("RestrictAddressFamilies") for name in line.split()}
    for family in set(range(_NUM_FAMILIES)) - families:
        rules.add(_ERRNO | errno.EAFNOSUPPORT, "socket", _is(0, family))
    rules.load()


def confine() -> None:
    """Put all of it into force for this process and those that it starts."""
    refused = _ERRNO | getattr(errno, unit_lines("SystemCallErrorNumber")[-1])
    rules = _Filter(refused)
    for call in sorted(allowed_calls()):
        rules.add(_ALLOW, call)
    if os.geteuid() == 0:
        _become_nobody()
    _deny_writable_code()
    _deny_by_argument()
    rules.load()


if __name__ == "__main__":
    if why := why_not():
        sys.exit(why)
    confine()
    os.execvp(sys.argv[1], sys.argv[1:])
