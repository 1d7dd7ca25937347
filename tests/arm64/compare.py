"""Compare a greedy answer of the default bundle on this machine with the same on an emulated Pi 4 and Pi 5.

    python compare.py [--bundle DIRECTORY] [--tokens N]

Prints a table, and exits with 1 if a board cannot answer, or says something else without a reason. Integer products are
exact on every processor, but the floating-point operations between them round differently in the last bit. Where that
moves one activation to the next int8 value, all later roundings fall anew: the board's logits then differ by as much as
int8 differs from float32, and two nearly equal ones may change places. So a difference is explained by two figures: the
token that this machine chose was hardly ahead, and along the whole of this machine's answer the board's distributions
are as near to this machine's as the build demands of int8 to float32. Started by `make arm64`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rig
from numpy.typing import NDArray

SCRIPT = Path(__file__).resolve().parent / "greedy.py"
DEFAULT_BUNDLE = rig.ROOT / ".cache/state/models/smollm2-135m"
# Nats: the quality gate of the build. A wrong kernel is off by whole nats.
MAX_KL = 0.02
# Nats: some three times the noise of two logits at that divergence, sqrt(2 KL).
MAX_LEAD = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """What greedy.py prints. `leads`: for each token how far it was before the next likeliest, nats."""

    prompt_ids: list[int]
    token_ids: list[int]
    leads: list[float]
    text: str
    reason: str
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float
    completion_tokens: int
    num_other_bits: int
    """KV values that depend on where a text is cut into runs."""
    num_other_drafted: int = 0
    """Logits and KV values that are others in a run of drafts than in steps."""

    @property
    def decode_step_seconds(self) -> float:
        """The mean; the first token comes from the prefill."""
        return self.decode_seconds / max(1, self.completion_tokens - 1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How an answer differs from the reference's."""

    num_same_tokens: int
    """Tokens before the first difference; all of them if there is none."""
    kl_mean: float
    """Mean divergence of the board's distribution from the reference's along the reference's answer, nats."""
    finding: str
    is_accepted: bool


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log-probabilities, (tokens, vocab_size)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalised


def mean_kl(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the mean over tokens of KL(reference || other), of logits (tokens, vocab_size)."""
    ours = log_softmax(reference)
    return float((np.exp(ours) * (ours - log_softmax(other))).sum(axis=1).mean())


def compare(reference: Answer, other: Answer, kl_mean: float) -> Comparison:
    """Return whether `other` says what `reference` says, or why not."""
    pairs = list(zip(reference.token_ids, other.token_ids, strict=False))
    same = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
    if reference.prompt_ids != other.prompt_ids:
        finding, is_accepted = "the prompt became other token ids", False
    elif reference.token_ids == other.token_ids:
        is_accepted = reference.text == other.text and reference.reason == other.reason
        finding = "same" if is_accepted else "same tokens, other text or end"
    elif same == len(pairs):
        finding, is_accepted = "one ends where the other goes on", False
    else:
        lead = reference.leads[same]
        finding = f"token {same} is {pairs[same][1]}, here {pairs[same][0]} with a lead of {lead:.4f}"
        is_accepted = lead <= MAX_LEAD
    if other.num_other_bits:
        finding, is_accepted = f"{finding}; {other.num_other_bits} values of KV depend on how a text is cut", False
    if other.num_other_drafted:
        finding, is_accepted = f"{finding}; {other.num_other_drafted} values are others in a run of drafts", False
    if not kl_mean <= MAX_KL:
        finding, is_accepted = f"{finding}; KL over {MAX_KL}", False
    return Comparison(same, kl_mean, finding, is_accepted=is_accepted)


def table(rows: list[tuple[str, Answer, Comparison | None]]) -> str:
    """Return what was found, one line a processor."""
    lines = [f"{'processor':<20}{'load s':>8}{'prefill s':>11}{'s/token':>9}{'same':>6}{'mean KL':>10}  finding"]
    for name, answer, found in rows:
        line = f"{name:<20}{answer.load_seconds:>8.2f}{answer.prefill_seconds:>11.3f}{answer.decode_step_seconds:>9.4f}"
        if found is None:
            line += f"{len(answer.token_ids):>6}{'':>10}  the reference"
        else:
            line += f"{found.num_same_tokens:>6}{found.kl_mean:>10.5f}  {found.finding}"
        lines.append(line)
    return "\n".join(lines)


def run_all(bundle: Path, num_tokens: int, scratch: Path) -> list[tuple[str, Answer, Comparison | None]]:
    """Return this machine's answer, then the boards'. Exits if one cannot answer."""
    ours, theirs, reference_path = scratch / "here.npy", scratch / "board.npy", scratch / "here.json"
    command = [str(SCRIPT), str(bundle), str(num_tokens)]
    here = subprocess.run([sys.executable, *command, str(ours)], check=True, stdout=subprocess.PIPE, text=True).stdout
    reference_path.write_text(here, encoding="utf-8")
    reference = Answer(**json.loads(here))
    rows: list[tuple[str, Answer, Comparison | None]] = [("this machine", reference, None)]
    emulated = rig.prepare(rig.cache_directory())
    for board in (rig.RASPBERRY_PI_4, rig.RASPBERRY_PI_5):
        try:
            said = emulated.run(board, SCRIPT, *command[1:], str(theirs), str(reference_path))
        except subprocess.CalledProcessError as error:
            sys.exit(f"{board.name}: no answer, exit code {error.returncode} (-4: an instruction that it has not)")
        answer = Answer(**json.loads(said))
        rows.append((board.name, answer, compare(reference, answer, mean_kl(np.load(ours), np.load(theirs)))))
    return rows


def main() -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare a greedy answer here and on emulated boards.")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hearth-arm64-") as scratch:
        rows = run_all(arguments.bundle.resolve(), arguments.tokens, Path(scratch))
    print(f"{rows[0][1].text}\n")
    print(table(rows))
    print("Emulated, one thread: seconds compare kernels with each other, and say nothing of a board's speed.")
    return 0 if all(found is None or found.is_accepted for _, _, found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
