"""A runner's measurements fitted to a budget of time, and what earlier ones tell of how long later ones will take.

Called by `suite`.
"""

from __future__ import annotations

from hearthd.bench import measure
from hearthd.bench.turns import NotMeasurableError
from hearthd.kv.kv_cache import Runner

__all__ = ["MAX_STEPS", "MIN_STEPS", "FittedRuns"]

MAX_STEPS = 32
MIN_STEPS = 4


class FittedRuns:
    """Prefill and decode of one runner, as tokens/s.

    budget_seconds: that a measurement may take over `rounds` rounds and one that warms up. chunk: of a prompt, in one
    run.
    """

    def __init__(self, runner: Runner, *, chunk: int, rounds: int, budget_seconds: float) -> None:
        self._runner = runner
        self._chunk = chunk
        self._rounds = rounds
        self._budget = budget_seconds
        self._seconds_per_token = 0.0
        self._written = [0] * runner.num_slots
        self.num_steps: dict[tuple[int, int], int] = {}
        """Steps of each decode measurement so far, by streams and context."""

    def expected_prefill(self, num_tokens: int) -> float:
        """Seconds that a prompt takes, by the longest one so far; 0 before the first."""
        return num_tokens * self._seconds_per_token

    def prefill(self, num_tokens: int) -> float:
        """Run a prompt; returns tokens/s. Raises NotMeasurableError if it does not fit the context."""
        if num_tokens > self._runner.context_length:
            raise NotMeasurableError(f"the context has {self._runner.context_length} positions")
        seconds = measure.prefill(self._runner, num_tokens, chunk=self._chunk)
        if num_tokens >= self._written[0]:
            self._written[0] = num_tokens
            self._seconds_per_token = seconds / num_tokens
        return num_tokens / seconds

    def decode(self, num_streams: int, context: int) -> float:
        """Decode after `context` positions; returns tokens/s of all streams together.

        Raises NotMeasurableError if the context has no room, or a few steps or the way there would take too long.
        """
        key = num_streams, context
        if key not in self.num_steps:
            self._write_kv(num_streams, context)
            self.num_steps[key] = self._fit_steps(num_streams, context)
        num_steps = self.num_steps[key]
        return num_streams * num_steps / measure.decode(self._runner, num_streams, context, num_steps=num_steps)

    def _write_kv(self, num_streams: int, context: int) -> None:
        """Write the positions that decoding will read, where a prompt has not done so."""
        length = self._runner.context_length
        if length - context < MIN_STEPS:
            raise NotMeasurableError(f"the context has {length} positions")
        if min(self._written[:num_streams]) >= context:
            return
        expected = self.expected_prefill(context)
        if expected > self._budget:
            raise NotMeasurableError(
                f"the prompt before it would take {expected:.3g} s, more than the budget of {self._budget:g} s"
            )
        measure.fill(self._runner, context, num_slots=num_streams, chunk=self._chunk)
        self._written[:num_streams] = [max(written, context) for written in self._written[:num_streams]]

    def _fit_steps(self, num_streams: int, context: int) -> int:
        # The first run of a shape binds its buffers, so the second is timed.
        measure.decode(self._runner, num_streams, context, num_steps=1)
        seconds = measure.decode(self._runner, num_streams, context, num_steps=1)
        if MIN_STEPS * seconds > self._budget:
            raise NotMeasurableError(
                f"{MIN_STEPS} steps would take {MIN_STEPS * seconds:.3g} s, more than the budget of {self._budget:g} s"
            )
        affordable = int(self._budget / (self._rounds + 1) / seconds)
        return min(max(affordable, MIN_STEPS), MAX_STEPS, self._runner.context_length - context)
