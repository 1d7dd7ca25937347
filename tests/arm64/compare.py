"""Compare a greedy answer of the default bundle on this machine with the same on an emulated Pi 4 and Pi 5.

    python compare.py [--bundle DIRECTORY] [--tokens N]

Prints a table, and exits with 1 if a board cannot answer, or says something else without a reason. Integer products are
exact on every processor; the floating-point operations between them round differently, so two nearly equal logits may
change places. Such a difference is explained by its figures: the lead of the chosen token was smaller than the noise
that is allowed. Started by `make arm64`.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import rig

SCRIPT = Path(__file__).resolve().parent / "greedy.py"
DEFAULT_BUNDLE = rig.ROOT / ".cache/state/models/smollm2-135m"
# In nats. A different kernel that computes the same differs by rounding alone, which an activation's step to the next
# int8 value can enlarge; a wrong one differs by whole nats.
MAX_NOISE = 0.25


@dataclass(frozen=True, slots=True)
class Answer:
    """What greedy.py prints. One number a token in `gaps` (lead over the next likeliest, nats) and `logprobs`."""

    prompt_ids: list[int]
    token_ids: list[int]
    gaps: list[float]
    logprobs: list[float]
    text: str
    reason: str
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float
    completion_tokens: int

    @property
    def decode_step_seconds(self) -> float:
        """The mean; the first token comes from the prefill."""
        return self.decode_seconds / max(1, self.completion_tokens - 1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How an answer differs from the reference's."""

    num_same_tokens: int
    """Tokens before the first difference; all of them if there is none."""
    noise: float
    """The largest difference of a log-probability over these tokens, nats."""
    finding: str
    is_accepted: bool


def compare(reference: Answer, other: Answer) -> Comparison:
    """Return whether `other` says what `reference` says, or why not."""
    if reference.prompt_ids != other.prompt_ids:
        return Comparison(0, 0.0, "the prompt became other token ids", is_accepted=False)
    pairs = list(zip(reference.token_ids, other.token_ids, strict=False))
    same = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
    differences = (abs(a - b) for a, b in zip(reference.logprobs[:same], other.logprobs[:same], strict=True))
    noise = max(differences, default=0.0)
    if noise > MAX_NOISE:
        return Comparison(same, noise, f"noise beyond {MAX_NOISE}", is_accepted=False)
    if reference.token_ids == other.token_ids:
        accepted = reference.text == other.text and reference.reason == other.reason
        return Comparison(same, noise, "same" if accepted else "same tokens, other text or end", is_accepted=accepted)
    if same == len(pairs):
        return Comparison(same, noise, "one ends where the other goes on", is_accepted=False)
    ours, theirs = pairs[same]
    leads = reference.gaps[same], other.gaps[same]
    finding = f"token {same} is {theirs}, here {ours}; leads {leads[1]:.4f} and {leads[0]:.4f}"
    return Comparison(same, noise, finding, is_accepted=max(leads) <= MAX_NOISE)


def table(rows: list[tuple[str, Answer, Comparison | None]]) -> str:
    """Return what was found, one line a processor."""
    lines = [f"{'processor':<20}{'load s':>8}{'prefill s':>11}{'s/token':>9}{'same':>6}{'noise':>9}  finding"]
    for name, answer, found in rows:
        line = f"{name:<20}{answer.load_seconds:>8.2f}{answer.prefill_seconds:>11.3f}{answer.decode_step_seconds:>9.4f}"
        if found is None:
            line += f"{len(answer.token_ids):>6}{'':>9}  the reference"
        else:
            line += f"{found.num_same_tokens:>6}{found.noise:>9.4f}  {found.finding}"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare a greedy answer here and on emulated boards.")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    command = [str(SCRIPT), str(arguments.bundle.resolve()), str(arguments.tokens)]
    here = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True).stdout
    reference = Answer(**json.loads(here))
    print(f"{reference.text}\n")
    rows: list[tuple[str, Answer, Comparison | None]] = [("this machine", reference, None)]
    emulated = rig.prepare(rig.cache_directory())
    for board in (rig.RASPBERRY_PI_4, rig.RASPBERRY_PI_5):
        try:
            answer = Answer(**json.loads(emulated.run(board, SCRIPT, *command[1:])))
        except subprocess.CalledProcessError as error:
            sys.exit(f"{board.name}: no answer, exit code {error.returncode} (-4: an instruction that it has not)")
        rows.append((board.name, answer, compare(reference, answer)))
    print(table(rows))
    print("Emulated, one thread: seconds compare kernels with each other, and say nothing of a board's speed.")
    return 0 if all(found is None or found.is_accepted for _, _, found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
