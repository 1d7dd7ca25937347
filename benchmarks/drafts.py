"""What drafts bring and cost: the same answers with and without them, step beside step, in one process.

    python benchmarks/drafts.py [--bundle DIRECTORY] [--rounds N] [--tokens N] [--threads N] [--only TASK ...]

First what runs of several tokens take, in steps. Then two engines share a runner, one a slot each, and take turns by
steps: whatever else the machine does meets both. Prints, for each task, how many of the drafted tokens were right, and
how much faster the answer came: by the clock, the median of the rounds, and by its runs, at what each takes and with
the time of drafting itself, which a busy machine does not blur. Exits with 1 if a draft changed an answer, or if drafts
cost more than 3 % of any answer, by its runs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence as Several
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hearthd.bundles.bundle import Bundle
from hearthd.drafts.run_costs import LENGTHS
from hearthd.generation.drafting import Drafting
from hearthd.generation.engine import Engine, Failed, Runner, Sequence
from hearthd.runtime.runner import OnnxRunner
from hearthd.sequences.sampling import SamplingParams
from hearthd.text.tokenizer import ChatTokenizer, Message

DEFAULT_BUNDLE = Path(__file__).resolve().parent.parent / ".cache/state/models/smollm2-135m"
MAX_COST = 1.03
Ids = NDArray[np.int64]
NOTE = (
    "The heating in the living room is controlled by a thermostat beside the door. It is set to 20 degrees from 6 in "
    "the morning until 10 at night, and to 16 degrees during the night. On weekends the day begins at 8. The radiator "
    "in the bathroom has a valve of its own, which is opened by the home controller ten minutes before somebody "
    "showers, as far as it knows. The boiler stands in the basement, is serviced every September by the company "
    "Lindner, telephone 0151 2345678, and was replaced in 2019. If the display shows E4, the pressure is too low: open "
    "the blue valve under the boiler until the needle stands at 1.5 bar, then close it again and press reset."
)
CODE = (
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\ndef variance(values):\n    average = mean(values)\n    total = 0\n"
    "    for value in values:\n"
    "        total += (value - average) ** 2\n    return total / len(values)\n"
)
# The last four have no text to go back to.
TASKS = (
    ("repeat", f"Repeat this text word for word:\n\n{NOTE}"),
    ("edit", f"Rewrite this text, and put 21 degrees instead of 20 degrees:\n\n{NOTE}"),
    ("summarise", f"Summarise this text in three sentences:\n\n{NOTE}"),
    ("answer from a text", f"Read this text and answer: what must I do if the display shows E4?\n\n{NOTE}"),
    ("document code", f"Add docstrings to this code:\n\n{CODE}"),
    ("story", "Tell me a story about a lighthouse keeper and his cat."),
    ("letter", "Write a long letter from a sailor to his daughter."),
    ("explain", "Explain how bread rises in the oven, and why it smells so good."),
    ("poem", "Write a poem about the sea."),
)


class OneSlot:
    """A `Runner` of which an engine sees one slot, so that two engines can share it."""

    num_slots = 1

    def __init__(self, runner: OnnxRunner, slot: int) -> None:
        self._runner = runner
        self._slot = slot
        self.lengths: list[int] = []
        """Of the runs that wrote the answer."""

    def __getattr__(self, name: str) -> Any:
        """Return what no slot belongs to."""
        return getattr(self._runner, name)

    def load_preset(self, slot: int) -> None:
        """As `Runner`; so are the others."""
        self._runner.load_preset(self._slot + slot)

    def give_back(self, slot: int, num_tokens: int) -> None:
        """As `Runner`."""
        self._runner.give_back(self._slot + slot, num_tokens)

    def forward(self, token_ids: Ids, first_slot: int, past_lengths: NDArray[np.int32]) -> NDArray[np.float32]:
        """As `Runner`."""
        if token_ids.shape[1] == 1:
            self.lengths.append(1)
        return self._runner.forward(token_ids, self._slot + first_slot, past_lengths)

    def verify(self, token_ids: Ids, slot: int, num_past: int) -> NDArray[np.float32]:
        """As `Runner`."""
        self.lengths.append(len(token_ids))
        return self._runner.verify(token_ids, self._slot + slot, num_past)


class TimedDrafting(Drafting):
    """Drafts, and the time that it takes to make them."""

    seconds = 0.0

    def draft(self, batch: Several[Sequence]) -> list[int]:
        """As `Drafting`."""
        started = time.perf_counter()
        draft = super().draft(batch)
        self.seconds += time.perf_counter() - started
        return draft


@dataclass
class Answering:
    """One engine's way through an answer."""

    engine: Engine
    runner: OneSlot
    drafting: TimedDrafting | None
    sequence: Sequence
    seconds: float = 0.0

    def step(self) -> None:
        """Take one step; only those that write are timed."""
        is_writing = bool(self.sequence.output_ids)
        started = time.perf_counter()
        events = self.engine.step()
        if is_writing:
            self.seconds += time.perf_counter() - started
        for _, event in events:
            if isinstance(event, Failed):
                raise event.error

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete."""
        return self.sequence.last_token is not None and not self.engine.num_running


def measure_costs(runner: OnnxRunner, num_past: int, rounds: int = 15) -> tuple[float, dict[int, float]]:
    """Return the seconds of a step behind num_past tokens, and what runs take, in steps: medians, taken in turns."""
    ids = np.arange(100, 100 + num_past + LENGTHS[-1])
    runner.forward(ids[None, :num_past], 0, np.zeros(1, np.int32))
    seconds: dict[int, list[float]] = {length: [] for length in (1, *LENGTHS)}
    for _ in range(rounds):
        for length, found in seconds.items():
            drafted = ids[num_past : num_past + length]
            started = time.perf_counter()
            if length == 1:
                runner.forward(drafted[None], 0, np.asarray([num_past], np.int32))
            else:
                runner.verify(drafted, 0, num_past)
            found.append(time.perf_counter() - started)
    step = statistics.median(seconds[1])
    ratios = {
        length: statistics.median(run / one for run, one in zip(found, seconds[1], strict=True))
        for length, found in seconds.items()
    }
    return step, ratios


def answer_twice(
    runner: OnnxRunner, tokenizer: ChatTokenizer, prompt_ids: Several[int], params: SamplingParams
) -> tuple[Answering, Answering]:
    """Answer without and with drafts, step beside step."""
    both = []
    for slot in range(2):
        drafting = TimedDrafting(context_length=runner.context_length) if slot else None
        own = OneSlot(runner, slot)
        engine = Engine(cast(Runner, own), tokenizer, drafting=drafting)
        sequence = Sequence(
            request_id="", prompt_ids=tuple(prompt_ids), params=params, cache_identity="", arrived=time.monotonic()
        )
        engine.add(sequence)
        both.append(Answering(engine, own, drafting, sequence))
    while not all(each.is_over for each in both):
        for each in both:
            if not each.is_over:
                each.step()
    return both[0], both[1]


def main() -> int:
    """Print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description="Measure what drafts bring and cost.")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=[name for name, _ in TASKS], help="tasks, if not all")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    tokenizer = ChatTokenizer.from_bundle(bundle)
    runner = OnnxRunner.from_bundle(bundle, num_slots=2, context_length=2048, num_threads=arguments.threads)
    if not runner.can_verify:
        sys.exit(f"{arguments.bundle} was built by an older hearthd; build it again")
    step, costs = measure_costs(runner, num_past=200)
    print("in steps: " + ", ".join(f"{length} tokens {cost:.2f}" for length, cost in costs.items()))
    print(f"{'task':<20}{'sampling':<10}{'tokens':>7}{'drafted':>9}{'right':>7}{'by the clock':>14}{'by runs':>9}")
    by_runs, is_same = [], True
    for name, text in TASKS:
        if arguments.only and name not in arguments.only:
            continue
        prompt_ids = tokenizer.encode_chat([Message("user", text)])
        for sampling, temperature, top_p in (("greedy", 0.0, 1.0), ("0.7", 0.7, 0.9)):
            params = SamplingParams(max_tokens=arguments.tokens, seed=1, temperature=temperature, top_p=top_p)
            ratios, steps = [], []
            for _ in range(arguments.rounds):
                without, drafted = answer_twice(runner, tokenizer, prompt_ids, params)
                assert drafted.drafting is not None
                is_same &= without.sequence.output_ids == drafted.sequence.output_ids
                ratios.append(without.seconds / drafted.seconds)
                steps.append(sum(costs[length] for length in drafted.runner.lengths) + drafted.drafting.seconds / step)
            sequence = drafted.sequence
            by_runs.append((len(sequence.output_ids) - 1) / statistics.median(steps))
            print(
                f"{name:<20}{sampling:<10}{len(sequence.output_ids):>7}{sequence.num_drafted:>9}"
                f"{sequence.num_accepted:>7}{statistics.median(ratios):>14.2f}{by_runs[-1]:>9.3f}",
                flush=True,
            )
    cost = 1 / min(by_runs)
    print(f"At worst an answer took {cost:.3f} of its time without drafts, by its runs; at most {MAX_COST}.")
    print("All answers are the same with and without." if is_same else "AN ANSWER IS ANOTHER ONE WITH DRAFTS.")
    return 0 if is_same and cost <= MAX_COST else 1


if __name__ == "__main__":
    sys.exit(main())
