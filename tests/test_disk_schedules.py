"""Whatever sequences do while prefixes come from the disk, each gets its solo answer: files, and a disk of any pace."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_bench import GREEDY, Bench, solo
from fakes import FakeRunner
from hearthd.generation.engine import RunTerminated, Sequence
from hearthd.kv import stored_prefixes
from hearthd.kv.kv_cache import KVCache
from hearthd.kv.loading import Loading
from hearthd.kv.prefix_file import CHUNK
from hearthd.kv.prefix_store import PrefixStore, StoredPrefix
from hearthd.kv.stored_prefixes import StoredPrefixes
from hearthd.priority import Priority

SYSTEM = [place % 50 + 1 for place in range(2 * CHUNK + 22)]


class Disk:
    """A disk that gives a chunk only when a test says so: the same test gives the same schedule."""

    def __init__(self) -> None:
        self.num_chunks = 0


def paced(disk: Disk) -> type[Loading]:
    class PacedLoading(Loading):
        def take(self, wait_seconds: float) -> Iterator[bytes]:
            if disk.num_chunks > 0:
                disk.num_chunks -= 1
                yield from [chunk for chunk in [next(super().take(30.0), None)] if chunk is not None]

    return PacedLoading


def store_with_files(directory: Path, *identities: str) -> PrefixStore:
    store = PrefixStore(directory, b"model", FakeRunner.kv_token_bytes, max_bytes=2**24, margin_bytes=0)
    chunks = [np.array(SYSTEM[start : start + CHUNK], np.int64).tobytes() for start in range(0, len(SYSTEM), CHUNK)]
    for identity in identities:
        prefix = StoredPrefix(len(SYSTEM), store.key(identity, SYSTEM))
        if not store.has(prefix):
            store.write(prefix, chunks)
    return store


def test_a_slot_that_moves_while_the_disk_fills_it_keeps_what_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    monkeypatch.setattr(stored_prefixes, "Loading", paced(disk))
    runner = FakeRunner(num_slots=2)
    cache = KVCache(runner, StoredPrefixes(store_with_files(tmp_path, "a"), runner, min_tokens=64))
    place = cache.acquire([*SYSTEM, 1, 2], "a", len(SYSTEM) + 10)
    assert place is not None
    disk.num_chunks = 2
    assert cache.fetch(place.slot, 0.0) is None
    assert cache.fetch(place.slot, 0.0) is None
    cache.swap(place.slot, 1 - place.slot)
    disk.num_chunks = 2
    assert cache.fetch(1 - place.slot, 0.0) is None
    assert cache.fetch(1 - place.slot, 0.0) == len(SYSTEM)
    assert runner.slots[1 - place.slot][: len(SYSTEM)] == SYSTEM


short = st.lists(st.integers(0, 9), min_size=2, max_size=12)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mix_with_a_disk_gives_each_its_solo_answer(
    data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those whose beginning is on the disk come, pause, leave and move while its chunks come, at any pace."""
    disk = Disk()
    monkeypatch.setattr(stored_prefixes, "Loading", paced(disk))
    num_slots = data.draw(st.integers(1, 4))
    runner = FakeRunner(num_slots=num_slots + data.draw(st.integers(0, 3)), context_length=256, min_run=2)
    stored = StoredPrefixes(store_with_files(tmp_path, "a", "b"), runner, min_tokens=2**20)
    bench = Bench(runner=runner, num_slots=num_slots, prefill_chunk=data.draw(st.integers(4, 64)), stored=stored)
    alive: list[Sequence] = []
    for action in data.draw(st.lists(st.sampled_from("aaaddddsssssstr"), min_size=40, max_size=80)):
        if action == "a":
            is_stored = data.draw(st.booleans())
            prompt = [*SYSTEM, *data.draw(short)] if is_stored else [99, *data.draw(short)]
            params = replace(GREEDY, max_tokens=data.draw(st.integers(1, 20)))
            identity, priority = data.draw(st.sampled_from("abc")), data.draw(st.sampled_from(Priority))
            alive.append(bench.add(prompt, params, identity=identity, account=identity, priority=priority))
        elif action == "d":
            disk.num_chunks += 1
        elif action == "s":
            bench.step()
        elif action == "t":
            runner.fail_next = RunTerminated()
            bench.step()
        elif alive:
            bench.engine.remove(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
    runner.fail_next = None
    disk.num_chunks = 2**20
    bench.finish()
    for sequence in alive:
        assert sequence.output_ids == solo(sequence.prompt_ids, sequence.params, context_length=256)
