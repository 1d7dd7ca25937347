"""A daemon of its own process for the load generator: `python loaded_daemon.py FILE`, configured by a hearthd.toml.

Everything is real but the model, a `FakeRunner` that writes letters and never ends an answer by itself.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fakes import hashed_logits
from hearthd.__main__ import run_server
from hearthd.configuration.config import load_config
from hearthd.logs import configure_logging
from serving import make_model, make_runner, make_tokenizer

if __name__ == "__main__":
    configure_logging("info")
    config = load_config(Path(sys.argv[1]))
    tokenizer = make_tokenizer()
    hashed = hashed_logits(tokenizer.vocab_size)
    is_letter = np.array([tokenizer.token_bytes(token).isalpha() for token in range(tokenizer.vocab_size)])

    def letters(history: Sequence[int]) -> NDArray[np.float32]:
        # What a token costs, so that a queue can fill.
        time.sleep(0.001)
        return np.where(is_letter, hashed(history), np.float32(-100))

    runner = make_runner(
        num_slots=config.engine.slots, context_length=config.engine.context_length, logits_after=letters
    )
    code = run_server(config, lambda *_: make_model(runner, prefill_chunk=64))
    sys.stderr.flush()
    os._exit(code)
