"""Answer one fixed conversation greedily through the daemon's real engine, and print what happened as JSON.

    python greedy.py BUNDLE MAX_TOKENS

Runs on this machine and, under qemu, on the emulated boards: the same bundle, engine, tokenizer and graph. Knows
nothing of either; `compare` starts it and reads what it prints.
"""

import json
import sys
import time
from pathlib import Path

from hearthd.bundle import Bundle
from hearthd.engine import Delta, Engine, Failed, Finished, Sequence, TokenLogprob
from hearthd.runner import OnnxRunner
from hearthd.sampling import SamplingParams
from hearthd.tokenizer import ChatTokenizer, Message

CONVERSATION = (
    Message("system", "You are Hearth, a friendly assistant in a small house. Answer in a few plain sentences."),
    Message("user", "Why does bread rise in the oven, and why does it smell so good?"),
)


def main() -> None:
    """Print one JSON object: token_ids, text, gaps, prefill_seconds, decode_seconds."""
    path, max_tokens = Path(sys.argv[1]), int(sys.argv[2])
    started = time.monotonic()
    bundle = Bundle.open(path)
    runner = OnnxRunner.from_bundle(bundle, num_slots=1, context_length=512, num_threads=1)
    tokenizer = ChatTokenizer.from_bundle(bundle)
    engine = Engine(runner, tokenizer, prefill_chunk=64)
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
    result = {
        "prompt_ids": sequence.prompt_ids,
        "token_ids": [token.token_id for token in tokens],
        # How far the chosen token led before the next likeliest, in nats: a difference of logits.
        "gaps": [token.top[0].logprob - token.top[1].logprob for token in tokens],
        "logprobs": [token.logprob for token in tokens],
        "text": text,
        "reason": finished.reason.value,
        "load_seconds": load_seconds,
        "prefill_seconds": finished.prefill_seconds,
        "decode_seconds": finished.decode_seconds,
        "completion_tokens": finished.completion_tokens,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
