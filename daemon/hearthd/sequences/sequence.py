"""One request's state, from its arrival to its end.

Made by `services`, owned by `engine` from `Engine.add` on. Knows no engine and no model.
"""

import enum
from dataclasses import dataclass, field

from hearthd.drafts.drafter import Drafter
from hearthd.policy.screening import Screen
from hearthd.priority import Priority
from hearthd.sequences.answer import Answer
from hearthd.sequences.events import Finished, FinishReason
from hearthd.sequences.sampling import Sampler, SamplingParams

__all__ = ["Sequence", "SequenceState"]


class SequenceState(enum.Enum):
    """Where a sequence is."""

    NEW = "new"
    WAITING = "waiting"
    """For a place, or for room for its KV."""
    PREFILLING = "prefilling"
    DECODING = "decoding"
    PAUSED = "paused"
    """Holds its slot, while more urgent ones run."""
    ENDED = "ended"


# No repr: a prompt must not reach the journal with some message.
@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class Sequence:
    """One request. Compared by identity. Times are seconds by the engine's monotonic clock."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    """Have passed `sampling.validate`."""
    num_first: int = 0
    """Of the prompt's tokens, those up to the end of the system message: what other conversations may begin with."""
    cache_identity: str
    """KV is reused only between sequences of equal identity."""
    audience: str = ""
    """Its caller's role: what the owner shares with that can be reused as well."""
    arrived: float
    priority: Priority = Priority.NORMAL
    account: str = ""
    """Whose turn it is, and who is charged. The start-up proof is nobody's."""
    deadline: float | None = None
    """When it passes, the answer ends with TIME_LIMIT."""
    screen: Screen | None = None
    """What the owner's policy does to the answer."""

    # The engine's from here on.
    state: SequenceState = field(init=False, default=SequenceState.NEW)
    queue_position: int | None = field(init=False, default=None)
    """The last one that was announced."""
    slot: int = field(init=False)
    """Of a sequence that prefills, decodes or is paused."""
    sampler: Sampler = field(init=False)
    answer: Answer = field(init=False)
    output_ids: list[int] = field(init=False, default_factory=list)
    num_lost: int = field(init=False, default=0)
    """Tokens of the answer that are to be run again, since their KV went to a more urgent one; without the last one,
    which has not been run yet."""
    num_read: int = field(init=False, default=0)
    """Prompt tokens that need not be run any more; while it waits, as far as the cache held them when it came."""
    has_spoken: bool = field(init=False, default=False)
    """Whether words of its answer were sent."""
    was_stopped: bool = field(init=False, default=False)
    """A long run of its prompt was stopped for a more urgent request. The others are short."""
    was_put_back: bool = field(init=False, default=False)
    """Its KV went to a more urgent request."""
    num_cached: int = field(init=False, default=0)
    """Prompt tokens whose KV came from an earlier sequence, when it began for the first time."""
    num_from_disk: int = field(init=False, default=0)
    """Those of them that were not in memory."""
    drafter: Drafter | None = field(init=False, default=None)
    """Guesses what comes next; made when the sequence first decodes alone."""
    num_drafted: int = field(init=False, default=0)
    """Tokens of the answer that were guessed and run."""
    num_accepted: int = field(init=False, default=0)
    """Those of them behind which the answer went on."""
    admitted: float | None = field(init=False, default=None)
    prefilled: float | None = field(init=False, default=None)
    first_token: float | None = field(init=False, default=None)
    last_token: float | None = field(init=False, default=None)
    longest_gap: float = field(init=False, default=0.0)
    """Between two tokens, without pauses; seconds."""
    paused: float | None = field(init=False, default=None)
    """Since when it is."""
    paused_prefill_seconds: float = field(init=False, default=0.0)
    paused_decode_seconds: float = field(init=False, default=0.0)
    """All pauses that are over, by what they have interrupted."""
    paused_between_tokens: float = field(init=False, default=0.0)
    """Of the latter, those before the last token."""

    def note_token(self, token_id: int, now: float) -> None:
        """Note the answer's next token."""
        self.output_ids.append(token_id)
        if self.last_token is not None:
            paused = self.paused_decode_seconds - self.paused_between_tokens
            self.longest_gap = max(self.longest_gap, now - self.last_token - paused)
        self.last_token = now
        self.paused_between_tokens = self.paused_decode_seconds
        if self.first_token is None:
            self.first_token = now

    @property
    def next_id(self) -> int:
        """The token of the answer that is run next."""
        return self.output_ids[-1 - self.num_lost]

    @property
    def is_behind(self) -> bool:
        """Whether KV of what it has written is missing."""
        return bool(self.output_ids) and (self.num_lost > 0 or self.num_read < len(self.prompt_ids))

    def lose_kv(self, num_found: int, now: float) -> None:
        """Note that its KV is gone. For its caller that is a pause, until all is there again that was there.

        num_found: of the prompt's tokens, those that are cached now; fewer than all.
        """
        self.was_put_back = True
        self.num_read = num_found
        self.num_lost = max(len(self.output_ids) - 1, 0)
        self.pause(now)

    def note_run_again(self, now: float) -> None:
        """Note that the next of the lost tokens was run."""
        self.num_lost -= 1
        self.resume(now)

    def pause(self, now: float) -> None:
        """Begin a pause, if it is in none."""
        if self.paused is None:
            self.paused = now

    def resume(self, now: float) -> None:
        """End the pause, if it is in one, and has all that it had when that began."""
        if not self.is_behind:
            self._end_pause(now)

    def _end_pause(self, now: float) -> None:
        if self.paused is None:
            return
        if self.prefilled is None:
            self.paused_prefill_seconds += now - self.paused
        else:
            self.paused_decode_seconds += now - self.paused
        self.paused = None

    def finished(self, reason: FinishReason, now: float) -> Finished:
        """Sum up. A phase that was not completed has lasted until now, one that was not begun took no time.

        Pauses are counted by themselves, and belong to neither phase.
        """
        self._end_pause(now)
        prefill_seconds = 0.0
        if self.admitted is not None:
            end = now if self.prefilled is None else self.prefilled
            prefill_seconds = end - self.admitted - self.paused_prefill_seconds
        time_to_first_token = decode_seconds = 0.0
        if self.first_token is not None and self.last_token is not None:
            time_to_first_token = self.first_token - self.arrived
            decode_seconds = self.last_token - self.first_token - self.paused_between_tokens
        return Finished(
            reason=reason,
            prompt_tokens=len(self.prompt_ids),
            cached_prompt_tokens=self.num_cached,
            completion_tokens=len(self.output_ids),
            drafted_tokens=self.num_drafted,
            accepted_tokens=self.num_accepted,
            queue_seconds=(now if self.admitted is None else self.admitted) - self.arrived,
            prefill_seconds=prefill_seconds,
            time_to_first_token_seconds=time_to_first_token,
            decode_seconds=decode_seconds,
            paused_seconds=self.paused_prefill_seconds + self.paused_decode_seconds,
            longest_gap_seconds=self.longest_gap,
        )
