from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DaemonState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DAEMON_STATE_UNSPECIFIED: _ClassVar[DaemonState]
    DAEMON_STATE_LOADING: _ClassVar[DaemonState]
    DAEMON_STATE_SERVING: _ClassVar[DaemonState]
    DAEMON_STATE_DRAINING: _ClassVar[DaemonState]
DAEMON_STATE_UNSPECIFIED: DaemonState
DAEMON_STATE_LOADING: DaemonState
DAEMON_STATE_SERVING: DaemonState
DAEMON_STATE_DRAINING: DaemonState

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("state", "version", "uptime_ms", "running_count", "max_running", "queued_count", "max_queued", "resident_bytes", "chats_finished_count", "chats_cancelled_count", "chats_refused_count", "chats_failed_count", "prompt_tokens_count", "cached_prompt_tokens_count", "completion_tokens_count", "model", "warnings")
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
    def __init__(self, state: _Optional[_Union[DaemonState, str]] = ..., version: _Optional[str] = ..., uptime_ms: _Optional[int] = ..., running_count: _Optional[int] = ..., max_running: _Optional[int] = ..., queued_count: _Optional[int] = ..., max_queued: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., chats_finished_count: _Optional[int] = ..., chats_cancelled_count: _Optional[int] = ..., chats_refused_count: _Optional[int] = ..., chats_failed_count: _Optional[int] = ..., prompt_tokens_count: _Optional[int] = ..., cached_prompt_tokens_count: _Optional[int] = ..., completion_tokens_count: _Optional[int] = ..., model: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...
