"""hearth.v1.StatusService: what the daemon is doing now."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import grpc

from hearth.v1 import status_pb2, status_pb2_grpc
from hearthd.models.pool import ModelPool
from hearthd.version import daemon_version
from hearthd.worker import State

__all__ = ["StatusService"]

_STATES: Final = {
    State.LOADING: status_pb2.DAEMON_STATE_LOADING,
    State.SERVING: status_pb2.DAEMON_STATE_SERVING,
    State.DRAINING: status_pb2.DAEMON_STATE_DRAINING,
    State.ENDED: status_pb2.DAEMON_STATE_DRAINING,
}


class StatusService(status_pb2_grpc.StatusServiceServicer):
    """hearth.v1.StatusService. Answers while the model loads, and waits for nothing."""

    def __init__(self, models: ModelPool, *, model_name: str, warnings: Callable[[], Iterable[str]] = tuple) -> None:
        """model_name: of the default one.

        warnings: what somebody should look at, in lines that every caller may read.
        """
        self._warnings = warnings
        self._models = models
        self._model_name = model_name
        self._started = time.monotonic()
        self._version = daemon_version()

    async def GetStatus(  # noqa: N802
        self,
        request: status_pb2.GetStatusRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> status_pb2.GetStatusResponse:
        """Describe the daemon."""
        models, counts = self._models, self._models.counts
        num_running = models.num_running
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
            prompt_tokens_count=counts.prompt_tokens,
            cached_prompt_tokens_count=counts.cached_prompt_tokens,
            completion_tokens_count=counts.completion_tokens,
            model=self._model_name,
            warnings=self._warnings(),
        )


def _resident_bytes() -> int:
    # proc(5): the second number of statm is the resident pages.
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
