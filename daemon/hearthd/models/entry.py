"""One configured model: whether it is loaded, who uses it and who waits for it. Owned by `pool`, on the event loop."""

import asyncio
import enum
from dataclasses import dataclass

from hearthd.inference.worker import Worker
from hearthd.models.facts import ModelFacts

__all__ = ["Entry", "Failure", "ModelState"]


class ModelState(enum.Enum):
    """Where a model is."""

    LOADABLE = "loadable"
    """Not in memory. A request that names it loads it."""
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"
    """Could not be loaded the last time; a later request tries again."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model could not be loaded. text: for callers, a whole sentence. retry_at: when to try again, monotonic."""

    text: str
    retry_at: float


class Entry:
    """The books of one model."""

    def __init__(self, name: str, *, keep: bool, idle_seconds: float) -> None:
        """keep: it is never unloaded. idle_seconds: unused for so long, it is; 0: only to make room."""
        self.name = name
        self.keep = keep
        self.idle_seconds = idle_seconds
        self.facts: ModelFacts | None = None
        """None if its bundle could not be read so far."""
        self.worker: Worker | None = None
        """Its inference thread, once it is loaded and proven, until it has ended."""
        self.num_users = 0
        self.num_waiting = 0
        """Who wait until it is loaded."""
        self.is_expected = False
        """Somebody could not wait for it, and may come again: it is loaded if nobody has to leave for it."""
        self.last_used = 0.0
        self.load_seconds: float | None = None
        """What its fastest load so far took. The first one may have come from a cold disk."""
        self.loading_since: float | None = None
        """When the load that goes on has begun, monotonic."""
        self.num_loads = 0
        """Since the daemon's start."""
        self.failure: Failure | None = None
        self.is_leaving = False
        """Nobody new may use it: it goes when those who do have done."""
        self.must_go = False
        """It leaves in any case, not only as long as another one waits for its room."""
        self.is_removed = False
        """It is not configured any more."""
        self.bringing: asyncio.Task[None] | None = None
        self.parting: asyncio.Task[None] | None = None
        self.idle_timer: asyncio.TimerHandle | None = None

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory, or would, as far as that is known."""
        return self.facts.memory_bytes if self.facts else 0

    @property
    def is_kept(self) -> bool:
        """Whether it stays in memory, whoever needs the room."""
        return self.keep and not self.is_removed

    @property
    def is_usable(self) -> bool:
        """Whether a chat can be admitted."""
        return self.worker is not None and not self.is_leaving and self.worker.is_admitting

    @property
    def state(self) -> ModelState:
        """Where it is, for people."""
        if self.worker is not None:
            return ModelState.LOADED
        if self.bringing is not None:
            return ModelState.LOADING
        return ModelState.FAILED if self.failure else ModelState.LOADABLE

    def stop_idling(self) -> None:
        """Forget that it would be unloaded after a while."""
        if self.idle_timer is not None:
            self.idle_timer.cancel()
            self.idle_timer = None
