"""Pairing records: which one-time secrets let a device become a caller, as whom, and for how long.

One file for each record, named by the SHA-256 of its secret, in a directory beside the token file. `hearthd pair`
writes them, as root; the daemon, as the directory's owner, removes the one that it uses. To remove a file is what
claims it: the kernel lets exactly one of two do that, and a daemon that is killed right after has let nobody in.

How long a record is good for is told by the clock that runs since the board was switched on, together with the id of
that run: a wall clock that jumps, which boards without a battery do a minute after each start, neither kills a code nor
keeps it alive, and a restart of the board ends all of them.

Knows no gRPC and no tokens. Called by `pairing.cli` and `pairing.gate`.
"""

import hashlib
import json
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hearthd.durable_file import replace_file, sync_directory
from hearthd.errors import ConfigError

__all__ = ["SECRET_BYTES", "PairingRecord", "PairingRecords"]

SECRET_BYTES: Final = 12
"""96 bits: out of reach of any number of guesses over a network, and short enough to be typed."""
_FILE: Final = re.compile(r"[0-9a-f]{64}")
_MAX_FILE_BYTES: Final = 4096
_MAX_RECORDS: Final = 64
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class PairingRecord:
    """As whom a device may join."""

    name: str
    """Of the token that it will get."""
    role: str
    seconds_left: float


class PairingRecords:
    """The records in one directory."""

    def __init__(self, token_file: Path) -> None:
        """token_file: the records are beside it, and belong to its tokens."""
        self.directory = token_file.with_name(f"{token_file.name}.pairings")

    def create(self, name: str, role: str, *, seconds: float) -> bytes:
        """Make a record, in place of an older one of that name, and return its secret, which stands nowhere else.

        Raises ConfigError if the directory cannot be written.
        """
        try:
            self._make_directory()
            self._sweep(name)
            if len(list(self.directory.iterdir())) >= _MAX_RECORDS:
                raise ConfigError(
                    f"{_MAX_RECORDS} devices are being paired; wait until their codes have expired, or take some back "
                    "with: hearthd pair --cancel NAME"
                )
            secret = secrets.token_bytes(SECRET_BYTES)
            record = {"name": name, "role": role, "boot_id": _boot_id(), "ends": _seconds_since_boot() + seconds}
            replace_file(self._path(secret), json.dumps(record).encode("ascii"))
        except OSError as error:
            raise ConfigError(
                f"{self.directory} cannot be written: {error.strerror}; run this as root, or as the daemon's user"
            ) from None
        return secret

    def find(self, secret: bytes) -> PairingRecord | None:
        """Return the record of a secret, which stays; None if there is none now."""
        return self._read(self._path(secret))

    def claim(self, secret: bytes) -> PairingRecord | None:
        """Take the record of a secret away and return it; None if there is none now. Of two that ask, one gets it.

        Raises OSError if it cannot be taken away, and then nobody got it.
        """
        path = self._path(secret)
        record = self._read(path)
        if record is None:
            return None
        try:
            path.unlink()
        except FileNotFoundError:
            return None
        # Before anything is given for it: a power cut must not bring the record back.
        sync_directory(self.directory)
        return record

    def list(self) -> list[PairingRecord]:
        """Return the records that are good now. Raises ConfigError if the directory cannot be read."""
        try:
            found = [self._read(path) for path in self.directory.iterdir() if _FILE.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.directory} cannot be read: {error.strerror}; run this as root") from None
        return sorted((record for record in found if record), key=lambda record: record.name)

    def cancel(self, name: str) -> None:
        """Take a record away. Raises ConfigError if there is none of that name."""
        if name not in {record.name for record in self.list()}:
            raise ConfigError(f"no device {name[:80]!r} is being paired; see: hearthd pair --list")
        try:
            self._sweep(name)
        except OSError as error:
            raise ConfigError(f"{self.directory} cannot be written: {error.strerror}; run this as root") from None

    def _path(self, secret: bytes) -> Path:
        return self.directory / hashlib.sha256(secret).hexdigest()

    def _read(self, path: Path) -> PairingRecord | None:
        try:
            with path.open("rb") as file:
                fields = json.loads(file.read(_MAX_FILE_BYTES))
            seconds_left = fields["ends"] - _seconds_since_boot()
            if fields["boot_id"] != _boot_id() or not seconds_left > 0:
                return None
            return PairingRecord(str(fields["name"]), str(fields["role"]), seconds_left)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            # Claimed by another in this moment, or not written by us: either way it lets nobody in.
            return None

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(mode=0o700)
        except FileExistsError:
            if self.directory.is_symlink():
                raise ConfigError(f"{self.directory} is a link; remove it, then run this again") from None
            return
        if os.geteuid() == 0:
            # The service must be able to remove what root made; it owns the directory above.
            owner = self.directory.parent.stat()
            os.chown(self.directory, owner.st_uid, owner.st_gid, follow_symlinks=False)
        sync_directory(self.directory.parent)

    def _sweep(self, name: str) -> None:
        """Remove what is no good any more, and what there is of that name."""
        for path in self.directory.iterdir():
            if not _FILE.fullmatch(path.name):
                continue
            record = self._read(path)
            if record is None or record.name == name:
                path.unlink(missing_ok=True)
        sync_directory(self.directory)


def _seconds_since_boot() -> float:
    """Time since the machine was switched on, sleep included, the same for all processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _boot_id() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()
