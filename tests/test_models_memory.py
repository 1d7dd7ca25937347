"""Nothing of a model stays in memory when it has gone, however it went."""

import asyncio
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from hearthd.configuration.config import Config
from hearthd.errors import BundleError, NotServingError
from hearthd.generation.engine import Engine
from hearthd.inference.model import Model
from hearthd.models import heap
from serving import asynchronous
from several_models import MODEL_BYTES, Shelf, ask, entry, pooling, several_config, until


class KeptModels(Shelf):
    """Keeps what it has loaded, as the program does, and sees what is left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.engines: dict[str, weakref.ref[Engine]] = {}
        self.broken: set[str] = set()

    def load(self, config: Config) -> Model:
        model = super().load(config)
        name = config.model.name
        self.engines[name] = weakref.ref(model.engine)
        if name in self.broken:

            def fail() -> None:
                raise BundleError("it generates no token")

            model.engine.step = fail  # type: ignore[assignment, method-assign]
        heap.keep()
        return model


@pytest.fixture(autouse=True)
def thaw() -> Iterator[None]:
    yield
    gc.unfreeze()


@asynchronous
async def test_of_one_that_cannot_be_proved(tmp_path: Path) -> None:
    shelf = KeptModels()
    async with pooling(several_config(tmp_path, "other"), shelf) as (pool, _):
        shelf.broken.add("other")
        with pytest.raises(NotServingError):
            await ask(pool, "other")
        await until(pool, lambda: entry(pool, "other").bringing is None)
        gc.collect()
        assert shelf.engines["other"]() is None


@pytest.mark.parametrize("is_cancelled", [False, True])
@asynchronous
async def test_of_one_that_has_made_room(tmp_path: Path, *, is_cancelled: bool) -> None:
    """Also if its last chat was cancelled in the middle of a step, and the thread was told to end before the next."""
    shelf = KeptModels()
    async with pooling(several_config(tmp_path, "a", "b", max_bytes=2 * MODEL_BYTES), shelf) as (pool, _):
        if is_cancelled:
            shelf.gated.add("a")
        asking = asyncio.create_task(ask(pool, "a", 4, 50))
        await until(pool, lambda: entry(pool, "a").worker is not None)
        await asyncio.sleep(0.2)  # in a step, at the gate
        waiting = asyncio.create_task(ask(pool, "b"))
        if is_cancelled:
            await until(pool, lambda: entry(pool, "a").is_leaving)
            asking.cancel()
            await asyncio.sleep(0.02)
            shelf.runners["a"].open_gate()
        await asyncio.gather(asking, return_exceptions=True)
        assert await waiting
        gc.collect()
        assert shelf.engines["a"]() is None
