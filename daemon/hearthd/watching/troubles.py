"""What somebody should look at: one line for each thing that is wrong now, with what helps.

The parts of the daemon are asked, and the disks that it writes to. Nothing is remembered here: what is well again is
told no more. The lines are for every caller who may ask for the status, so they name keys of the configuration and not
paths; the journal and `hearthd doctor`, which are the owner's, say more.

Made by `life.parts`, which hands `find` to the status service.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

__all__ = ["Troubles", "find_disk_trouble"]

# A token file, a day's usage and an audit log's next lines fit into this, and a file system's last blocks do not.
_NONE_LEFT_BYTES: Final = 2**20


class Troubles:
    """Asks everybody, at each question anew. Of the event loop."""

    def __init__(self, parts: Iterable[Callable[[], str | None]], written: Mapping[str, Path | None]) -> None:
        """parts: each returns a line, or None if all is well.

        written: the files that the daemon writes while it serves, by the key that names them; None: it writes none.
        """
        self._parts = tuple(parts)
        self._written = {key: path for key, path in written.items() if path is not None}

    def find(self) -> list[str]:
        """Return the lines; none if all is well."""
        lines = [line for part in self._parts if (line := part()) is not None]
        return lines + [line for key, path in self._written.items() if (line := find_disk_trouble(key, path))]


def find_disk_trouble(key: str, path: Path) -> str | None:
    """Say whether the disk below a file can take nothing, before something has to be written there."""
    place = next((each for each in path.parents if each.is_dir()), None)
    if place is None:
        return f"{key}: its directory cannot be looked at; see `hearthd doctor`"
    try:
        found = os.statvfs(place)
    except OSError as error:
        return f"{key}: its disk cannot be looked at ({error.strerror}); see `dmesg` and `hearthd doctor`"
    if found.f_flag & os.ST_RDONLY:
        return (
            f"{key}: its disk is mounted read-only, so nothing can be stored; if nobody meant that, the kernel did it "
            "after errors: see `dmesg` and `hearthd doctor`"
        )
    if (free := found.f_bavail * found.f_frsize) < _NONE_LEFT_BYTES:
        return f"{key}: its disk is full ({free // 1024} KiB left), so nothing can be stored; make room there"
    return None
