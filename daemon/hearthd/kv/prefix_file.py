"""One stored prefix: a header, the KV of its tokens chunk by chunk, and the SHA-256 of all that.

    8 bytes  what it is          32 bytes  its key          4 + 4 bytes  tokens, bytes of a token's KV
    KV       of CHUNK tokens each, as the runner gives it, the last chunk shorter
    32 bytes SHA-256 of everything before

No text and no token ids: the key is a hash. Whatever is read is input, and may be anything. Knows no directory and no
runner. Called by `prefix_store`, in threads of its own.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

__all__ = ["CHUNK", "DamagedPrefixError", "file_size", "is_ours", "read_chunks", "written"]

CHUNK: Final = 64
_MAGIC: Final = b"hearthk1"
_HEADER: Final = struct.Struct("<8s32sII")
_DIGEST_BYTES: Final = 32


class DamagedPrefixError(Exception):
    """A file is not what its name says: damaged, cut short, somebody else's, or readable by others."""


def file_size(num_tokens: int, token_bytes: int) -> int:
    """Return the bytes of a file."""
    return _HEADER.size + num_tokens * token_bytes + _DIGEST_BYTES


def is_ours(status: os.stat_result) -> bool:
    """Whether a file is a plain one that this user alone can read and write."""
    is_plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    return is_plain and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o600


def written(key: bytes, num_tokens: int, token_bytes: int, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a file's bytes, piece by piece."""
    header = _HEADER.pack(_MAGIC, key, num_tokens, token_bytes)
    digest = hashlib.sha256(header)
    yield header
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    yield digest.digest()


def read_chunks(path: Path, key: bytes, num_tokens: int, token_bytes: int) -> Iterator[bytes]:
    """Yield the KV of CHUNK tokens after the other. Only when all are read it is certain that they are right.

    Raises DamagedPrefixError, or OSError.
    """
    # A time of reading would be a write to the card.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOATIME
    try:
        descriptor = os.open(path, flags)
    except PermissionError:  # without O_NOATIME, too, for whatever is ours
        raise DamagedPrefixError("owner or mode") from None
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not is_ours(status) or status.st_size != file_size(num_tokens, token_bytes):
            raise DamagedPrefixError("mode or size")
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        header = _read(file.fileno(), _HEADER.size)
        if header != _HEADER.pack(_MAGIC, key, num_tokens, token_bytes):
            raise DamagedPrefixError("header")
        digest = hashlib.sha256(header)
        for start in range(0, num_tokens, CHUNK):
            chunk = _read(descriptor, min(CHUNK, num_tokens - start) * token_bytes)
            digest.update(chunk)
            yield chunk
        if _read(descriptor, _DIGEST_BYTES) != digest.digest():
            raise DamagedPrefixError("checksum")


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, size)
        if not part:
            raise DamagedPrefixError("cut short")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
