"""An engine with a fake model over a directory of stored prefixes: what a restart makes anew."""

import random
import threading
from pathlib import Path

import tiny_tokenizers as tiny
from fakes import FakeRunner, expected_tokens
from hearthd.generation.engine import Engine, Failed, Sequence
from hearthd.kv.budget import KVBudget
from hearthd.kv.disk_writes import DiskWrites
from hearthd.kv.prefix_file import CHUNK
from hearthd.kv.prefix_store import PrefixStore
from hearthd.kv.stored_prefixes import StoredPrefixes
from hearthd.sequences.sampling import SamplingParams

__all__ = ["SYSTEM", "Daemon", "asked", "chunks_of", "open_store"]

TOKENIZER = tiny.chat_tokenizer("byte_per_token")
SYSTEM = [(7 * at + at * at) % 250 for at in range(150)]
MB = 2**20


def open_store(
    directory: Path,
    *,
    max_bytes: int = MB,
    fingerprint: bytes = b"model",
    margin: int = 0,
    writes: DiskWrites | None = None,
) -> PrefixStore:
    return PrefixStore(directory, fingerprint, 8, max_bytes=max_bytes, margin_bytes=margin, writes=writes)


def chunks_of(num_tokens: int, seed: int = 0) -> list[bytes]:
    data = random.Random(seed).randbytes(num_tokens * 8)
    return [data[at : at + CHUNK * 8] for at in range(0, len(data), CHUNK * 8)]


def asked(prompt: list[int], num_first: int = 150, identity: str = "a") -> Sequence:
    params = SamplingParams(max_tokens=6, temperature=0.0)
    return Sequence(
        request_id="r", prompt_ids=tuple(prompt), params=params, cache_identity=identity, arrived=0.0,
        num_first=num_first,
    )  # fmt: skip


class Daemon:
    """An engine over a directory of prefixes; what a restart makes anew."""

    def __init__(
        self,
        directory: Path,
        *,
        min_tokens: int = 100,
        min_run: int = 2,
        num_slots: int = 3,
        writes: DiskWrites | None = None,
        kv_budget: KVBudget | None = None,
    ) -> None:
        self.runner = FakeRunner(num_slots=num_slots, min_run=min_run, kv_budget=kv_budget)
        self.prefixes = StoredPrefixes(open_store(directory, writes=writes), self.runner, min_tokens=min_tokens)
        self.engine = Engine(self.runner, TOKENIZER, prefill_chunk=16, stored=self.prefixes)
        self.moved = threading.Event()
        self.prefixes.on_room = self.moved.set

    @property
    def store(self) -> PrefixStore:
        return self.prefixes.store

    def store_system(self, identity: str = "a", system: list[int] = SYSTEM) -> None:
        """Ask twice with a system message: then it is stored."""
        for last in (1, 2):
            self.run(asked([*system, 251, last, 3], identity=identity))

    def run(self, *sequences: Sequence) -> None:
        """Answer, and then use the idle time until there is no more to do."""
        for sequence in sequences:
            self.engine.add(sequence)
        while True:
            self.moved.clear()
            while self.engine.has_work:
                assert not any(isinstance(event, Failed) for _, event in self.engine.step())
            if self.prefixes._outgoing is None:
                break
            assert self.moved.wait(30)
        for sequence in sequences:
            assert sequence.output_ids == expected_tokens(
                self.runner.logits_after, sequence.prompt_ids, sequence.params, eos_ids=TOKENIZER.eos_ids
            )
