"""hearth.v1.StatusService: what the daemon is doing now."""

import os
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Final

import grpc

from hearth.v1 import status_pb2, status_pb2_grpc
from hearthd.board.thermal import BoardFlag
from hearthd.inference.worker import State
from hearthd.models.entry import Entry
from hearthd.models.pool import ModelPool
from hearthd.priority import Priority
from hearthd.sequences.sequence import Sequence, SequenceState
from hearthd.version import daemon_version
from hearthd.watching.observation import Observation

__all__ = ["StatusService"]

_STATES: Final = {
    State.LOADING: status_pb2.DAEMON_STATE_LOADING,
    State.SERVING: status_pb2.DAEMON_STATE_SERVING,
    State.DRAINING: status_pb2.DAEMON_STATE_DRAINING,
    State.ENDED: status_pb2.DAEMON_STATE_DRAINING,
}
_FLAGS: Final = {
    BoardFlag.UNDER_VOLTAGE: status_pb2.BOARD_FLAG_UNDER_VOLTAGE,
    BoardFlag.FREQUENCY_CAPPED: status_pb2.BOARD_FLAG_FREQUENCY_CAPPED,
    BoardFlag.THROTTLED: status_pb2.BOARD_FLAG_THROTTLED,
    BoardFlag.SOFT_TEMPERATURE_LIMIT: status_pb2.BOARD_FLAG_SOFT_TEMPERATURE_LIMIT,
}
_RUNNING: Final = (SequenceState.PREFILLING, SequenceState.DECODING)


class StatusService(status_pb2_grpc.StatusServiceServicer):
    """hearth.v1.StatusService. Answers while the model loads, and waits for nothing."""

    def __init__(
        self,
        *,
        models: ModelPool,
        observation: Observation,
        model_name: str,
        warnings: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """model_name: of the default one.

        warnings: what somebody should look at, in lines that every caller may read.
        """
        self._warnings = warnings
        self._models = models
        self._observation = observation
        self._model_name = model_name
        self._started = time.monotonic()
        self._version = daemon_version()

    async def GetStatus(  # noqa: N802
        self,
        request: status_pb2.GetStatusRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> status_pb2.GetStatusResponse:
        """Describe the daemon."""
        return self.describe()

    def describe(self) -> status_pb2.GetStatusResponse:
        """Describe the daemon at this moment. Of the event loop; the metrics are made of it, too."""
        models, counts = self._models, self._models.counts
        num_running = models.num_running
        engines = [worker.engine for worker in models.workers if worker.engine]
        sequences = [sequence for worker in models.workers for sequence in worker.sequences]
        # Their tokens are counted as they come: who watches sees how fast.
        begun = [sequence for sequence in sequences if sequence.admitted is not None]
        return status_pb2.GetStatusResponse(
            state=_STATES[models.state],
            version=self._version,
            uptime_ms=round((time.monotonic() - self._started) * 1000),
            running_count=num_running,
            max_running=models.max_running,
            queued_count=models.num_chats - num_running,
            max_queued=models.max_queued,
            resident_bytes=_resident_bytes(),
            chats_finished_count=counts.finished,
            chats_cancelled_count=counts.cancelled,
            chats_refused_count=counts.refused,
            chats_failed_count=counts.failed,
            prompt_tokens_count=counts.prompt_tokens + sum(len(sequence.prompt_ids) for sequence in begun),
            cached_prompt_tokens_count=counts.cached_prompt_tokens + sum(sequence.num_cached for sequence in begun),
            cached_prompt_tokens_from_disk_count=counts.prompt_tokens_from_disk
            + sum(sequence.num_from_disk for sequence in begun),
            completion_tokens_count=counts.completion_tokens + sum(len(sequence.output_ids) for sequence in begun),
            drafted_tokens_count=counts.drafted_tokens + sum(sequence.num_drafted for sequence in begun),
            accepted_tokens_count=counts.accepted_tokens + sum(sequence.num_accepted for sequence in begun),
            model=self._model_name,
            warnings=self._warnings(),
            interactive=_count(sequences, Priority.INTERACTIVE),
            normal=_count(sequences, Priority.NORMAL),
            background=_count(sequences, Priority.BACKGROUND),
            kv_bytes=sum(engine.kv_bytes[0] for engine in engines),
            max_kv_bytes=sum(engine.kv_bytes[1] for engine in engines),
            recent=self._recent(),
            board=self._board(),
            models=map(_model, models.entries),
            refused_calls_count={reason.value: num for reason, num in self._observation.tally.refused.items()},
        )

    def _recent(self) -> status_pb2.RecentAnswers:
        speeds = self._observation.tally.speeds()
        return status_pb2.RecentAnswers(
            answer_count=speeds.num_answers,
            median_time_to_first_token_ms=speeds.median_time_to_first_token * 1000,
            worst_time_to_first_token_ms=speeds.worst_time_to_first_token * 1000,
            median_decode_tokens_per_second=speeds.median_tokens_per_second,
        )

    def _board(self) -> status_pb2.BoardStatus:
        governor = self._observation.governor
        reading = governor.reading
        return status_pb2.BoardStatus(
            temperature_celsius=reading.celsius,
            has_flags=reading.flags is not None,
            flags=_flags(reading.flags or ()),
            flags_since_start=_flags(reading.flags_since_start),
            thermal_level=governor.throttle.level,
        )


def _count(sequences: Iterable[Sequence], priority: Priority) -> status_pb2.ChatCounts:
    states = [sequence.state for sequence in sequences if sequence.priority is priority]
    return status_pb2.ChatCounts(
        running_count=sum(state in _RUNNING for state in states),
        queued_count=sum(state in (SequenceState.NEW, SequenceState.WAITING) for state in states),
        paused_count=states.count(SequenceState.PAUSED),
    )


def _model(entry: Entry) -> status_pb2.ModelStatus:
    num_chats, num_slots = (entry.worker.num_chats, entry.worker.num_slots) if entry.worker else (0, 0)
    return status_pb2.ModelStatus(
        name=entry.name,
        is_loaded=entry.is_usable,
        running_count=min(num_chats, num_slots),
        queued_count=num_chats - min(num_chats, num_slots) + entry.num_waiting,
        load_count=entry.num_loads,
    )


def _flags(flags: Collection[BoardFlag]) -> list[status_pb2.BoardFlag]:
    return sorted(_FLAGS[flag] for flag in flags)


def _resident_bytes() -> int:
    # proc(5): the second number of statm is the resident pages.
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
