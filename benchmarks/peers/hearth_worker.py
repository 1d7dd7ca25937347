"""Hearth's own engine in the comparison: the runner that the daemon uses, with the engine's way of cutting prompts.

Options: `bundle` (a directory), `chunk` (tokens of a prompt that one run takes; the engine's own is 256 where nobody
decodes). Run by `contest.py` in the product's environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from worker import TokenIds, serve

from hearthd.bench import measure
from hearthd.bundles.bundle import Bundle
from hearthd.runtime.runner import OnnxRunner
from hearthd.version import daemon_version


class Hearth:
    """One OnnxRunner; sequence n in slot n."""

    def load(self, threads: int, streams: int, context: int, options: dict[str, Any]) -> None:
        """Open the bundle, its hashes checked, as the daemon does at its start."""
        bundle = Bundle.open(Path(options["bundle"]))
        self._runner = OnnxRunner.from_bundle(bundle, num_slots=streams, context_length=context, num_threads=threads)
        self._chunk = int(options["chunk"])
        self._quantization = bundle.manifest.quantization
        self._lengths = np.zeros(streams, np.int32)

    def about(self) -> dict[str, Any]:
        """Versions and settings."""
        return {
            "version": f"hearthd {daemon_version()}, onnxruntime {onnxruntime.__version__}",
            "settings": f"{self._quantization}, prompts in chunks of {self._chunk}",
        }

    def prepare(self, streams: int, length: int) -> int:
        """Forget the ends of the sequences: what stands beyond a length is not read."""
        kept = min(length, *(int(value) for value in self._lengths[:streams]))
        self._lengths[:streams] = kept
        return kept

    def prefill(self, stream: int, token_ids: TokenIds) -> int:
        """Run a prompt in chunks, cut as the engine does."""
        past = int(self._lengths[stream])
        for start, end in measure.chunks(len(token_ids), self._chunk, self._runner.min_run):
            logits = self._runner.forward(token_ids[None, start:end], stream, np.asarray([past + start], np.int32))
        self._lengths[stream] = past + len(token_ids)
        return int(logits[0].argmax())

    def prefill_all(self, token_ids: TokenIds) -> None:
        """One by one."""

    def decode(self, token_ids: list[int]) -> list[int]:
        """One token of each sequence, in one batch."""
        streams = len(token_ids)
        logits = self._runner.forward(np.asarray(token_ids, np.int64)[:, None], 0, self._lengths[:streams])
        self._lengths[:streams] += 1
        return [int(token) for token in logits.argmax(axis=1)]


if __name__ == "__main__":
    serve(Hearth())
