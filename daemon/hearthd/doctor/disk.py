"""The disk under the state directory: room, whether it can be written, and what it says of its own health.

Called by `cli`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from hearthd.doctor.finding import Finding, good, note, problem, warning
from hearthd.doctor.system import System

__all__ = ["check_disk_health", "check_free_space", "check_writable"]

_NONE_LEFT_BYTES, _LITTLE_LEFT_BYTES = 50 * 10**6, 500 * 10**6
# JEDEC eMMC 5.1, EXT_CSD: life time in tenths that are used up, 0x0b beyond its end; pre_eol_info.
_LIFE_END, _LIFE_LATE = 0x0B, 0x09
_PRE_END = {"0x02": "80 % of the reserved blocks are used up", "0x03": "90 % of the reserved blocks are used up"}
_BACK_UP: Final = "copy what matters (/var/lib/hearth, /etc/hearth) and replace the card or disk"


def check_free_space(system: System, directory: Path) -> Iterable[Finding]:
    """Ask for room for tokens, usage, the journal and the next model."""
    place = _existing(directory)
    free = system.free_bytes(place)
    said = f"{free / 1e9:.1f} GB free for {directory}"
    remedy = "remove what is not needed: `hearthd model list`, `journalctl --vacuum-size=100M`, `apt clean`"
    if free < _NONE_LEFT_BYTES:
        yield problem("disk space", f"{free / 1e6:.0f} MB free for {directory}", remedy)
    elif free < _LITTLE_LEFT_BYTES:
        yield warning("disk space", f"{free / 1e6:.0f} MB free for {directory}", remedy)
    else:
        yield good("disk space", said)


def check_writable(system: System, directory: Path) -> Iterable[Finding]:
    """Ask whether the file system is still mounted for writing: the kernel takes that away after errors."""
    mounts = _mounts(system)
    place, (device, options) = max(
        ((at, found) for at, found in mounts.items() if directory.is_relative_to(at)),
        key=lambda mount: len(mount[0].parts),
        default=(Path("/"), ("?", ["rw"])),
    )
    if "ro" in options:
        yield problem(
            "disk",
            f"{place} ({device}) is mounted read-only: no token, model or usage can be stored there",
            f"if nobody meant that, the kernel did it after errors: see `dmesg`; then {_BACK_UP}",
        )
    else:
        yield good("disk", f"{place} ({device}) can be written")


def check_disk_health(system: System) -> Iterable[Finding]:
    """Read what ext4 has counted, and what eMMC and SD cards say of their age."""
    is_known, found = False, []
    for path in system.find("/sys/fs/ext4/*/errors_count"):
        is_known = True
        count = system.read(path) or "0"
        if count.isdigit() and int(count):
            device = path.split("/")[-2]
            remedy = f"run fsck on it when it is not in use; {_BACK_UP}"
            found.append(problem("disk health", f"ext4 has found {count} errors on {device}", remedy))
    for path in system.find("/sys/block/mmcblk*/device/life_time"):
        is_known = True
        found.extend(_card_age(system, path))
    if is_known and not found:
        found.append(good("disk health", "no errors counted, no early wear"))
    yield from found or [note("disk health", "this disk says nothing of its health")]


def _card_age(system: System, path: str) -> Iterable[Finding]:
    device = path.split("/")[3]
    used = [int(word, 16) for word in (system.read(path) or "").split() if word.startswith("0x")]
    if used and max(used) >= _LIFE_END:
        yield problem("disk health", f"{device} has outlived the writes that it was made for", _BACK_UP)
    elif used and max(used) >= _LIFE_LATE:
        yield warning("disk health", f"{device} has used up over {max(used) * 10 - 10} % of its writes", _BACK_UP)
    end = system.read(path.replace("life_time", "pre_eol_info")) or ""
    if end in _PRE_END:
        yield warning("disk health", f"{device}: {_PRE_END[end]}", _BACK_UP)


def _mounts(system: System) -> dict[Path, tuple[str, list[str]]]:
    """Return mount points with device and options; of several on one place the last one, which covers the others."""
    mounts = {}
    for line in (system.read("/proc/self/mounts") or "").splitlines():
        words = line.split()
        if len(words) >= 4:
            place = words[1].encode().decode("unicode_escape")
            mounts[Path(place)] = (words[0], words[3].split(","))
    return mounts


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())
