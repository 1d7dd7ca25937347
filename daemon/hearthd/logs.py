"""Where the daemon's log goes: the journal under systemd, readable lines on a terminal.

An exception is logged as its type and the places that it came through, never with its message: a message may quote
what a person said to the model, and that must not be kept. Called by `__main__`; everybody else uses `logging`.
"""

import logging
import os
import secrets
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TextIO

__all__ = ["configure_logging", "describe_exception", "log_incident", "set_log_level"]

_logger = logging.getLogger(__name__)

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))


def describe_exception(error: BaseException) -> str:
    """Return an exception's type and where it was raised and passed on, innermost last; no message, no values."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames[-12:]]
    described = f"{type(error).__module__}.{type(error).__qualname__} at {' > '.join(places) or 'no place'}"
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return described if cause is None else f"{described}, from {type(cause).__module__}.{type(cause).__qualname__}"


def log_incident(what: str, error: BaseException) -> str:
    """Log an exception that nobody expected, without its message; return the id that stands with it."""
    incident = secrets.token_hex(6)
    _logger.error("%s, incident %s: %s", what, incident, describe_exception(error))
    return incident


class _Formatter(logging.Formatter):
    """One line for each record, with time and level where the journal does not add its own."""

    def __init__(self, *, has_time: bool = False) -> None:
        super().__init__()
        self._has_time = has_time

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            message = f"{message} ({describe_exception(record.exc_info[1])})"
        # A line break inside of a message would let its second half pass for another record.
        message = message.replace("\n", " ").replace("\r", " ")
        if not self._has_time:
            return message
        return f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} {message}"


class _JournalHandler(logging.Handler):
    """Sends records to the journal. systemd-python's own handler would send messages of exceptions with them."""

    def __init__(self, send: Callable[..., object]) -> None:
        super().__init__()
        self._send = send
        self.setFormatter(_Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(
                self.format(record),
                PRIORITY=_priority(record.levelno),
                SYSLOG_IDENTIFIER="hearthd",
                LOGGER=record.name,
                CODE_FILE=record.pathname,
                CODE_LINE=record.lineno,
                CODE_FUNC=record.funcName,
                THREAD_NAME=record.threadName,
            )
        except OSError:  # a full disk ends the log, not the service
            self.handleError(record)


class _PrefixHandler(logging.StreamHandler[TextIO]):
    """Writes `<priority>message`, which the journal reads from standard error (sd-daemon(3))."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.setFormatter(_Formatter())

    def format(self, record: logging.LogRecord) -> str:
        return f"<{_priority(record.levelno)}>{super().format(record)}"


def configure_logging(
    level: str, *, environment: Mapping[str, str] = os.environ, stream: TextIO | None = None
) -> logging.Handler:
    """Send all records of `level` and above to the right place; return the handler that does it."""
    handler = _choose_handler(environment, sys.stderr if stream is None else stream)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_log_level(level)
    # `logging` prints a failing handler's traceback with the record's arguments.
    logging.raiseExceptions = False
    return handler


def set_log_level(level: str) -> None:
    """Send records of `level` and above, from now on."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    # At debug, asyncio and gRPC would tell about themselves only.
    for name in ("asyncio", "grpc"):
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))


def _choose_handler(environment: Mapping[str, str], stream: TextIO) -> logging.Handler:
    if _is_journal(environment, stream):
        try:
            from systemd.journal import send
        except ImportError:
            return _PrefixHandler(stream)
        return _JournalHandler(send)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter(has_time=True))
    return handler


def _is_journal(environment: Mapping[str, str], stream: TextIO) -> bool:
    """Whether the stream itself is the journal's, as JOURNAL_STREAM says it (systemd.exec(5)).

    The variable alone is not enough: it is inherited by whatever a service starts, with its stream sent elsewhere.
    """
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def _priority(level: int) -> int:
    return next((priority for at_least, priority in _PRIORITIES if level >= at_least), 7)
