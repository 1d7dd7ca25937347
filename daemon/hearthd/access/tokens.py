"""The token file: who may call, by the SHA-256 of a random token.

One line for each token: name, digest, when it was created, its role, when it expires. Role and expiry are left out
where they are the default role and never, so that older files, and older daemons, read the same. Lines that start with
# are comments. A token is 256 random bits, so nobody can find it by trying a dictionary, and a slow, salted hash would
only cost every call; a hash at all is there so that a copy of the file lets nobody in.

Changes are written to a new file that takes the old one's place, under a lock. `TokenFile` looks at each use whether
another file stands there, so a revocation holds from the next call on. Expiry is a date, told by a `ForwardClock`.

Knows no gRPC, and of roles the name only. Called by `auth`, `token_command` and `__main__`.
"""

import datetime
import errno
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hearthd.access.forward_clock import ForwardClock
from hearthd.configuration.paths import is_credential
from hearthd.durable_file import replace_file
from hearthd.errors import ConfigError

__all__ = [
    "DEFAULT_ROLE",
    "Token",
    "TokenFile",
    "check_new_token",
    "create_token",
    "list_tokens",
    "make_token_file",
    "revoke_token",
]

_logger = logging.getLogger(__name__)

# Lets scanners for leaked secrets, and people, see what the string is.
_PREFIX: Final = "hearth_"
_RANDOM_BYTES: Final = 32
_MAX_FILE_BYTES: Final = 2**20
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROLE: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_LINE: Final = re.compile(
    rf"({_NAME.pattern}) ([0-9a-f]{{64}}) ([0-9TZ:.+-]{{1,40}})(?: ({_ROLE.pattern})(?: ([0-9TZ:-]{{20}}))?)?"
)
_DATE: Final = "%Y-%m-%dT%H:%M:%SZ"
# What the kernel says of a disk that has died or whose file system is broken, and of a server that is out of reach.
_DISK_FAULTS: Final = frozenset({errno.EIO, errno.EUCLEAN, errno.ESTALE, errno.ENODEV, errno.ENXIO})
_HEADER: Final = "# Hearth's tokens: name, SHA-256 of the token, created, role, expires. Written by `hearthd token`.\n"

DEFAULT_ROLE: Final = "user"
"""Of a token that names none, as those of version 0.1 do."""


@dataclass(frozen=True, slots=True)
class Token:
    """One line of a token file."""

    name: str
    digest: str
    """SHA-256 of the token, hexadecimal."""
    created: str
    """ISO 8601, UTC."""
    role: str = DEFAULT_ROLE
    expires: str | None = None
    """ISO 8601, UTC; None: never."""

    def has_expired(self, now: float) -> bool:
        """Whether the token is not valid any more. now: seconds since 1970."""
        return self.expires is not None and now >= _seconds(self.expires)

    @property
    def identity(self) -> str:
        """Names this token and no later one of the same name."""
        return f"{self.name}/{self.digest[:16]}"


def create_token(path: Path, name: str, *, role: str = DEFAULT_ROLE, seconds_valid: float | None = None) -> str:
    """Add a token to the file, which is made if it is missing, and return the token: it stands nowhere else.

    seconds_valid: from now on; None: it never expires. Whether there is such a role is not known here.
    Raises ConfigError if the name is taken or malformed, or the file cannot be read or written.
    """
    _check_name(name)
    if not _ROLE.fullmatch(role):
        raise ConfigError(f"role {role[:80]!r}: give up to 32 of a-z, 0-9, '_', '-', a letter first")
    now = time.time()
    expires = None if seconds_valid is None else _date(now + seconds_valid)
    with _changing(path) as tokens:
        _check_not_taken(tokens, path, name)
        secret = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
        tokens.append(Token(name, _digest(secret), _date(now), role, expires))
    return secret


def make_token_file(path: Path) -> None:
    """Make a file without tokens, unless there is one. Raises ConfigError if it cannot be written."""
    # Not `exists`, which raises where the directory may not be looked into; `_changing` says it in one line.
    if not os.path.lexists(path):
        with _changing(path):
            pass


def check_new_token(path: Path, name: str) -> None:
    """Raise ConfigError if `create_token` would not take the name now. Writes nothing; the file may be missing."""
    _check_name(name)
    if os.path.lexists(path):
        _check_not_taken(list_tokens(path), path, name)


def revoke_token(path: Path, name: str) -> None:
    """Take a token out of the file. Raises ConfigError if there is none of that name."""
    with _changing(path) as tokens:
        kept = [token for token in tokens if token.name != name]
        if len(kept) == len(tokens):
            raise ConfigError(f"there is no token {name[:80]!r} in {path}; see `hearthd token list`")
        tokens[:] = kept


def list_tokens(path: Path) -> list[Token]:
    """Read the file. Raises ConfigError if it cannot be read, is open to others, or has a line that is not a token."""
    try:
        text, mode = _read(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no token file {path}; `hearthd token create NAME` makes it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"token file {path} cannot be read: {_reason(error)}") from None
    if mode & 0o077 and not is_credential(path):
        raise ConfigError(f"token file {path} has mode {mode:04o}, so that others may use it; run: chmod 600 {path}")
    tokens, bad_lines = _parse(text)
    if bad_lines:
        raise ConfigError(
            f"token file {path}, line {bad_lines[0]}, is not a name, a SHA-256, a time, a role and an expiry; "
            "take the line out"
        )
    return tokens


class TokenFile:
    """The tokens of a file, read anew whenever another file takes its place. One thread uses it."""

    def __init__(self, path: Path, now: Callable[[], float] | None = None) -> None:
        """Read the file. now: for tests. Raises ConfigError as `list_tokens` does."""
        self._path = path
        self._now = now or ForwardClock().now
        self._seen: tuple[int, ...] | None = None
        self._trouble: str | None = None
        self._bad_lines: list[int] = []
        with suppress(OSError):  # which `list_tokens` tells better
            self._seen = self._stat()
        self._tokens = list_tokens(path)

    def __len__(self) -> int:
        return len(self._tokens)

    def find(self, secret: str) -> Token | None:
        """Return the token, or None if the file does not have it now, or it has expired."""
        self._refresh()
        digest = _digest(secret)
        now = self._now()
        found = None
        for token in self._tokens:
            # Every line is compared, each in constant time, so that the time says nothing about any of them.
            if hmac.compare_digest(token.digest, digest):
                found = token
        if found is not None and found.has_expired(now):
            _logger.info("the token of %s has expired", found.name)
            return None
        return found

    def find_problem(self) -> str | None:
        """Look at the file, and return what is wrong with it now and what helps; None if nothing is. Names no path."""
        self._refresh()
        if self._trouble is not None:
            left = f"the {len(self._tokens)} tokens read before stay valid" if self._tokens else "no token is valid"
            return f"auth.token_file cannot be read ({self._trouble}), {left}; put it right, `hearthd doctor` helps"
        if self._bad_lines:
            lines = f"line{'s' if len(self._bad_lines) > 1 else ''} {', '.join(map(str, self._bad_lines[:10]))}"
            return f"auth.token_file: {lines} let nobody in; take them out, and create those tokens anew"
        return None

    def _stat(self) -> tuple[int, ...]:
        found = self._path.stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _refresh(self) -> None:
        seen = None
        try:
            seen = self._stat()
            if seen == self._seen:
                return
            text, _ = _read(self._path)
        except (OSError, ValueError) as error:
            # A file that is too large is not read again for each call; everything else may have passed by the next.
            self._seen = seen if isinstance(error, ValueError) else None
            self._miss(error)
            return
        self._seen, self._trouble = seen, None
        self._tokens, self._bad_lines = _parse(text)
        if self._bad_lines:
            _logger.error("token file %s: lines %s are no tokens and let nobody in", self._path, self._bad_lines[:10])
        _logger.info("token file %s read again: %d tokens", self._path, len(self._tokens))

    def _miss(self, error: OSError | ValueError) -> None:
        """Do without the file: it lets nobody in, unless it is the disk that has failed.

        A revocation must not depend on a well-formed file. But a disk that cannot be read cannot be written either, so
        nobody has been revoked on it, and whoever could call before still can.
        """
        has_disk_failed = isinstance(error, OSError) and error.errno in _DISK_FAULTS
        if not has_disk_failed:
            self._tokens = []
        if self._trouble != (trouble := _reason(error)):
            self._trouble = trouble
            what = f"the {len(self._tokens)} tokens read before stay valid" if has_disk_failed else "no token is valid"
            _logger.error("token file %s cannot be read, %s: %s", self._path, what, trouble)


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime(_DATE)


def _seconds(date: str) -> float:
    """Raises ValueError for what is no date."""
    return datetime.datetime.strptime(date, _DATE).replace(tzinfo=datetime.UTC).timestamp()


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"token name {name[:80]!r}: give up to 64 of A-Z, a-z, 0-9, '.', '_', '-'")


def _check_not_taken(tokens: list[Token], path: Path, name: str) -> None:
    if any(token.name == name for token in tokens):
        raise ConfigError(f"token name {name!r} is taken in {path}; choose another, or revoke that one first")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _read(path: Path) -> tuple[str, int]:
    """Return text and permission bits. Raises OSError, or ValueError for what is no text file of a sane size."""
    with path.open("rb") as file:
        data = file.read(_MAX_FILE_BYTES + 1)
        mode = os.fstat(file.fileno()).st_mode & 0o777
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"it has more than {_MAX_FILE_BYTES} bytes")
    return data.decode("ascii", "replace"), mode


def _parse(text: str) -> tuple[list[Token], list[int]]:
    """Return the tokens and the numbers of the lines that are none."""
    tokens, bad_lines = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        token = _parse_line(line.strip())
        if token is not None:
            tokens.append(token)
        else:
            bad_lines.append(number)
    return tokens, bad_lines


def _parse_line(line: str) -> Token | None:
    match = _LINE.fullmatch(line)
    if not match:
        return None
    name, digest, created, role, expires = match.groups()
    if expires is not None:
        try:
            _seconds(expires)
        except ValueError:
            return None
    return Token(name, digest, created, role or DEFAULT_ROLE, expires)


def _line(token: Token) -> str:
    words = [token.name, token.digest, token.created]
    if token.expires is not None:
        words += [token.role, token.expires]
    elif token.role != DEFAULT_ROLE:
        words.append(token.role)
    return " ".join(words)


@contextmanager
def _changing(path: Path) -> Iterator[list[Token]]:
    """Give the file's tokens to be changed, and write them when the block ends without an error."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Beside the file, not the file itself: that one is replaced, and a lock on the old one keeps nobody out.
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.geteuid() == 0:
                # `sudo hearthd pair` comes first, and then the service makes the device's token under the same lock.
                owner = path.parent.stat()
                os.fchown(lock, owner.st_uid, owner.st_gid)
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = list_tokens(path) if path.exists() else []
            yield tokens
            replace_file(path, "".join((_HEADER, *(f"{_line(token)}\n" for token in tokens))).encode("ascii"))
        finally:
            os.close(lock)
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be written: {_reason(error)}") from None
