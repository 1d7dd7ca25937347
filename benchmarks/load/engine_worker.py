"""The engine alone, in a process of its own: the same requests without gRPC, threads and events.

One JSON object a line, over pipes, as `../peers/engine_process.py` speaks:

    call   with                                          answers
    load   model (a directory), config (hearthd's file)  {}
    run    requests: [{content, max_tokens}, ...]        tokens (of all answers), seconds (until the last one's end)
    quit

Run by the scenario `throughput`; the only part of the load generator that imports the engine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from hearthd.bundles.bundle import Bundle
from hearthd.configuration.config import load_config
from hearthd.inference.model import Model, load_model, prove
from hearthd.models import heap
from hearthd.sequences.events import Failed, Finished
from hearthd.sequences.sampling import SamplingParams
from hearthd.sequences.sequence import Sequence
from hearthd.text.chat_template import Message


def run(model: Model, requests: list[dict[str, Any]]) -> dict[str, float]:
    """Answer all requests in one batch, as the daemon's inference thread does."""
    prompts = [model.tokenizer.encode_chat([Message("user", each["content"])]) for each in requests]
    started = time.monotonic()
    for number, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        sequence = Sequence(
            request_id=f"engine-{number}",
            prompt_ids=tuple(prompt),
            params=SamplingParams(max_tokens=request["max_tokens"], temperature=0.0),
            cache_identity=f"caller-{number}",
            arrived=started,
            account=f"caller-{number}",
        )
        model.engine.add(sequence)
    left, tokens = len(requests), 0
    while left:
        for _, event in model.engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                left -= 1
                tokens += event.completion_tokens
    seconds = time.monotonic() - started
    # What the daemon does while nobody asks, untimed there too.
    while model.engine.has_work:
        model.engine.step()
    return {"tokens": tokens, "seconds": seconds}


def main() -> None:
    """Answer until `quit` or the pipe's end."""
    # Libraries write to standard output as they like: the protocol gets a descriptor of its own, they get stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model: Model | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["call"] == "quit":
            break
        try:
            answer: dict[str, Any] = {}
            if request["call"] == "load":
                model = load_model(Bundle.open(Path(request["model"])), load_config(Path(request["config"])))
                heap.keep()
                prove(model)
            else:
                assert model is not None, "nothing is loaded"
                answer = run(model, request["requests"])
        except Exception as error:  # noqa: BLE001 - whatever it is, the report says it
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    # Not by way of the interpreter's end: threads of ONNX Runtime may still run.
    os._exit(0)


if __name__ == "__main__":
    main()
