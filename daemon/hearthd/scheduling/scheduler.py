"""Who waits, who reads its prompt, and who is next.

Knows no KV and runs nothing: it decides, `engine` does it and tells what came of it.
"""

from collections import deque

from hearthd.sequence import Sequence, SequenceState

__all__ = ["Scheduler"]


class Scheduler:
    """The sequences between their arrival and their first token, in the order in which they are served."""

    def __init__(self) -> None:
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Those that have no slot, in the order in which they will get one."""
        return tuple(self._waiting)

    @property
    def prefilling(self) -> tuple[Sequence, ...]:
        """Those that have a slot and whose prompt is not read to its end, the next one first."""
        return tuple(self._prefilling)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait."""
        sequence.state = SequenceState.WAITING
        self._waiting.append(sequence)

    def start(self, sequence: Sequence) -> None:
        """Note that a waiting sequence has got a slot."""
        self._waiting.remove(sequence)
        sequence.state = SequenceState.PREFILLING
        self._prefilling.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence: it has ended, or its prompt is read."""
        for queue in (self._waiting, self._prefilling):
            if sequence in queue:
                queue.remove(sequence)
