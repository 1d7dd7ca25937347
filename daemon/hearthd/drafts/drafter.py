"""How much of a guess is worth a run, for one sequence.

Every token of the answer, drafted or not, shows whether the guess for its place was right: so it costs nothing to know
how often guesses are, by how long a stretch of text repeated itself before. A draft is run where that many tokens
more are likely to be worth what the longer run costs. Should they not be, a balance of what drafts have cost and
brought bounds the loss.

Knows no model and no logits: right guesses make an answer faster, wrong ones slower, and none of them another one.
Called by `engine`.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from hearthd.drafts.repeats import SHORTEST, Repeats
from hearthd.drafts.run_costs import LENGTHS, RunCosts

__all__ = ["Drafter"]

# How often a guess is right before anything is known of a text, by tokens that agree.
_FIRST_SHARES: Final = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
# What a new observation counts, at least.
_RATE: Final = 0.08
# Observations that the first shares count for.
_FIRST_WEIGHT: Final = 4
# What a draft must promise over plain steps, since both are estimates.
_WORTH: Final = 1.05
# Steps: what drafts may have lost of each token at most, and what a lucky stretch puts by at most. No answer, however
# short, takes 3 % longer; what runs cost is known to half a percent of a step.
_LOSS_PER_TOKEN: Final = 0.025
_MOST_PUT_BY: Final = 2.0


class Drafter:
    """Guesses one sequence's next tokens."""

    def __init__(self, prompt_ids: Iterable[int], costs: RunCosts) -> None:
        """costs: of the runner that will run what is drafted."""
        self._repeats = Repeats(prompt_ids)
        self._costs = costs
        self._num_prompt = len(self._repeats)
        self._shares = list(_FIRST_SHARES)
        self._num_seen = [0] * len(_FIRST_SHARES)
        self._balance = 0.0

    def draft(self, output_ids: Sequence[int], most: int) -> list[int]:
        """Return what may follow the answer so far, `most` tokens at most; nothing if a plain step is better."""
        self._read(output_ids)
        length = self._choose(min(most, LENGTHS[-1] - 1)) if self._costs.is_step_known else 0
        return self._repeats.following(length)

    def note_taken(self, num_drafted: int, num_taken: int) -> None:
        """Note how many tokens the run of a draft gave, the step's own one among them."""
        gained = num_taken - self._costs.in_steps(num_drafted + 1)
        self._balance = min(self._balance + gained, _MOST_PUT_BY)

    def _read(self, output_ids: Sequence[int]) -> None:
        """Take the tokens that are new, and see for each whether it was guessed right."""
        for token_id in output_ids[len(self._repeats) - self._num_prompt :]:
            if (length := self._repeats.length) != 0:
                self._learn(length, is_right=token_id == self._repeats.next_id)
            self._repeats.append(token_id)
            self._balance = min(self._balance + _LOSS_PER_TOKEN, _MOST_PUT_BY)

    def _learn(self, length: int, *, is_right: bool) -> None:
        row = min(length - SHORTEST, len(self._shares) - 1)
        self._num_seen[row] += 1
        rate = max(1 / (_FIRST_WEIGHT + self._num_seen[row]), _RATE)
        self._shares[row] += rate * (is_right - self._shares[row])

    def _choose(self, most: int) -> int:
        """Return the number of guessed tokens whose run promises most tokens for its cost."""
        if not self._repeats.length:
            return 0
        best, best_speed = 0, _WORTH
        expected = share = 1.0
        row = self._repeats.length - SHORTEST
        num_guessed = 0
        for length in LENGTHS:
            if length - 1 > most:
                break
            while num_guessed < length - 1:
                share *= self._shares[min(row + num_guessed, len(self._shares) - 1)]
                expected += share
                num_guessed += 1
            cost = self._costs.in_steps(length)
            # The worst that can come of it is the step's own token.
            if expected / cost > best_speed and self._balance >= cost - 1:
                best, best_speed = length - 1, expected / cost
        return best
