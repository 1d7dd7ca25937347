"""A status as lines for people: all of it, or one line for a moment of it.

Pure functions. Called by `status` and `status_watch`.
"""

from dataclasses import dataclass
from datetime import timedelta

from hearth._status import BoardStatus, ChatCounts, DaemonStatus
from hearth.cli.terminal import neutralise_line

_MIB = 1 << 20
_LEVELS = ("nothing held back", "fewer chats at once", "fewer threads", "pauses between steps")


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened between two statuses of one daemon, for each second."""

    written: float
    """Tokens of answers."""
    read: float
    """Tokens of prompts that were computed, cached ones not among them."""
    cached_share: float | None
    """Of all tokens of prompts; None if there were none."""


def rates_between(before: DaemonStatus, after: DaemonStatus) -> Rates | None:
    """Return what happened; None if the daemon was restarted in between."""
    seconds = after.uptime_seconds - before.uptime_seconds
    written = after.num_completion_tokens - before.num_completion_tokens
    prompts = after.num_prompt_tokens - before.num_prompt_tokens
    cached = after.num_cached_prompt_tokens - before.num_cached_prompt_tokens
    if seconds <= 0 or min(written, prompts, cached) < 0:
        return None
    return Rates(written / seconds, (prompts - cached) / seconds, cached / prompts if prompts else None)


def describe(address: str, status: DaemonStatus, rates: Rates | None = None) -> list[str]:
    """Return all of a status, line by line. rates: None if nobody watches."""
    chats = (
        f"{status.num_running} of {status.max_running} running, {status.num_queued} of {status.max_queued} waiting; "
        f"{status.num_chats_finished} finished, {status.num_chats_cancelled} cancelled, "
        f"{status.num_chats_refused} refused, {status.num_chats_failed} failed"
    )
    tokens = (
        f"{status.num_prompt_tokens} read, of which {status.num_cached_prompt_tokens} from the cache; "
        f"{status.num_completion_tokens} written"
    )
    if status.num_drafted_tokens:
        share = status.num_accepted_tokens / status.num_drafted_tokens
        tokens += f"; {status.num_drafted_tokens} guessed ahead, {share:.0%} rightly"
    rows = [
        ("daemon", f"hearthd {status.version} at {address}"),
        ("state", status.state),
        ("model", status.model or "none yet"),
        ("up", str(timedelta(seconds=int(status.uptime_seconds)))),
        ("memory", _memory(status)),
        ("chats", chats),
        *_priorities(status),
        ("tokens", tokens),
    ]
    if rates is not None:
        rows.append(("speed", _speed(rates)))
    if status.recent.num_answers:
        rows.append(("recent", _recent(status)))
    if len(status.models) > 1:
        rows.append(("models", ", ".join(_models(status))))
    if status.num_refused_calls:
        reasons = sorted(status.num_refused_calls.items(), key=lambda reason: (-reason[1], reason[0]))
        rows.append(("refused", ", ".join(f"{number} {_plain(reason)}" for reason, number in reasons)))
    if board := _board(status.board):
        rows.append(("board", board))
    rows += [("warning", warning) for warning in status.warnings]
    return [f"{name:<8}{neutralise_line(value)}" for name, value in rows]


def describe_in_a_line(status: DaemonStatus, rates: Rates | None) -> str:
    """Return what changes from moment to moment, for a log or a pipe."""
    paused = sum(counts.num_paused for _, counts in _by_priority(status))
    parts = [
        status.state,
        f"{status.num_running} running",
        f"{paused} paused",
        f"{status.num_queued} waiting",
        _speed(rates) if rates else "- tokens/s written, - read",
    ]
    if status.recent.num_answers:
        parts.append(f"first token {_seconds(status.recent.median_time_to_first_token_seconds)}")
    parts.append(_memory(status))
    if board := _board(status.board):
        parts.append(board)
    if status.warnings:
        parts.append(f"{len(status.warnings)} warning{'s' if len(status.warnings) > 1 else ''}")
    return neutralise_line(", ".join(parts))


def _memory(status: DaemonStatus) -> str:
    said = f"{status.resident_bytes / _MIB:.0f} MiB"
    if status.max_kv_bytes:
        said += f", of which KV {status.kv_bytes / _MIB:.0f} of {status.max_kv_bytes / _MIB:.0f} MiB"
    return said


def _priorities(status: DaemonStatus) -> list[tuple[str, str]]:
    """Say whose chats they are, where it is not plain: they have several priorities, or some are paused."""
    groups = []
    for name, counts in _by_priority(status):
        numbers = ((counts.num_running, "running"), (counts.num_paused, "paused"), (counts.num_queued, "waiting"))
        if said := " ".join(f"{number} {what}" for number, what in numbers if number):
            groups.append(f"{name} {said}")
    is_plain = len(groups) <= 1 and not any(counts.num_paused for _, counts in _by_priority(status))
    return [] if is_plain else [("", "; ".join(groups))]


def _by_priority(status: DaemonStatus) -> tuple[tuple[str, ChatCounts], ...]:
    return (
        ("interactive", status.interactive),
        ("normal", status.normal),
        ("background", status.background),
    )


def _speed(rates: Rates) -> str:
    said = f"{rates.written:.1f} tokens/s written, {rates.read:.0f} read"
    return said if rates.cached_share is None else f"{said}, {rates.cached_share:.0%} of prompts cached"


def _recent(status: DaemonStatus) -> str:
    recent = status.recent
    said = (
        f"first token after {_seconds(recent.median_time_to_first_token_seconds)}, at worst "
        f"{_seconds(recent.worst_time_to_first_token_seconds)}"
    )
    if recent.median_decode_tokens_per_second:
        said += f"; {recent.median_decode_tokens_per_second:.1f} tokens/s an answer"
    return f"{said}; {recent.num_answers} answer{'s' if recent.num_answers > 1 else ''}"


def _models(status: DaemonStatus) -> list[str]:
    return [
        f"{model.name} ({f'{model.num_running} running' if model.is_loaded else 'not loaded'})"
        for model in status.models
    ]


def _board(board: BoardStatus) -> str:
    said = []
    if board.temperature_celsius is not None:
        said.append(f"{board.temperature_celsius:.0f} degrees Celsius")
    if board.flags:
        said.append(", ".join(_plain(flag) for flag in board.flags))
    if past := [flag for flag in board.flags_since_start if flag not in (board.flags or ())]:
        said.append(f"earlier {', '.join(_plain(flag) for flag in past)}")
    if board.thermal_level:
        held_back = _LEVELS[min(board.thermal_level, len(_LEVELS) - 1)]
        said.append(f"level {board.thermal_level}: {held_back}")
    return "; ".join(said)


def _plain(word: str) -> str:
    return word.replace("_", " ")


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
