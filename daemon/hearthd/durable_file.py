"""One small file, replaced durably: after a power cut at any moment the old one is there or the new one, whole.

Knows nothing of what is in the file, and takes no lock: whoever reads, changes and writes must hold one. Called by
whatever keeps secrets and counts in the state directory: `tokens`, `daily_usage`,
`pairing`, and by `kv.prefix_store`.
"""

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["replace_file", "sync_directory"]


def replace_file(path: Path, data: bytes | Iterable[bytes], *, mode: int = 0o600) -> None:
    """Write a new file, readable by its owner alone, and let it take the old one's place. Raises OSError.

    data: or its pieces; whatever they raise leaves the old file as it is. mode: of the file, where others may read it
    too. What a killed process left behind is removed; the directory must exist.
    """
    temporary = Path(f"{path}.new")
    temporary.unlink(missing_ok=True)
    # Mode and O_EXCL from the start: at no moment can another user read it or have made it.
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "wb") as file:
            if os.geteuid() == 0:
                # `sudo hearthd token create` writes into the service's directory; the service must be able to read it.
                owner = path.stat() if path.exists() else path.parent.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            os.fchmod(descriptor, mode)
            file.writelines((data,) if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        # A full disk gets its bytes back.
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make durable which files a directory has. Raises OSError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
