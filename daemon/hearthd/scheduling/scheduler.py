"""Who runs, who is paused, who waits, and who is next.

The most urgent requests run, as many as there are places. Among equally urgent ones, those that run go on, those that
have begun come next (paused ones, then those that gave up their memory), and then accounts take turns (`fair_queue`).
Nobody gives way to one that is no more urgent.

Knows no KV and runs nothing: it decides, `engine` does it and tells what came of it.
"""

from hearthd.priority import Priority
from hearthd.scheduling.fair_queue import ANSWER_TOKEN_COST, FairQueue
from hearthd.sequences.sequence import Sequence, SequenceState

__all__ = ["Scheduler"]


class Scheduler:
    """All sequences between their arrival and their end."""

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        """Sequences that may run at once."""
        self._queues = {priority: FairQueue() for priority in Priority}
        # Both in the order in which they have started.
        self._running: list[Sequence] = []
        self._paused: list[Sequence] = []
        # They had begun, and wait again; in the order in which they had.
        self._put_back: list[Sequence] = []

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Those that read their prompts, or write answers."""
        return tuple(self._running)

    @property
    def paused(self) -> tuple[Sequence, ...]:
        """Those that have begun and keep their KV, while more urgent ones run."""
        return tuple(self._paused)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Those that have no KV, in the order in which they will begin, or begin again."""
        return tuple(sequence for priority in Priority for sequence in self._in_queue(priority))

    @property
    def num_waiting(self) -> int:
        """Those that have no KV."""
        return len(self._put_back) + sum(queue.num_waiting for queue in self._queues.values())

    @property
    def urgency(self) -> Priority | None:
        """Of the most urgent of all; None if there is nobody."""
        return min((each.priority for each in [*self._running, *self._paused, *self.waiting]), default=None)

    @property
    def is_idle(self) -> bool:
        """Whether there is nobody at all."""
        return not self._running and not self._paused and not self.num_waiting

    @property
    def is_crowded(self) -> bool:
        """Whether more run than may, since there are fewer places than before."""
        return len(self._running) > self.num_places

    def in_line(self) -> list[Sequence]:
        """Return all that do not run, the next one first."""
        line: list[Sequence] = []
        for priority in Priority:
            line += (sequence for sequence in self._paused if sequence.priority is priority)
            line += self._in_queue(priority)
        return line

    def has_place_for(self, sequence: Sequence) -> bool:
        """Whether a sequence may run: a place is free, or a less urgent one has to make room."""
        return len(self._running) < self.num_places or self._least_urgent().priority > sequence.priority

    def next_to_pause(self) -> Sequence | None:
        """Return who makes room when somebody starts: nobody while a place is free."""
        return None if len(self._running) < self.num_places else self._least_urgent()

    def prompts(self) -> list[Sequence]:
        """Return whose prompts are read, in that order: the most urgent one's, of those the first's."""
        prompts = (sequence for sequence in self._running if sequence.state is SequenceState.PREFILLING)
        return sorted(prompts, key=lambda sequence: sequence.priority)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait."""
        sequence.state = SequenceState.WAITING
        self._queues[sequence.priority].arrive(sequence)

    def start(self, sequence: Sequence, num_prompt_tokens: int) -> None:
        """Note that a waiting sequence runs from now on; so many tokens of its prompt have to be read.

        Who begins again is charged for nothing twice: that it has to was not its doing.
        """
        sequence.state = SequenceState.PREFILLING
        if sequence in self._put_back:
            self._put_back.remove(sequence)
        else:
            self._queues[sequence.priority].start(sequence)
            self._queues[sequence.priority].charge(sequence, num_prompt_tokens)
        self._running.append(sequence)

    def who_gives_way(self, urgent: Sequence) -> list[Sequence]:
        """Return the less urgent ones that have KV: first the least urgent, of equals the one that began last."""
        others = [each for each in [*self._running, *self._paused][::-1] if each.priority > urgent.priority]
        return sorted(others, key=lambda each: (each.priority, each.admitted or 0.0), reverse=True)

    def put_back(self, sequence: Sequence) -> None:
        """Note that a sequence has no KV any more, and waits again."""
        for group in (self._running, self._paused):
            if sequence in group:
                group.remove(sequence)
        self._put_back.insert(0, sequence)
        self._put_back.sort(key=lambda each: each.admitted or 0.0)
        sequence.state = SequenceState.WAITING

    def note_written(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that so many tokens of an answer were computed."""
        self._queues[sequence.priority].charge(sequence, ANSWER_TOKEN_COST * num_tokens)

    def pause(self, sequence: Sequence) -> None:
        """Note that a sequence runs no more, and keeps what it has."""
        sequence.state = SequenceState.PAUSED
        self._running.remove(sequence)
        self._paused.append(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Note that a paused sequence goes on."""
        is_read = sequence.num_read == len(sequence.prompt_ids)
        sequence.state = SequenceState.DECODING if is_read else SequenceState.PREFILLING
        self._paused.remove(sequence)
        self._running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended. No effect on one that is not here."""
        if sequence.state in (SequenceState.NEW, SequenceState.ENDED):
            return
        sequence.state = SequenceState.ENDED
        self._queues[sequence.priority].depart(sequence)
        for group in (self._running, self._paused, self._put_back):
            if sequence in group:
                group.remove(sequence)

    def _in_queue(self, priority: Priority) -> list[Sequence]:
        put_back = [sequence for sequence in self._put_back if sequence.priority is priority]
        return [*put_back, *self._queues[priority].in_order()]

    def _least_urgent(self) -> Sequence:
        """Of those that run; of equals the one that has started last."""
        return max(reversed(self._running), key=lambda sequence: sequence.priority)
