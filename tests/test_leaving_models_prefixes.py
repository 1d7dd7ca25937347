"""Stored prefixes of a model that leaves: written in bounded time or not at all, no thread stays, counts do."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hearthd.configuration.config import Config
from hearthd.generation.engine import Engine
from hearthd.inference.model import Model
from hearthd.kv.prefix_store import PrefixStore, StoredPrefix
from hearthd.kv.shared import SharedPrompts
from hearthd.kv.stored_prefixes import StoredPrefixes
from hearthd.models.entry import ModelState
from hearthd.models.pool import ModelPool
from hearthd.sequences.sequence import Sequence
from prefix_daemon import SYSTEM, Daemon, asked, chunks_of, open_store
from serving import asynchronous
from several_models import Shelf, entry, pooling, several_config, until


class ShelfWithDisk(Shelf):
    """Models with prefixes in one directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def load(self, config: Config) -> Model:
        model = super().load(config)
        name = config.model.name.encode()
        store = PrefixStore(self._directory, name, 8, max_bytes=2**20, margin_bytes=0)
        stored = StoredPrefixes(store, model.runner, min_tokens=64)
        return replace(model, engine=Engine(model.runner, model.tokenizer, prefill_chunk=16, stored=stored))


def threads_of_prefixes() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefix-")]


async def ask(pool: ModelPool, name: str, last: int) -> Sequence:
    sequence = asked([*SYSTEM[:100], 251, last, 3], num_first=100)
    sequence.arrived = time.monotonic()
    async with pool.using(entry(pool, name)) as worker:
        with worker.admit() as stream:
            stream.submit(sequence)
            async for _ in stream:
                pass
    return sequence


async def leave(pool: ModelPool, name: str) -> None:
    pool._residents.part_with(entry(pool, name))
    await until(pool, lambda: entry(pool, name).state is ModelState.LOADABLE)


@asynchronous
async def test_a_model_that_is_unloaded_leaves_its_prefixes_and_counts_and_no_thread(tmp_path: Path) -> None:
    async with pooling(several_config(tmp_path, "other"), ShelfWithDisk(tmp_path / "prefixes")) as (pool, _):
        for last in (1, 2):
            await ask(pool, "other", last)
        await leave(pool, "other")
        assert len(list((tmp_path / "prefixes").iterdir())) == 1
        assert threads_of_prefixes() == []
        assert pool.counts.prompt_tokens_from_disk == 0
        sequence = await ask(pool, "other", 3)
        assert (sequence.num_from_disk, sequence.num_cached) == (100, 100)
        sequence = await ask(pool, "other", 4)
        assert (sequence.num_from_disk, sequence.num_cached) == (0, 101)
        before = pool.counts
        assert before.prompt_tokens_from_disk == 100
        await leave(pool, "other")
        assert pool.counts == before
        assert threads_of_prefixes() == []


def test_shared_prompts_that_come_from_the_disk_are_nobodys_tokens(tmp_path: Path) -> None:
    for _ in range(2):
        daemon = Daemon(tmp_path)
        daemon.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM]))
        daemon.run()
    assert daemon.store.num_hits == 1
    sequence = asked([*SYSTEM, 1, 2])
    daemon.run(sequence)
    assert (sequence.num_cached, sequence.num_from_disk) == (150, 0)


class TestHangingDisk:
    def test_writing_is_given_up_in_time_and_ends_when_the_disk_does_something(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        daemon = Daemon(tmp_path)
        goes_on, write = threading.Event(), daemon.store.write

        def hang(prefix: StoredPrefix, chunks: Iterator[bytes]) -> None:
            assert goes_on.wait(30)
            write(prefix, chunks)

        monkeypatch.setattr(daemon.store, "write", hang)
        for last in (1, 2):
            sequence = asked([*SYSTEM, last, 8, 7])
            daemon.engine.add(sequence)
            while daemon.engine.has_work and daemon.prefixes._outgoing is None:
                daemon.engine.step()
        (thread,) = threads_of_prefixes()
        daemon.engine.close(0.01)
        assert daemon.prefixes._outgoing is None
        assert not daemon.prefixes.has_work
        goes_on.set()
        thread.join(30)
        assert not thread.is_alive()
        assert list(tmp_path.iterdir()) == []

    def test_reading_ends_with_the_model(self, tmp_path: Path) -> None:
        long = [(at * at + 3 * at) % 250 for at in range(1000)]
        store = open_store(tmp_path)
        store.write(StoredPrefix(1000, store.key("a", long)), chunks_of(1000))
        daemon = Daemon(tmp_path)
        # More than fits between the threads: the one that reads waits.
        slot = daemon.engine._cache._slots[0]
        slot.identity = "a"
        daemon.prefixes.look_for(slot, [*long, 1], 1000)
        (thread,) = threads_of_prefixes()
        assert thread.is_alive()
        daemon.engine.close(0.01)
        thread.join(30)
        assert not thread.is_alive()
