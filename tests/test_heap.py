"""What a loaded model leaves to the garbage collector, and what is taken when the model goes."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from hearthd.models import heap


class Part:
    """Refers to itself, as an engine and its parts do to each other."""

    def __init__(self) -> None:
        self.whole = self


@pytest.fixture(autouse=True)
def thaw() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_kept_takes_no_part_in_collections_until_it_is_let_go() -> None:
    part = Part()
    gone = weakref.ref(part)
    heap.keep()
    assert gc.get_freeze_count()
    del part
    gc.collect()
    assert gone() is not None
    heap.let_go()
    assert gone() is None


def test_garbage_is_not_kept() -> None:
    gone = weakref.ref(Part())
    heap.keep()
    assert gone() is None


def test_what_is_let_go_a_moment_too_early_goes_with_the_next_collection() -> None:
    heap.keep()
    part = Part()
    gone = weakref.ref(part)
    heap.let_go()
    del part
    gc.collect()
    assert gone() is None


def test_the_next_model_that_is_kept_takes_what_was_let_go_too_early() -> None:
    part = Part()
    gone = weakref.ref(part)
    heap.keep()
    heap.let_go()
    del part
    heap.keep()
    assert gone() is None
