from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DaemonState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DAEMON_STATE_UNSPECIFIED: _ClassVar[DaemonState]
    DAEMON_STATE_LOADING: _ClassVar[DaemonState]
    DAEMON_STATE_SERVING: _ClassVar[DaemonState]
    DAEMON_STATE_DRAINING: _ClassVar[DaemonState]

class BoardFlag(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BOARD_FLAG_UNSPECIFIED: _ClassVar[BoardFlag]
    BOARD_FLAG_UNDER_VOLTAGE: _ClassVar[BoardFlag]
    BOARD_FLAG_FREQUENCY_CAPPED: _ClassVar[BoardFlag]
    BOARD_FLAG_THROTTLED: _ClassVar[BoardFlag]
    BOARD_FLAG_SOFT_TEMPERATURE_LIMIT: _ClassVar[BoardFlag]
DAEMON_STATE_UNSPECIFIED: DaemonState
DAEMON_STATE_LOADING: DaemonState
DAEMON_STATE_SERVING: DaemonState
DAEMON_STATE_DRAINING: DaemonState
BOARD_FLAG_UNSPECIFIED: BoardFlag
BOARD_FLAG_UNDER_VOLTAGE: BoardFlag
BOARD_FLAG_FREQUENCY_CAPPED: BoardFlag
BOARD_FLAG_THROTTLED: BoardFlag
BOARD_FLAG_SOFT_TEMPERATURE_LIMIT: BoardFlag

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ChatCounts(_message.Message):
    __slots__ = ("running_count", "queued_count", "paused_count")
    RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_COUNT_FIELD_NUMBER: _ClassVar[int]
    PAUSED_COUNT_FIELD_NUMBER: _ClassVar[int]
    running_count: int
    queued_count: int
    paused_count: int
    def __init__(self, running_count: _Optional[int] = ..., queued_count: _Optional[int] = ..., paused_count: _Optional[int] = ...) -> None: ...

class RecentAnswers(_message.Message):
    __slots__ = ("answer_count", "median_time_to_first_token_ms", "worst_time_to_first_token_ms", "median_decode_tokens_per_second")
    ANSWER_COUNT_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_TIME_TO_FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    WORST_TIME_TO_FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_DECODE_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    answer_count: int
    median_time_to_first_token_ms: float
    worst_time_to_first_token_ms: float
    median_decode_tokens_per_second: float
    def __init__(self, answer_count: _Optional[int] = ..., median_time_to_first_token_ms: _Optional[float] = ..., worst_time_to_first_token_ms: _Optional[float] = ..., median_decode_tokens_per_second: _Optional[float] = ...) -> None: ...

class BoardStatus(_message.Message):
    __slots__ = ("temperature_celsius", "has_flags", "flags", "flags_since_start", "thermal_level")
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    HAS_FLAGS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_SINCE_START_FIELD_NUMBER: _ClassVar[int]
    THERMAL_LEVEL_FIELD_NUMBER: _ClassVar[int]
    temperature_celsius: float
    has_flags: bool
    flags: _containers.RepeatedScalarFieldContainer[BoardFlag]
    flags_since_start: _containers.RepeatedScalarFieldContainer[BoardFlag]
    thermal_level: int
    def __init__(self, temperature_celsius: _Optional[float] = ..., has_flags: bool = ..., flags: _Optional[_Iterable[_Union[BoardFlag, str]]] = ..., flags_since_start: _Optional[_Iterable[_Union[BoardFlag, str]]] = ..., thermal_level: _Optional[int] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("name", "is_loaded", "running_count", "queued_count", "load_count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IS_LOADED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_COUNT_FIELD_NUMBER: _ClassVar[int]
    LOAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    is_loaded: bool
    running_count: int
    queued_count: int
    load_count: int
    def __init__(self, name: _Optional[str] = ..., is_loaded: bool = ..., running_count: _Optional[int] = ..., queued_count: _Optional[int] = ..., load_count: _Optional[int] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("state", "version", "uptime_ms", "running_count", "max_running", "queued_count", "max_queued", "resident_bytes", "chats_finished_count", "chats_cancelled_count", "chats_refused_count", "chats_failed_count", "prompt_tokens_count", "cached_prompt_tokens_count", "completion_tokens_count", "model", "warnings", "interactive", "normal", "background", "kv_bytes", "max_kv_bytes", "recent", "board", "models", "drafted_tokens_count", "accepted_tokens_count", "cached_prompt_tokens_from_disk_count", "refused_calls_count")
    class RefusedCallsCountEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_MS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHATS_FINISHED_COUNT_FIELD_NUMBER: _ClassVar[int]
    CHATS_CANCELLED_COUNT_FIELD_NUMBER: _ClassVar[int]
    CHATS_REFUSED_COUNT_FIELD_NUMBER: _ClassVar[int]
    CHATS_FAILED_COUNT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    INTERACTIVE_FIELD_NUMBER: _ClassVar[int]
    NORMAL_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    BOARD_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FROM_DISK_COUNT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_CALLS_COUNT_FIELD_NUMBER: _ClassVar[int]
    state: DaemonState
    version: str
    uptime_ms: int
    running_count: int
    max_running: int
    queued_count: int
    max_queued: int
    resident_bytes: int
    chats_finished_count: int
    chats_cancelled_count: int
    chats_refused_count: int
    chats_failed_count: int
    prompt_tokens_count: int
    cached_prompt_tokens_count: int
    completion_tokens_count: int
    model: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    interactive: ChatCounts
    normal: ChatCounts
    background: ChatCounts
    kv_bytes: int
    max_kv_bytes: int
    recent: RecentAnswers
    board: BoardStatus
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    drafted_tokens_count: int
    accepted_tokens_count: int
    cached_prompt_tokens_from_disk_count: int
    refused_calls_count: _containers.ScalarMap[str, int]
    def __init__(self, state: _Optional[_Union[DaemonState, str]] = ..., version: _Optional[str] = ..., uptime_ms: _Optional[int] = ..., running_count: _Optional[int] = ..., max_running: _Optional[int] = ..., queued_count: _Optional[int] = ..., max_queued: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., chats_finished_count: _Optional[int] = ..., chats_cancelled_count: _Optional[int] = ..., chats_refused_count: _Optional[int] = ..., chats_failed_count: _Optional[int] = ..., prompt_tokens_count: _Optional[int] = ..., cached_prompt_tokens_count: _Optional[int] = ..., completion_tokens_count: _Optional[int] = ..., model: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., interactive: _Optional[_Union[ChatCounts, _Mapping]] = ..., normal: _Optional[_Union[ChatCounts, _Mapping]] = ..., background: _Optional[_Union[ChatCounts, _Mapping]] = ..., kv_bytes: _Optional[int] = ..., max_kv_bytes: _Optional[int] = ..., recent: _Optional[_Union[RecentAnswers, _Mapping]] = ..., board: _Optional[_Union[BoardStatus, _Mapping]] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., drafted_tokens_count: _Optional[int] = ..., accepted_tokens_count: _Optional[int] = ..., cached_prompt_tokens_from_disk_count: _Optional[int] = ..., refused_calls_count: _Optional[_Mapping[str, int]] = ...) -> None: ...
