"""One answer as it grows: tokens in, deltas out.

Decodes, keeps stop strings out, does to the text what the owner's policy says, and lets every token's log probability
travel with the text that the token completes. Knows no engine and no clock. Called by `engine`.
"""

from collections import deque
from dataclasses import dataclass

from hearthd.policy.screening import Screen
from hearthd.sequences.events import Delta, FinishReason, TokenLogprob
from hearthd.sequences.stop import StopMatcher
from hearthd.text.decoding import IncrementalDecoder

__all__ = ["Answer"]


@dataclass(slots=True)
class _Waiting:
    """A log probability whose token's text is not all out: characters [start, end) of the decoded text."""

    logprob: TokenLogprob
    start: int
    end: int | None
    """None while the last character is not complete."""


class Answer:
    """The text of one answer. `push` each token but the one that ends the turn; `end` at the end, however it came.

    Both raise PolicyRefusedError if the screen refuses the text.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: tuple[str, ...], screen: Screen | None = None) -> None:
        """screen: not together with log probabilities, which would tell what it keeps out."""
        self._decoder = decoder
        self._screen = screen
        self._matcher = StopMatcher(stop)
        self._waiting: deque[_Waiting] = deque()
        self._num_decoded = 0
        self._num_out = 0

    @property
    def stopped_by(self) -> FinishReason | None:
        """What has ended the text before the model did: a stop string, the policy, or nothing."""
        if self._screen is not None and self._screen.is_stopped:
            return FinishReason.POLICY
        return FinishReason.STOP_STRING if self._matcher.is_matched else None

    def push(self, token_id: int, logprob: TokenLogprob | None) -> Delta | None:
        """Take the next token; return what can be sent now, None if nothing can."""
        start = self._num_decoded
        text = self._decoder.push(token_id)
        self._num_decoded += len(text)
        if not self._decoder.is_holding:
            self._complete(self._num_decoded)
        elif text:  # the first new character is the one that was not complete; a later one is not
            self._complete(start + 1)
        if logprob is not None:
            end = None if self._decoder.is_holding else self._num_decoded
            self._waiting.append(_Waiting(logprob, start, end))
        # After the stop strings: whatever they cut off, the policy has the last word on what goes out.
        return self._delta(self._screened(self._matcher.push(text)))

    def end(self) -> Delta | None:
        """Take the end of the answer; return what was held back. Of the model's text nothing follows a stop string."""
        text = "" if (was_stopped := self._matcher.is_matched) else self._rest()
        if self._screen is not None:
            return self._delta(self._screen.push(text) + self._screen.flush())
        return None if was_stopped else self._delta(text)

    def _rest(self) -> str:
        text = self._decoder.flush()
        self._num_decoded += len(text)
        self._complete(self._num_decoded)
        return self._matcher.push(text) + self._matcher.flush()

    def _screened(self, text: str) -> str:
        return text if self._screen is None else self._screen.push(text)

    def _complete(self, end: int) -> None:
        for waiting in reversed(self._waiting):
            if waiting.end is not None:
                return
            waiting.end = end

    def _delta(self, text: str) -> Delta | None:
        self._num_out += len(text)
        logprobs: list[TokenLogprob] = []
        while self._waiting and self._is_due(self._waiting[0]):
            logprobs.append(self._waiting.popleft().logprob)
        return Delta(text, tuple(logprobs)) if text or logprobs else None

    def _is_due(self, waiting: _Waiting) -> bool:
        if waiting.end is not None and waiting.end <= self._num_out:
            return True
        # The stop string cut this token's text in two, or all of it off.
        return self.stopped_by is not None and waiting.start < self._num_out
