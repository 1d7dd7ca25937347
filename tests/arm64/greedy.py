"""Answer one fixed conversation greedily through the daemon's real engine, and print what happened as JSON.

    python greedy.py BUNDLE MAX_TOKENS LOGITS.npy [REFERENCE.json]

The logits, float32 (tokens, vocab_size), are those along the reference's answer, which is this program's own
output on another machine; without one, along the answer just made. Two answers that part at a near tie can be compared
token by token no further, but the same path can.

Runs on this machine and, under qemu, on the emulated boards: the same bundle, engine, tokenizer and graph. Knows
nothing of either; `compare` starts it and reads what it prints.
"""

import json
import sys
import time
from collections.abc import Sequence as Several
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hearthd.bundles.bundle import Bundle
from hearthd.drafts.run_costs import LENGTHS
from hearthd.generation.engine import Delta, Engine, Failed, Finished, Sequence, TokenLogprob
from hearthd.runtime.runner import OnnxRunner
from hearthd.sequences.sampling import SamplingParams
from hearthd.text.tokenizer import ChatTokenizer, Message

CONVERSATION = (
    Message("system", "You are Hearth, a friendly assistant in a small house. Answer in a few plain sentences."),
    Message("user", "Why does bread rise in the oven, and why does it smell so good?"),
)


PREFILL_CHUNK = 64


def follow(runner: OnnxRunner, prompt_ids: Several[int], answer_ids: Several[int]) -> NDArray[np.float32]:
    """Return the logits before each token of an answer, (tokens, vocab_size), whatever the model prefers."""
    past = len(runner.preset_tokens)
    if tuple(prompt_ids[:past]) == runner.preset_tokens:
        runner.load_preset(0)
    else:
        past = 0
    chunks = [list(prompt_ids[start : start + PREFILL_CHUNK]) for start in range(past, len(prompt_ids), PREFILL_CHUNK)]
    rows = []
    for index, chunk in enumerate([*chunks, *([token_id] for token_id in answer_ids[:-1])]):
        logits = runner.forward(np.array([chunk], np.int64), 0, np.array([past], np.int32))
        past += len(chunk)
        if index >= len(chunks) - 1:
            rows.append(logits[0].copy())
    return np.array(rows, np.float32)


def count_other_bits(runner: OnnxRunner, token_ids: Several[int]) -> int:
    """Count the KV values that differ between one run of all tokens and runs as short as the runner allows."""
    step = runner.min_run
    first = len(token_ids) - len(token_ids) // 2 // step * step

    def keys_and_values(runs: list[Several[int]]) -> NDArray[np.float32]:
        past = 0
        for run in runs:
            runner.forward(np.array([run], np.int64), 0, np.array([past], np.int32))
            past += len(run)
        return runner.read_slot(0, past)

    short = [token_ids[start : start + step] for start in range(first, len(token_ids), step)]
    whole = keys_and_values([token_ids])
    return int(np.sum(whole != keys_and_values([token_ids[:first], *short])))


def count_other_drafted(runner: OnnxRunner, token_ids: Several[int]) -> int:
    """Count the logits and KV values that differ between runs of drafts and as many steps.

    Of every length that is drafted, behind texts of several lengths, since kernels go through both in blocks.
    """
    if not runner.can_verify:
        return 0
    found = 0
    for past in range(1, len(token_ids) - max(LENGTHS), 13):
        runner.forward(np.array([token_ids[:past]], np.int64), 0, np.zeros(1, np.int32))
        drafted = np.array(token_ids[past : past + max(LENGTHS)], np.int64)
        steps = [
            runner.forward(drafted[None, at : at + 1], 0, np.array([past + at], np.int32))[0].copy()
            for at in range(len(drafted))
        ]
        written = runner.read_slot(0, past + len(drafted))[..., past:, :]
        for length in LENGTHS:
            found += int(np.sum(runner.verify(drafted[:length], 0, past) != np.array(steps[:length])))
            again = runner.read_slot(0, past + length)[..., past:, :]
            found += int(np.sum(again != written[..., :length, :]))
    return found


def main() -> None:
    """Print one JSON object, the fields of `compare.Answer`."""
    path, max_tokens, logits_path = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    started = time.monotonic()
    bundle = Bundle.open(path)
    runner = OnnxRunner.from_bundle(bundle, num_slots=1, context_length=512, num_threads=1)
    tokenizer = ChatTokenizer.from_bundle(bundle)
    engine = Engine(runner, tokenizer, prefill_chunk=PREFILL_CHUNK)
    load_seconds = time.monotonic() - started
    sequence = Sequence(
        request_id="greedy",
        prompt_ids=tuple(tokenizer.encode_chat(CONVERSATION)),
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, top_logprobs=2),
        cache_identity="",
        arrived=time.monotonic(),
    )
    engine.add(sequence)
    text, finished = "", None
    tokens: list[TokenLogprob] = []
    while engine.has_work:
        for _, event in engine.step():
            if isinstance(event, Delta):
                text += event.text
                tokens += event.token_logprobs
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Finished):
                finished = event
    if finished is None:
        raise RuntimeError("the engine has no work left and the answer has no end")
    result: dict[str, Any] = {
        "prompt_ids": sequence.prompt_ids,
        "token_ids": [token.token_id for token in tokens],
        # How far the chosen token led before the next likeliest, in nats: a difference of logits.
        "leads": [token.top[0].logprob - token.top[1].logprob for token in tokens],
        "text": text,
        "reason": finished.reason.value,
        "load_seconds": load_seconds,
        "prefill_seconds": finished.prefill_seconds,
        "decode_seconds": finished.decode_seconds,
        "completion_tokens": finished.completion_tokens,
        "num_other_bits": count_other_bits(runner, sequence.prompt_ids[:32]),
        "num_other_drafted": count_other_drafted(runner, [*sequence.prompt_ids, *sequence.output_ids]),
    }
    reference: dict[str, Any] = (
        json.loads(Path(sys.argv[4]).read_text(encoding="utf-8")) if len(sys.argv) > 4 else result
    )
    np.save(logits_path, follow(runner, reference["prompt_ids"], reference["token_ids"]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
