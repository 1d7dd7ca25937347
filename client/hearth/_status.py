"""What a daemon says of itself, as values. Made by `_responses`; part of the public interface."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class DaemonState(enum.StrEnum):
    """What the daemon can do at the moment."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    """Shutting down: running answers finish, new ones are refused."""
    UNKNOWN = "unknown"
    """A state that this client is too old to know."""


class BoardFlag(enum.StrEnum):
    """What a board's firmware complains of."""

    UNDER_VOLTAGE = "under_voltage"
    FREQUENCY_CAPPED = "frequency_capped"
    THROTTLED = "throttled"
    SOFT_TEMPERATURE_LIMIT = "soft_temperature_limit"
    UNKNOWN = "unknown"
    """One that this client is too old to know."""


@dataclass(frozen=True, slots=True)
class ChatCounts:
    """Chats of one priority, now."""

    num_running: int = 0
    num_queued: int = 0
    num_paused: int = 0
    """Begun, and standing aside for others."""


@dataclass(frozen=True, slots=True)
class RecentAnswers:
    """How fast the last answers came; all 0 if there are none."""

    num_answers: int = 0
    median_time_to_first_token_seconds: float = 0.0
    worst_time_to_first_token_seconds: float = 0.0
    median_decode_tokens_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class BoardStatus:
    """The daemon's machine: heat and power."""

    temperature_celsius: float | None = None
    """None where the machine does not say."""
    flags: tuple[BoardFlag, ...] | None = None
    """What is so now; None where the machine does not say."""
    flags_since_start: tuple[BoardFlag, ...] = ()
    thermal_level: int = 0
    """What the daemon holds back because of heat: 0 nothing, 1 chats, 2 threads, 3 pauses."""


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """A model, and what it has to do now."""

    name: str
    is_loaded: bool
    num_running: int
    num_queued: int
    num_loads: int


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The daemon at one moment. The totals count from its start."""

    state: DaemonState
    version: str
    model: str
    """The default model's name."""
    uptime_seconds: float
    num_running: int
    max_running: int
    num_queued: int
    max_queued: int
    resident_bytes: int
    num_chats_finished: int
    num_chats_cancelled: int
    num_chats_refused: int
    num_chats_failed: int
    num_prompt_tokens: int
    num_cached_prompt_tokens: int
    num_completion_tokens: int
    warnings: tuple[str, ...] = ()
    """What somebody should look at, for example a renewed certificate that cannot be used."""
    interactive: ChatCounts = ChatCounts()
    normal: ChatCounts = ChatCounts()
    background: ChatCounts = ChatCounts()
    kv_bytes: int = 0
    """Memory of key-value caches in use."""
    max_kv_bytes: int = 0
    """The most that it may be; 0 for no limit."""
    recent: RecentAnswers = RecentAnswers()
    board: BoardStatus = BoardStatus()
    models: tuple[ModelLoad, ...] = ()
    """The default one first."""
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    """Of the drafted ones, those that the model would have chosen itself."""
    num_cached_prompt_tokens_from_disk: int = 0
    num_refused_calls: Mapping[str, int] = field(default_factory=dict)
    """Calls of any method, by reason."""
