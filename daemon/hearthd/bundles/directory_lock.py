"""One process at a time changes a directory. Called by `store` and `fetch`."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from hearthd.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK_NAME: Final = ".hearthd.lock"


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the lock of `directory`, which is made if it is not there; the kernel lets go of it when the process ends.

    Raises BuildError when another process holds it.
    """
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise BuildError(f"{directory} cannot be written: {error.strerror}; check its owner, or use sudo") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"another process is at work in {directory}; wait until it has finished") from None
        yield
    finally:
        os.close(descriptor)
