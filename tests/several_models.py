"""Several models in the test's own process: fakes with answers of their own, loads that wait, and a budget."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fakes import FakeRunner, hashed_logits
from hearthd.configuration.config import Config, ModelOptions, ModelsConfig
from hearthd.inference.model import Model
from hearthd.inference.worker import Worker
from hearthd.models.entry import Entry
from hearthd.models.facts import ModelFacts, facts_of
from hearthd.models.pool import ModelPool
from hearthd.sequences.events import Delta
from hearthd.sequences.sampling import SamplingParams
from hearthd.sequences.sequence import Sequence
from serving import NAME, make_config, make_model, make_runner, make_tokenizer

MODEL_BYTES = 100


def several_config(directory: Path, *names: str, max_bytes: int = 0, **options: Any) -> Config:
    """Return a configuration that serves the default model and others. options: of each of the others."""
    config = make_config(directory)
    return replace(
        config,
        models=ModelsConfig(max_bytes=max_bytes, max_wait_seconds=20.0),
        model_options={name: ModelOptions(**options) for name in names},
    )


class Shelf:
    """Loads fakes by name, and says how that went. Each model answers in its own way."""

    def __init__(self) -> None:
        self.runners: dict[str, FakeRunner] = {}
        """The last of each name."""
        self.loads: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.begun = threading.Semaphore(0)
        self.closed: dict[str, threading.Event] = {}
        """Loads of these names wait for the event."""
        self.gated: set[str] = set()
        """The runners of these wait for `allow` once they are proven."""

    def load(self, config: Config) -> Model:
        name = config.model.name
        self.loads.append(name)
        self.begun.release()
        if name in self.closed:
            assert self.closed[name].wait(30), "nobody opened it"
        if name in self.failing:
            raise self.failing[name]
        runner = make_runner(num_slots=config.engine.slots, logits_after=logits_of(name), is_gated=name in self.gated)
        # What proves it.
        runner.allow(3)
        self.runners[name] = runner
        return replace(make_model(runner), name=name)

    def survey(self, config: Config) -> ModelFacts:
        name = config.model.name
        if isinstance(error := self.failing.get(f"{name}'s bundle"), Exception):
            raise error
        model = make_model(make_runner(num_slots=config.engine.slots))
        return replace(facts_of(model, MODEL_BYTES), architecture=f"{name}ForCausalLM")

    def close(self, name: str) -> threading.Event:
        """Let the next loads of a model wait until the event is set."""
        self.closed[name] = threading.Event()
        return self.closed[name]

    async def wait_for_load(self) -> None:
        """Return when one more load has begun since the last call."""
        assert await asyncio.to_thread(self.begun.acquire, timeout=30)


def logits_of(name: str) -> Any:
    return hashed_logits(make_tokenizer().vocab_size, seed=sum(name.encode()) % 251)


@asynccontextmanager
async def pooling(config: Config, shelf: Shelf | None = None) -> AsyncIterator[tuple[ModelPool, Shelf]]:
    """Run a pool; in the block the default model is loaded."""
    shelf = shelf or Shelf()
    pool = ModelPool(config, shelf.load, shelf.survey)
    await pool.start()
    await shelf.wait_for_load()
    try:
        yield pool, shelf
    finally:
        for event in shelf.closed.values():
            event.set()
        for runner in shelf.runners.values():
            runner.open_gate()
        pool.begin_drain()
        pool.stop()
        await pool.wait_until_gone()


def entry(pool: ModelPool, name: str = NAME) -> Entry:
    found = pool.find(name)
    assert found is not None
    return found


def sequence(length: int = 4, max_tokens: int = 6) -> Sequence:
    return Sequence(
        request_id="test",
        prompt_ids=tuple(range(1, length + 1)),
        params=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        arrived=time.monotonic(),
        cache_identity="test",
    )


async def chat(worker: Worker, length: int = 4, max_tokens: int = 6) -> str:
    with worker.admit() as stream:
        stream.submit(sequence(length, max_tokens))
        return "".join([event.text async for event in stream if isinstance(event, Delta)])


async def ask(
    pool: ModelPool, name: str, length: int = 4, max_tokens: int = 6, *, seconds_left: float | None = None
) -> str:
    """Ask one model, as the chat service does."""
    async with pool.using(entry(pool, name), seconds_left=seconds_left) as worker:
        assert worker.model.name == name
        return await chat(worker, length, max_tokens)


async def until(pool: ModelPool, what: Any) -> None:
    """Return when `what()` holds; the pool rings at each change."""
    async with asyncio.timeout(30):
        while not what():
            await pool.changed.wait()
